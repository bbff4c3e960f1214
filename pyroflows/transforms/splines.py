"""Monotone splines as scalar maps, on a box and on the circle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics import linear_rational_spline, rational_quadratic_spline
from pyroflows.transforms.base import Transform

ANGLES = constraints.interval(-math.pi, math.pi)


class RationalQuadraticTransform(Transform):
    """Monotone rational-quadratic spline on ``[-bound, bound]``, the identity outside.

    Parameters
    ----------
    params
        Raw widths, raw heights and raw logarithms of the inner slopes, one after the other, shape
        ``(3 bins - 1, ...)``; see `pyroflows.numerics.rational_quadratic_spline`.
    bound
        Half-width of the box.

    References
    ----------
    Durkan, Bekasov, Murray and Papamakarios, "Neural spline flows", NeurIPS 2019.
    """

    def __init__(self, params: Tensor, bound: float) -> None:
        super().__init__()
        self.params = params
        self.bound = bound

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(x, self.params, self.bound)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(y, self.params, self.bound, inverse=True)


class LinearRationalTransform(Transform):
    """Monotone linear rational spline on ``[-bound, bound]``, the identity outside.

    Parameters
    ----------
    widths, heights
        Raw bin sizes, shape ``(bins, ...)``.
    slopes
        Raw logarithms of the inner slopes, shape ``(bins - 1, ...)``.
    shares
        Raw shares of each bin's width at which its two pieces meet, shape ``(bins, ...)``.
    bound
        Half-width of the box.

    References
    ----------
    Dolatabadi, Erfani and Leckie, "Invertible generative modeling using linear rational splines",
    AISTATS 2020.
    """

    def __init__(
        self, widths: Tensor, heights: Tensor, slopes: Tensor, shares: Tensor, bound: float
    ) -> None:
        super().__init__()
        self.widths = widths
        self.heights = heights
        self.slopes = slopes
        self.shares = shares
        self.bound = bound

    def _spline(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return linear_rational_spline(
            value, self.widths, self.heights, self.slopes, self.shares, self.bound, inverse
        )

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._spline(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._spline(y, inverse=True)


class CircularRationalQuadraticTransform(Transform):
    r"""Rational-quadratic spline on the circle and a rotation, :math:`y = S(x) + \varphi`.

    Angles are those of :math:`[-\pi, \pi]`, modulo a whole turn; the spline's slopes at the two
    ends are one and the same, so that the map is continuously differentiable on the circle. Other
    numbers are no angles and stay as they are: on a box-shaped base their density is zero.

    Parameters
    ----------
    phase
        The rotation :math:`\varphi` in radians, broadcast against the angles.
    params
        Raw widths, raw heights and raw logarithms of the slopes at the left ends of the bins, one
        after the other, shape ``(3 bins, ...)``.

    References
    ----------
    Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan and Cranmer, "Normalizing flows on
    tori and spheres", ICML 2020.
    """

    domain = ANGLES
    codomain = ANGLES

    def __init__(self, phase: Tensor, params: Tensor) -> None:
        super().__init__()
        self.phase = phase
        self.params = params

    def _spline(self, angle: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(angle, self.params, math.pi, inverse, periodic=True)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._spline(x, inverse=False)
        return _where_angle(x, _wrapped(y + self.phase), ladj)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._spline(_wrapped(y - self.phase), inverse=True)
        return _where_angle(y, _wrapped(x), ladj)


def _wrapped(angle: Tensor) -> Tensor:
    """The same angle in ``[-pi, pi]``, whatever the rounding."""
    turn = 2 * math.pi
    angle = angle - turn * (angle / turn).round()
    # The derivative is one at the ends too.
    return angle + (angle.clamp(-math.pi, math.pi) - angle).detach()


def _where_angle(given: Tensor, angle: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
    """The map of an angle; what is none stays as it was given."""
    is_angle = given.abs() <= math.pi
    unmoved = torch.where(given.isnan(), given, torch.zeros_like(ladj))
    return torch.where(is_angle, angle, given), torch.where(is_angle, ladj, unmoved)


def _check_box(bins: int, bound: float) -> None:
    if bins < 1 or not 0 < bound < math.inf:
        raise ValueError(
            f"expected at least one bin and a positive bound, got bins={bins}, bound={bound}"
        )


@dataclass(frozen=True)
class RationalQuadratic:
    """Recipe of a rational-quadratic spline, ``3 bins - 1`` raw parameters per feature.

    Parameters
    ----------
    bins
        Number of bins.
    bound
        Half-width of the box; 5 covers standardised data, and the tails are the identity.
    """

    bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        _check_box(self.bins, self.bound)

    @property
    def count(self) -> int:
        return 3 * self.bins - 1

    def __call__(self, params: Tensor) -> RationalQuadraticTransform:
        return RationalQuadraticTransform(params, self.bound)


@dataclass(frozen=True)
class LinearRational:
    """Recipe of a linear rational spline, ``4 bins - 1`` raw parameters per feature.

    Its inverse is of the same form and needs no square root; its second derivative jumps also
    inside the bins, once in each.

    Parameters
    ----------
    bins
        Number of bins.
    bound
        Half-width of the box; 5 covers standardised data, and the tails are the identity.
    """

    bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        _check_box(self.bins, self.bound)

    @property
    def count(self) -> int:
        return 4 * self.bins - 1

    def __call__(self, params: Tensor) -> LinearRationalTransform:
        bins = self.bins
        widths, heights, slopes, shares = params.split([bins, bins, bins - 1, bins])
        return LinearRationalTransform(widths, heights, slopes, shares, self.bound)


@dataclass(frozen=True)
class CircularRationalQuadratic:
    """Recipe of a spline on the circle and a rotation, ``3 bins + 1`` raw parameters per feature.

    Parameters
    ----------
    bins
        Number of bins.
    """

    bins: int = 8
    domain: ClassVar[Any] = ANGLES

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"expected at least one bin, got bins={self.bins}")

    @property
    def count(self) -> int:
        return 3 * self.bins + 1

    def __call__(self, params: Tensor) -> CircularRationalQuadraticTransform:
        return CircularRationalQuadraticTransform(params[0], params[1:])
