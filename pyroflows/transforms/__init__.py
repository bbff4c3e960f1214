"""Invertible maps that hold their parameter tensors: torch transforms with fused passes."""

from pyroflows.transforms.autoregressive import AutoregressiveTransform
from pyroflows.transforms.base import (
    ComposedTransform,
    InverseTransform,
    Transform,
    call_and_ladj,
    inverse_and_ladj,
)
from pyroflows.transforms.block import BlockTransform
from pyroflows.transforms.chain import ChainTransform
from pyroflows.transforms.continuous import ContinuousTransform
from pyroflows.transforms.coupling import CouplingTransform
from pyroflows.transforms.elementwise import (
    AsinhTransform,
    ElementwiseTransform,
    LeakyReLUTransform,
    LogisticTransform,
    SignedPowerTransform,
    SoftplusTransform,
    TanhTransform,
)
from pyroflows.transforms.increasing import IncreasingTransform
from pyroflows.transforms.linear import (
    DiagonalAffineTransform,
    LowRankAffineTransform,
    LUTransform,
    MatrixExponentialTransform,
    PermutationTransform,
    PixelwiseTransform,
    TriangularAffineTransform,
)
from pyroflows.transforms.mixture import (
    DeepSigmoidal,
    MixtureLogistic,
    MixtureLogisticTransform,
)
from pyroflows.transforms.monotonic import (
    UnconstrainedMonotonic,
    UnconstrainedMonotonicTransform,
)
from pyroflows.transforms.orthogonal import HouseholderTransform, OrthogonalTransform
from pyroflows.transforms.planar import (
    ConditionalTransform,
    PlanarTransform,
    RadialTransform,
    SylvesterTransform,
)
from pyroflows.transforms.polynomials import (
    Bernstein,
    BernsteinTransform,
    SumOfSquares,
    SumOfSquaresTransform,
)
from pyroflows.transforms.residual import ResidualTransform
from pyroflows.transforms.splines import (
    CircularRationalQuadratic,
    CircularRationalQuadraticTransform,
    LinearRational,
    LinearRationalTransform,
    RationalQuadratic,
    RationalQuadraticTransform,
)
from pyroflows.transforms.supports import (
    ColumnsTransform,
    IntervalTransform,
    StickBreakingTransform,
    to_support,
)
from pyroflows.transforms.tails import HeavyTails, HeavyTailTransform, LOFTTransform
from pyroflows.transforms.univariate import (
    Additive,
    Affine,
    AffineTransform,
    ShiftTransform,
    Univariate,
)

__all__ = [
    "Additive",
    "Affine",
    "AffineTransform",
    "AsinhTransform",
    "AutoregressiveTransform",
    "Bernstein",
    "BernsteinTransform",
    "BlockTransform",
    "ChainTransform",
    "CircularRationalQuadratic",
    "CircularRationalQuadraticTransform",
    "ColumnsTransform",
    "ComposedTransform",
    "ConditionalTransform",
    "ContinuousTransform",
    "CouplingTransform",
    "DeepSigmoidal",
    "DiagonalAffineTransform",
    "ElementwiseTransform",
    "HeavyTailTransform",
    "HeavyTails",
    "HouseholderTransform",
    "IncreasingTransform",
    "IntervalTransform",
    "InverseTransform",
    "LOFTTransform",
    "LUTransform",
    "LeakyReLUTransform",
    "LinearRational",
    "LinearRationalTransform",
    "LogisticTransform",
    "LowRankAffineTransform",
    "MatrixExponentialTransform",
    "MixtureLogistic",
    "MixtureLogisticTransform",
    "OrthogonalTransform",
    "PermutationTransform",
    "PixelwiseTransform",
    "PlanarTransform",
    "RadialTransform",
    "RationalQuadratic",
    "RationalQuadraticTransform",
    "ResidualTransform",
    "ShiftTransform",
    "SignedPowerTransform",
    "SoftplusTransform",
    "StickBreakingTransform",
    "SumOfSquares",
    "SumOfSquaresTransform",
    "SylvesterTransform",
    "TanhTransform",
    "Transform",
    "TriangularAffineTransform",
    "UnconstrainedMonotonic",
    "UnconstrainedMonotonicTransform",
    "Univariate",
    "call_and_ladj",
    "inverse_and_ladj",
    "to_support",
]
