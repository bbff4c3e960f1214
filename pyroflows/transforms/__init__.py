"""Invertible maps that hold their parameter tensors: torch transforms with fused passes."""

from pyroflows.transforms.autoregressive import AutoregressiveTransform
from pyroflows.transforms.base import (
    ComposedTransform,
    InverseTransform,
    Transform,
    call_and_ladj,
    inverse_and_ladj,
)
from pyroflows.transforms.coupling import CouplingTransform
from pyroflows.transforms.elementwise import ElementwiseTransform
from pyroflows.transforms.increasing import IncreasingTransform
from pyroflows.transforms.linear import (
    DiagonalAffineTransform,
    LUTransform,
    PermutationTransform,
)
from pyroflows.transforms.supports import (
    ColumnsTransform,
    IntervalTransform,
    StickBreakingTransform,
    to_support,
)
from pyroflows.transforms.univariate import (
    Additive,
    Affine,
    AffineTransform,
    RationalQuadratic,
    RationalQuadraticTransform,
    ShiftTransform,
    Univariate,
)

__all__ = [
    "Additive",
    "Affine",
    "AffineTransform",
    "AutoregressiveTransform",
    "ColumnsTransform",
    "ComposedTransform",
    "CouplingTransform",
    "DiagonalAffineTransform",
    "ElementwiseTransform",
    "IncreasingTransform",
    "IntervalTransform",
    "InverseTransform",
    "LUTransform",
    "PermutationTransform",
    "RationalQuadratic",
    "RationalQuadraticTransform",
    "ShiftTransform",
    "StickBreakingTransform",
    "Transform",
    "Univariate",
    "call_and_ladj",
    "inverse_and_ladj",
    "to_support",
]
