"""Increasing maps as integrals of positive functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.numerics import bounded_exp, gauss_legendre, soft_clamp, straight_tails
from pyroflows.transforms.increasing import IncreasingTransform

LOG_SLOPE = math.log(1e3)
# Where the units of an integrand start, and how steep they may become, in units of the box: as
# steep as the nodes resolve.
STEEPNESS, LOG_STEEPNESS = 5.0, math.log(2.0)
NODES = 64


class IntegralTransform(IncreasingTransform):
    r"""Integral of a positive function, :math:`y = t + b \int_0^{x/b} e^{s(u)}\,du`.

    A subclass implements ``log_slope(u)`` for :math:`u \in [-1, 1]`. Beyond the box of half-width
    :math:`b` the map goes on along its tangents.

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

    def log_slope(self, u: Tensor) -> Tensor:
        """Logarithm of the slope, at places relative to the box, any shape of batch in front."""
        raise NotImplementedError(f"{type(self).__name__} does not implement log_slope(u)")

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.expand(torch.broadcast_shapes(x.shape, self.shift.shape))
        y, ladj = straight_tails(self._inside, x, self.bound)
        return self.shift + y, ladj

    def _inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = x / self.bound
        rise = gauss_legendre(lambda t: self.log_slope(t).exp(), u, self.nodes)
        return self.bound * rise, self.log_slope(u)


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

    def log_slope(self, u: Tensor) -> Tensor:
        total = self.level
        units = zip(self.weights, self.centres, self.steepness, strict=True)
        for weight, centre, steepness in units:
            total = total + weight * torch.tanh(steepness * (u - centre))
        return soft_clamp(total, LOG_SLOPE)


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
    bound: float = 5.0

    def __post_init__(self) -> None:
        if self.units < 1 or self.bound <= 0:
            raise ValueError(
                f"expected at least one unit and a positive bound, got units={self.units}, "
                f"bound={self.bound}"
            )

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
            weights,
            start + soft_clamp(centres, 1.0),
            STEEPNESS * bounded_exp(steepness, LOG_STEEPNESS),
            self.bound,
        )
