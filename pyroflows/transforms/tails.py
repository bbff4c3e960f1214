"""Scalar maps that make tails light or heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyroflows.transforms.base import Transform
from pyroflows.transforms.elementwise import FixedTransform, signed


@dataclass(eq=False)
class LOFTTransform(FixedTransform):
    r"""Log soft extension: the identity up to a threshold, logarithmic tails beyond it.

    .. math::

        y = \operatorname{sgn}(x) \left(\min(|x|, \tau) + \log(1 + \max(|x| - \tau, 0))\right)

    Towards the data end of a deep stack it keeps draws far out from overflowing, which makes
    variational inference in thousands of dimensions stable; an affine layer after it brings back
    the scale. The inverse grows exponentially beyond the threshold.

    Parameters
    ----------
    threshold
        The threshold :math:`\tau > 0`.

    References
    ----------
    Andrade, "Stable training of normalizing flows for high-dimensional variational inference",
    2024.

    Examples
    --------
    >>> LOFTTransform(threshold=10.0)(torch.tensor([-5.0, 10.0, 1e4]))
    tensor([-5.0000, 10.0000, 19.2094])
    """

    threshold: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0:
            raise ValueError(f"threshold: expected a positive number, got {self.threshold}")

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size, excess = self._split(x)
        log_excess = excess.log1p()
        return signed(size + log_excess, x), -log_excess

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        size, excess = self._split(y)
        return signed(size + excess.expm1(), y), excess

    def _split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The size up to the threshold, and the rest of it."""
        size = signed(value, value)
        excess = (size - self.threshold).relu()
        return size - excess, excess


class HeavyTailTransform(Transform):
    r"""Heavy tails from normal ones, each side with a tail index of its own.

    .. math:: y = \operatorname{sgn}(x) \sqrt{\frac{e^{\lambda x^2} - 1}{\lambda}}

    A standard normal :math:`x` becomes a :math:`y` with tails
    :math:`P(|y| > t) \sim t^{-1/\lambda}`, as those of a generalised Pareto distribution of shape
    :math:`\lambda` and close to a Student-t distribution with :math:`1/\lambda` degrees of freedom.
    Small indices lead to the identity. Twice continuously differentiable; forward values overflow
    float32 where :math:`\lambda x^2 > 176`, the log-derivative does not.

    Parameters
    ----------
    left, right
        Tail indices :math:`\lambda > 0` below and above zero, broadcast against the points.

    References
    ----------
    Wallace, "Bounds on normal approximations to Student's and the chi-square distributions", Annals
    of Mathematical Statistics 1959 (the inverse of this map); Hickling and Prangle, "Flexible tails
    for normalizing flows", 2024 (tail indices per side, at the data end of a flow).

    Examples
    --------
    >>> tails = HeavyTailTransform(torch.tensor(1e-6), torch.tensor(0.5))
    >>> tails(torch.tensor([-5.0, -1.0, 1.0, 5.0]))
    tensor([ -5.0000,  -1.0000,   1.1391, 732.5795])
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def _index(self, value: Tensor) -> Tensor:
        return torch.where(value < 0, self.left, self.right)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exponent = self._index(x) * x.square()
        log_stretch = _log_stretch(exponent)
        return x * log_stretch.exp(), exponent - log_stretch

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        exponent = (self._index(y) * y.square()).log1p()
        log_stretch = _log_stretch(exponent)
        return y * (-log_stretch).exp(), log_stretch - exponent


def _log_stretch(u: Tensor) -> Tensor:
    """Half the logarithm of ``expm1(u) / u``, for ``u >= 0``."""
    small = u < 0.1
    # Each branch gets what it can digest, so that no gradient is infinite times zero.
    near, far = u.masked_fill(~small, 0.0), u.masked_fill(small, 1.0)
    series = near / 2 + near**2 / 24 - near**4 / 2880 + near**6 / 181440
    return torch.where(small, series, far + (-(-far).expm1() / far).log()) / 2


@dataclass(frozen=True)
class HeavyTails:
    """Recipe of heavy tails with learned indices, two raw parameters per feature: left and right.

    For the data end of a flow, in an `pyroflows.layers.ElementwiseLayer`. A normal base and layers
    that are straight lines far out cannot make such tails. Starts close to the identity for small
    ``index``, but never at it: the index stays positive.

    Parameters
    ----------
    index
        Tail index to start from, the reciprocal of the degrees of freedom.
    max_index
        Upper limit of the index. From one on not even the mean exists.
    """

    index: float = 0.1
    max_index: float = 1.0
    count: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 < self.index < self.max_index:
            raise ValueError(
                f"expected 0 < index < max_index, got index={self.index}, "
                f"max_index={self.max_index}"
            )

    def __call__(self, params: Tensor) -> HeavyTailTransform:
        start = math.log(self.index / (self.max_index - self.index))
        left, right = self.max_index * (params + start).sigmoid()
        return HeavyTailTransform(left, right)
