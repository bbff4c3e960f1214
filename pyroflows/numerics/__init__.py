"""Pure functions on tensors."""

from pyroflows.numerics.ascent import ascend
from pyroflows.numerics.bounded import bounded_exp, soft_clamp
from pyroflows.numerics.concrete import has_values
from pyroflows.numerics.determinant import log_abs_det
from pyroflows.numerics.fixed_point import (
    batched_vjp,
    contraction_root,
    value_and_jacobian,
)
from pyroflows.numerics.masks import autoregressive_mask, binary_code, hidden_degrees
from pyroflows.numerics.ode import integrate
from pyroflows.numerics.quadratic import rational_quadratic_spline
from pyroflows.numerics.quadrature import gauss_legendre, legendre_rule
from pyroflows.numerics.rational import linear_rational_spline
from pyroflows.numerics.rng import forked_rng
from pyroflows.numerics.roots import increasing_root
from pyroflows.numerics.score_matching import batch_and_match, low_rank_match
from pyroflows.numerics.sums import sum_rightmost
from pyroflows.numerics.tails import straight_tails

__all__ = [
    "ascend",
    "autoregressive_mask",
    "batch_and_match",
    "batched_vjp",
    "binary_code",
    "bounded_exp",
    "contraction_root",
    "forked_rng",
    "gauss_legendre",
    "has_values",
    "hidden_degrees",
    "increasing_root",
    "integrate",
    "legendre_rule",
    "linear_rational_spline",
    "log_abs_det",
    "low_rank_match",
    "rational_quadratic_spline",
    "soft_clamp",
    "straight_tails",
    "sum_rightmost",
    "value_and_jacobian",
]
