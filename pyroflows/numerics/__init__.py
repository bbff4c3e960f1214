"""Pure functions on tensors."""

from pyroflows.numerics.bounded import bounded_exp, soft_clamp
from pyroflows.numerics.masks import autoregressive_mask, binary_code, hidden_degrees
from pyroflows.numerics.rng import forked_rng
from pyroflows.numerics.splines import rational_quadratic_spline
from pyroflows.numerics.sums import sum_rightmost

__all__ = [
    "autoregressive_mask",
    "binary_code",
    "bounded_exp",
    "forked_rng",
    "hidden_degrees",
    "rational_quadratic_spline",
    "soft_clamp",
    "sum_rightmost",
]
