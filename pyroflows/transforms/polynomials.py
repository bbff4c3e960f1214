"""Increasing polynomials on a box, straight beyond it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import mul

import torch
from torch import Tensor

from pyroflows.numerics import legendre_rule, soft_clamp, straight_tails
from pyroflows.transforms.increasing import IncreasingTransform
from pyroflows.transforms.monotonic import IntegralTransform

# The least slope, and the least share of a coefficient's even increment.
MIN_SLOPE = 1e-3
# Bound of a sum of squares' coefficients.
MAX_COEFFICIENT = 2.0


class SumOfSquaresTransform(IntegralTransform):
    r"""Integral of a sum of squared polynomials.

    .. math::

        y = t + b \int_0^{x/b} p(u)^2 + (1 - u^2)\, q(u)^2\, du, \qquad
        p = \sum_{j=0}^n \alpha_j T_j, \quad q = \sum_{j=1}^n \beta_j U_{j-1}

    with Chebyshev's polynomials of the first and second kind. By a theorem of Lukacs, every
    polynomial of degree :math:`2n` that is not negative on the box is such a sum; a small constant
    keeps it positive. The integral is exact by Gauss's rule.

    Parameters
    ----------
    shift
        The tensor :math:`t`.
    first, second
        Coefficients of the two polynomials, ``(degree + 1, ...)`` and ``(degree, ...)``.
    bound
        Half-width of the box.
    """

    def __init__(self, shift: Tensor, first: Tensor, second: Tensor, bound: float) -> None:
        super().__init__(shift, bound, nodes=len(first))
        self.first = first
        self.second = second

    def slope(self, u: Tensor) -> Tensor:
        p, before = _clenshaw(self.first, u)
        p = self.first[0] + u * p - before
        q, before = _clenshaw(self.second, u)
        q = self.second[0] + 2 * u * q - before
        return MIN_SLOPE + (1 - MIN_SLOPE) * (p**2 + (1 - u) * (1 + u) * q**2)


def _clenshaw(coefficients: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The last two sums of Clenshaw's recurrence, but for the constant term."""
    twice = 2 * u
    now = before = torch.zeros_like(u)
    for coefficient in reversed(coefficients[1:].unbind(0)):
        now, before = coefficient + twice * now - before, now
    return now, before


@dataclass(frozen=True)
class SumOfSquares:
    r"""Recipe of the integral of a sum of squared polynomials.

    A polynomial of degree ``2 * degree + 1`` on the box, ``2 * degree + 2`` raw parameters per
    feature. Zeros give the identity, since :math:`T_n^2 + (1 - u^2) U_{n-1}^2 = 1`, and there every
    positive polynomial slope nearby is reached by a small step. The inverse is found as a root.
    Beyond the box the map goes on along its tangents.

    Parameters
    ----------
    degree
        Of the polynomial that is squared.
    bound
        Half-width of the box.

    References
    ----------
    Jaini, Selby and Yu, "Sum-of-squares polynomial flow", ICML 2019.
    """

    degree: int = 6
    bound: float = 3.0

    def __post_init__(self) -> None:
        if self.degree < 1 or not 0 < self.bound < math.inf:
            raise ValueError(
                f"expected a degree of at least one and a positive bound, got "
                f"degree={self.degree}, bound={self.bound}"
            )
        legendre_rule(self.degree + 1)

    @property
    def count(self) -> int:
        return 2 * self.degree + 2

    def __call__(self, params: Tensor) -> SumOfSquaresTransform:
        shift, raw = params[0], soft_clamp(params[1:], MAX_COEFFICIENT)
        first, second = raw.split([self.degree + 1, self.degree])
        first, second = (torch.cat([c[:-1], 1 + c[-1:]]) for c in (first, second))
        return SumOfSquaresTransform(shift, first, second, self.bound)


class BernsteinTransform(IncreasingTransform):
    r"""Polynomial in Bernstein's form with increasing coefficients, the identity beyond the box.

    .. math:: y = \sum_{k=0}^n \beta_k \binom{n}{k} u^k (1 - u)^{n - k}, \qquad u = \frac{x + b}{2b}

    The increments of the coefficients are proportional to a softmax, all but the first and the last
    one: so the box is mapped onto itself, with slope one at both ends.

    Parameters
    ----------
    raw
        Raw increments, shape ``(degree - 2, ...)``.
    bound
        Half-width of the box.
    """

    def __init__(self, raw: Tensor, bound: float) -> None:
        super().__init__()
        self.raw = raw
        self.bound = bound

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return straight_tails(self._inside, x, self.bound)

    def _increments(self) -> Tensor:
        """Shares of the height of the box, ``(..., degree)``."""
        raw = self.raw.movedim(0, -1)
        inner, degree = raw.shape[-1], raw.shape[-1] + 2
        shares = raw.softmax(-1)
        shares = shares + MIN_SLOPE * (1 / inner - shares)
        edge = torch.full_like(raw[..., :1], 1 / degree)
        return torch.cat([edge, (1 - 2 / degree) * shares, edge], -1)

    def _inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        increments = self._increments()
        degree = increments.shape[-1]
        right, left = (self.bound + x) / (2 * self.bound), (self.bound - x) / (2 * self.bound)
        basis = _bernstein(left, right, degree - 1)
        # One step of de Casteljau's takes the coefficients down to the degree of the slope.
        start = increments.cumsum(-1) - increments
        height = (basis * (start + right.unsqueeze(-1) * increments)).sum(-1)
        return self.bound * (2 * height - 1), (degree * (basis * increments).sum(-1)).log()


def _bernstein(left: Tensor, right: Tensor, degree: int) -> Tensor:
    """Bernstein's polynomials of one degree at ``right = 1 - left``: ``(..., degree + 1)``."""
    one = torch.ones_like(left)
    rising = list(accumulate(repeat(right, degree), mul, initial=one))
    falling = list(accumulate(repeat(left, degree), mul, initial=one))
    terms = [
        math.comb(degree, k) * up * down
        for k, (up, down) in enumerate(zip(rising, reversed(falling), strict=True))
    ]
    return torch.stack(terms, -1)


@dataclass(frozen=True)
class Bernstein:
    """Recipe of a polynomial in Bernstein's form, ``degree - 2`` raw parameters per feature.

    Zeros give the identity, and beyond the box it is always the identity. The inverse is found as a
    root.

    Parameters
    ----------
    degree
        Of the polynomial, at least 3.
    bound
        Half-width of the box.

    References
    ----------
    Ramasinghe, Fernando, Khan and Barnes, "Robust normalizing flows using Bernstein-type
    polynomials", BMVC 2022.
    """

    degree: int = 16
    bound: float = 3.0

    def __post_init__(self) -> None:
        if self.degree < 3 or not 0 < self.bound < math.inf:
            raise ValueError(
                f"expected a degree of at least 3 and a positive bound, got degree={self.degree}, "
                f"bound={self.bound}"
            )

    @property
    def count(self) -> int:
        return self.degree - 2

    def __call__(self, params: Tensor) -> BernsteinTransform:
        return BernsteinTransform(params, self.bound)
