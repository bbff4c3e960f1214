"""The flow that AutoFlow takes when none is given."""

from __future__ import annotations

from pyroflows.flows import Flow, RealNVP
from pyroflows.layers import CouplingLayer, LULinear
from pyroflows.transforms import Affine, RationalQuadratic

#: Most latents whose correlations a guide starts with.
DENSE = 200


def default_flow(features: int) -> Flow:
    """The flow that `AutoFlow` takes when none is given: one pass in either direction.

    Six affine couplings with learned dense affine maps between them and last; in one dimension,
    where a coupling has nothing to condition on, a spline and affine maps. Beyond 500 dimensions
    the dense maps, quadratic in the dimension, are left out.
    """
    if features == 1:
        return _scalar_flow()
    dense = features <= 500
    return RealNVP(
        features,
        transforms=6,
        hidden_features=(32, 32),
        max_log_scale=1.0,
        mixing="lu" if dense else None,
        act_norm=not dense,
    )


def _scalar_flow() -> Flow:
    """One spline at the base, affine maps after it.

    A spline cannot reach beyond its box. So the affine maps must find place and scale before it
    adapts: they have many hidden units, which without inputs only speed training up, and it has one
    (with the default number it lost up to 80% of a posterior fifty times wider than the start).
    """
    spline = CouplingLayer(
        1, univariate=RationalQuadratic(bins=16, bound=8.0), hidden_features=(1,)
    )
    affine = [(CouplingLayer(1, univariate=Affine(3.0)), LULinear(1)) for _ in range(2)]
    return Flow([spline, *(layer for pair in affine for layer in pair)], 1)
