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
from pyroflows.transforms.linear import (
    DiagonalAffineTransform,
    LUTransform,
    PermutationTransform,
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
    "ComposedTransform",
    "CouplingTransform",
    "DiagonalAffineTransform",
    "ElementwiseTransform",
    "InverseTransform",
    "LUTransform",
    "PermutationTransform",
    "RationalQuadratic",
    "RationalQuadraticTransform",
    "ShiftTransform",
    "Transform",
    "Univariate",
    "call_and_ladj",
    "inverse_and_ladj",
]
