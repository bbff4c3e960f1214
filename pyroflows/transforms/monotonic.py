"""Increasing maps as integrals of positive functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.numerics import (
    bounded_exp,
    gauss_legendre,
    legendre_rule,
    soft_clamp,
    straight_tails,
)
from pyroflows.transforms.increasing import IncreasingTransform

LOG_SLOPE = math.log(1e3)
# How steep the units of an integrand start, in units of the box, and by which factor that and their
# weights may grow: no more than the nodes resolve.
STEEPNESS, LOG_STEEPNESS, MAX_WEIGHT = 5.0, math.log(2.0), 2.0
NODES = 64


class IntegralTransform(IncreasingTransform):
    r"""Integral of a positive function, :math:`y = t + b \int_0^{x/b} f(u)\,du`.

    A subclass implements ``slope(u)``, positive, for :math:`u \in [-1, 1]`. Beyond the box of
    half-width :math:`b` the map goes on along its tangents.

    Parameters
    ----------
    shift
        The tensor :math:`t`.
    bound
        Half-width of the box.
    nodes
        Points at which the function is evaluated for each integral.
    """

    def __init__(self, shift: Tensor, bound: float, nodes: int) -> None:
        super().__init__()
        self.shift = shift
        self.bound = bound
        self.nodes = nodes

    def slope(self, u: Tensor) -> Tensor:
        """The slope at places in units of the box, elementwise, any dimensions in front."""
        raise NotImplementedError(f"{type(self).__name__} does not implement slope(u)")

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.expand(torch.broadcast_shapes(x.shape, self.shift.shape))
        y, ladj = straight_tails(self._inside, x, self.bound)
        return self.shift + y, ladj

    def _inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rise, slope = gauss_legendre(self.slope, x / self.bound, self.nodes)
        return self.bound * rise, slope.log()


class UnconstrainedMonotonicTransform(IntegralTransform):
    r"""Integral of the exponential of a small network.

    .. math::

        y = t + b \int_0^{x/b} \exp\Big(v_0 + \sum_k v_k \tanh(w_k (u - c_k))\Big)\, du

    The exponent is bounded smoothly.

    Parameters
    ----------
    shift, level
        The tensors :math:`t` and :math:`v_0`.
    weights, centres, steepness
        Of the hidden units, :math:`v_k, c_k, w_k`: shape ``(units, ...)``.
    bound
        Half-width of the box.
    """

    def __init__(
        self,
        shift: Tensor,
        level: Tensor,
        weights: Tensor,
        centres: Tensor,
        steepness: Tensor,
        bound: float,
    ) -> None:
        super().__init__(shift, bound, NODES)
        self.level = level
        self.weights = weights
        self.centres = centres
        self.steepness = steepness

    def slope(self, u: Tensor) -> Tensor:
        total = self.level
        units = zip(self.weights, self.centres, self.steepness, strict=True)
        for weight, centre, steepness in units:
            total = total + weight * torch.tanh(steepness * (u - centre))
        return bounded_exp(total, LOG_SLOPE)


@dataclass(frozen=True)
class UnconstrainedMonotonic:
    r"""Recipe of the integral of a positive network, whose weights are the parameters.

    The network has one hidden layer; ``3 * units + 2`` raw parameters per feature. Zeros give the
    identity. Value and slope come from Gauss's rule with 64 nodes, which is exact to the rounding
    of float64; the inverse is found as a root. Beyond the box the map goes on along its tangents.

    Parameters
    ----------
    units
        Hidden units of the network.
    bound
        Half-width of the box.

    References
    ----------
    Wehenkel and Louppe, "Unconstrained monotonic neural networks", NeurIPS 2019.
    """

    units: int = 8
    bound: float = 3.0

    def __post_init__(self) -> None:
        if self.units < 1 or not 0 < self.bound < math.inf:
            raise ValueError(
                f"expected at least one unit and a positive bound, got units={self.units}, "
                f"bound={self.bound}"
            )
        legendre_rule(NODES)

    @property
    def count(self) -> int:
        return 3 * self.units + 2

    def __call__(self, params: Tensor) -> UnconstrainedMonotonicTransform:
        (shift, level), raw = params[:2], params[2:]
        weights, centres, steepness = raw.chunk(3)
        # Side by side over the box, so that no two units are alike.
        places = [(2 * k + 1 - self.units) / self.units for k in range(self.units)]
        start = torch.tensor(places, dtype=raw.dtype, device=raw.device)
        start = start.reshape(self.units, *(1,) * (raw.dim() - 1))
        return UnconstrainedMonotonicTransform(
            shift,
            level,
            soft_clamp(weights, MAX_WEIGHT),
            start + soft_clamp(centres, 1.0),
            STEEPNESS * bounded_exp(steepness, LOG_STEEPNESS),
            self.bound,
        )
