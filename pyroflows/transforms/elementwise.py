"""Elementwise maps: a recipe's map of every feature, and fixed maps exact far into their tails.

The sigmoid, the exponential and, by ``.inv``, the logit and the logarithm are `IntervalTransform`
on the unit interval and on the positive numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyroflows.transforms.base import Transform
from pyroflows.transforms.univariate import Univariate, vector_domain


class ElementwiseTransform(Transform):
    r"""Map every feature by its own scalar map, :math:`y_i = u(x_i; \theta_i)`.

    Parameters
    ----------
    univariate
        Recipe of the scalar map.
    params
        Raw parameters ``(count, *batch, features)``, or a conditioner that gives them: it is called
        with a vector of no features, ``(*batch, 0)``, and so depends on its context alone.

    Examples
    --------
    >>> from pyroflows.transforms import Affine
    >>> ElementwiseTransform(Affine(), torch.zeros(2, 3))(torch.ones(3))
    tensor([1., 1., 1.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, univariate: Univariate, params: Tensor | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.domain = self.codomain = vector_domain(univariate)
        self.univariate = univariate
        self.params = params

    def _scalar(self, value: Tensor) -> Transform:
        params = self.params
        return self.univariate(params if isinstance(params, Tensor) else params(value[..., :0]))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._scalar(x).call_and_ladj(x)
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._scalar(y).inverse_and_ladj(y)
        return x, ladj.sum(-1)


@dataclass(eq=False)
class FixedTransform(Transform):
    """A scalar map without learned parameters, which a saved file can describe by its arguments."""

    def __post_init__(self) -> None:
        super().__init__()


#: One over the standard deviation of the logistic distribution.
LOGISTIC = math.sqrt(3) / math.pi


@dataclass(eq=False)
class TanhTransform(FixedTransform):
    r"""The real line onto :math:`(-1, 1)`, :math:`y = \tanh x`.

    Values are kept off the ends by one unit in the last place, so that every draw can be scored;
    the log-derivative does not saturate. Values outside have the density zero.

    Examples
    --------
    >>> TanhTransform().call_and_ladj(torch.tensor(50.0))
    (tensor(1.0000), tensor(-98.6137))
    """

    codomain = constraints.interval(-1.0, 1.0)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj = logsigmoid(2 * x) + logsigmoid(-2 * x) + math.log(4)
        return self._kept_inside(x.tanh()), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        outside = y.abs() > 1
        y = self._kept_inside(y)
        ladj = -(y.log1p() + (-y).log1p())
        return y.atanh(), ladj.masked_fill(outside, -math.inf)

    @staticmethod
    def _kept_inside(y: Tensor) -> Tensor:
        edge = 1 - torch.finfo(y.dtype).eps
        return y.clamp(-edge, edge)


@dataclass(eq=False)
class SoftplusTransform(FixedTransform):
    r"""The real line onto the positive numbers, :math:`y = \log(1 + e^x)`.

    Unlike the exponential it grows as :math:`x` itself. Values that are not positive have the
    density zero.

    Examples
    --------
    >>> SoftplusTransform().call_and_ladj(torch.tensor([-50.0, 50.0]))
    (tensor([1.9287e-22, 5.0000e+01]), tensor([-5.0000e+01, -1.9287e-22]))
    """

    codomain = constraints.positive

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (-logsigmoid(-x)).clamp_min(torch.finfo(x.dtype).tiny), logsigmoid(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        outside = y <= 0
        y = y.clamp_min(torch.finfo(y.dtype).tiny)
        log_slope = (-(-y).expm1()).log()
        return y + log_slope, (-log_slope).masked_fill(outside, -math.inf)


@dataclass(eq=False)
class LeakyReLUTransform(FixedTransform):
    r"""Two rays that meet at the origin, :math:`y = x` above zero and :math:`y = a x` below.

    Parameters
    ----------
    slope
        The slope :math:`a > 0` below zero.

    Examples
    --------
    >>> LeakyReLUTransform(0.1)(torch.tensor([-2.0, 2.0]))
    tensor([-0.2000,  2.0000])
    """

    slope: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.slope > 0:
            raise ValueError(f"slope: expected a positive number, got {self.slope}")

    def _scaled(self, value: Tensor, slope: float) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(value)
        ladj = torch.where(value < 0, none + math.log(slope), none)
        return torch.where(value < 0, value * slope, value), ladj

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._scaled(x, self.slope)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._scaled(y, 1 / self.slope)


@dataclass(eq=False)
class AsinhTransform(FixedTransform):
    r"""The inverse hyperbolic sine, :math:`y = \operatorname{arsinh} x`; ``.inv`` is the sine.

    The identity near zero, a logarithm of either sign far out. Forward it makes tails light; its
    inverse makes them heavy and overflows float32 beyond 89, though its log-derivative does not.

    Examples
    --------
    >>> AsinhTransform().inv.call_and_ladj(torch.tensor([0.0, 50.0]))
    (tensor([0.0000e+00, 2.5924e+21]), tensor([ 0.0000, 49.3069]))
    """

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.asinh(), -torch.hypot(x, torch.ones_like(x)).log()

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # The logarithm of the hyperbolic cosine.
        return y.sinh(), -logsigmoid(-2 * y) - y - math.log(2)


@dataclass(eq=False)
class LogisticTransform(FixedTransform):
    r"""The standard normal onto the logistic distribution of variance one.

    .. math:: y = \frac{\sqrt3}{\pi} \log\frac{\Phi(x)}{\Phi(-x)}

    Close to the identity near zero, and a square far out. A uniform variable on an interval is
    logistic in unconstrained units: behind this map a flow sees a normal one, and ends of the
    interval that are near in the prior's mass are near.

    The inverse is found by Newton's method, to rounding.

    Examples
    --------
    >>> LogisticTransform()(torch.tensor([-1.0, 0.0, 10.0]))
    tensor([-0.9198,  0.0000, 29.3479])
    """

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = signed(x, x)
        # Logarithms of the normal's mass beyond the size and within it, from its scaled tail.
        tail = torch.special.erfcx(size / math.sqrt(2)) / 2
        within = (-tail * (-0.5 * x**2).exp()).log1p()
        y = within - tail.log() + 0.5 * x**2
        log_scale = math.log(LOGISTIC) - 0.5 * math.log(2 * math.pi)
        return signed(y * LOGISTIC, x), log_scale - tail.log() - within

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        size = signed(y, y)
        start = (size / LOGISTIC).detach()
        near = -torch.special.ndtri(torch.sigmoid(-start.clamp(max=30.0)))
        x = torch.where(start < 30, near, (2 * start).sqrt())
        for _ in range(4):
            value, ladj = self.call_and_ladj(x)
            x = x - (value - size) * (-ladj).exp()
        return signed(x, y), -self.call_and_ladj(x)[1]


@dataclass(eq=False)
class SignedPowerTransform(FixedTransform):
    r"""Power of the distance from one below zero, for either sign and with slope one at zero.

    .. math:: y = \operatorname{sgn}(x)\, \frac{(1 + |x|)^p - 1}{p}, \qquad
              \log \frac{dy}{dx} = (p - 1) \log(1 + |x|)

    Onto the real line and continuously differentiable, for every :math:`p > 0`: the identity for
    one, close to a logarithm of either sign for small :math:`p`. On positive numbers,
    ``torch.distributions.PowerTransform`` is the plain power.

    Parameters
    ----------
    exponent
        The power :math:`p > 0`.

    Examples
    --------
    >>> SignedPowerTransform(2.0)(torch.tensor([-3.0, 0.0, 1.0]))
    tensor([-7.5000,  0.0000,  1.5000])
    """

    exponent: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exponent > 0:
            raise ValueError(f"exponent: expected a positive number, got {self.exponent}")

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_size = signed(x, x).log1p()
        y = (self.exponent * log_size).expm1() / self.exponent
        return signed(y, x), (self.exponent - 1) * log_size

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_size = (self.exponent * signed(y, y)).log1p() / self.exponent
        return signed(log_size.expm1(), y), (1 - self.exponent) * log_size


def signed(size: Tensor, like: Tensor) -> Tensor:
    """``size`` with the sign of ``like``, where zero counts as positive: its derivative is one."""
    return torch.where(like < 0, -size, size)
