"""The flow that AutoFlow takes when none is given."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from pyroflows.distributions import Modes
from pyroflows.flows import Flow, RealNVP
from pyroflows.flows.coupling import coupling_layers
from pyroflows.layers import CouplingLayer, Layer, LULinear
from pyroflows.transforms import Affine, RationalQuadratic

#: Most latents that start with all their correlations; of more, directions with correlations.
DENSE, RANK = 200, 32


def default_flow(features: int) -> Flow:
    """The flow that `AutoFlow` takes when none is given: one pass in either direction.

    Six affine couplings with learned dense affine maps between them and last; in one dimension,
    where a coupling has nothing to condition on, a spline and affine maps. Beyond 500 dimensions
    the dense maps, quadratic in the dimension, are left out. Up to 200 the base may have several
    modes, which `pyroflows.fit_svi` places where it finds them.
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
        base=Modes(features) if features <= DENSE else None,
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
    layers = [spline, *(layer for pair in affine for layer in pair)]
    return Flow(layers, 1, base=Modes(1))


def default_conditional_flow(features: int, context: int, init_scale: float = 1.0) -> Flow:
    """The flow that `AutoAmortizedFlow` takes when none is given: one pass in either direction.

    Last an affine map of all features with location and scale from the context, as in a Gaussian
    encoder, so that place and scale need not be learned through couplings. It starts with the
    standard deviation ``init_scale``: where a reparameterised gradient trains it, a wide start
    makes noise that drives the scale to zero before the locations are found.
    """
    layers: list[Layer]
    if features == 1:
        spline = RationalQuadratic(bins=8, bound=5.0)
        layers = [CouplingLayer(1, context, univariate=spline, hidden_features=(64,))]
    else:
        layers = coupling_layers(features, context, 4, Affine(2.0), (64, 64), nn.SiLU)
    affine = Affine(3.0)
    last = CouplingLayer(
        features, context, mask=[True] * features, univariate=affine, hidden_features=(64,)
    )
    with torch.no_grad():
        bias = cast("nn.Linear", last.network.layers[-1]).bias
        # The inverse of the smooth bound on log-scales.
        stretch = math.pi / (2 * affine.max_log_scale)
        bias[features:] = math.tan(math.log(init_scale) * stretch) / stretch
    return Flow([*layers, last], features, context)
