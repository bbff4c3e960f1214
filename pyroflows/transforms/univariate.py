"""Scalar bijections whose parameters a conditioner gives, and the recipes that name them.

A *recipe* (`Additive`, `Affine`, and the splines beside this module) knows how many raw parameters
a feature needs and turns a tensor of shape ``(count, *batch, features)`` into an elementwise
transform. Raw parameters of zero always give the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics.affine import bounded_affine
from pyroflows.transforms.base import Transform


class ShiftTransform(Transform):
    r"""Translation, :math:`y = x + t`."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.shift
        return y, torch.zeros_like(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y - self.shift
        return x, torch.zeros_like(x)


class AffineTransform(Transform):
    r"""Affine map with a positive slope, :math:`y = x\,e^{s} + t`.

    Parameters
    ----------
    shift, log_scale
        The tensors :math:`t` and :math:`s`, broadcast against the points.

    Examples
    --------
    >>> AffineTransform(torch.tensor(1.0), torch.tensor(0.0))(torch.tensor(2.0))
    tensor(3.)
    """

    def __init__(self, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.shift = shift
        self.log_scale = log_scale

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.log_scale.exp() + self.shift
        return y, self.log_scale.expand(y.shape)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.shift) * (-self.log_scale).exp()
        return x, -self.log_scale.expand(x.shape)


class Univariate(Protocol):
    """What a coupling or autoregressive layer asks of a univariate recipe.

    A recipe that maps a part of the real line onto itself has the constraint on it as ``domain``.
    """

    @property
    def count(self) -> int:
        """Raw parameters per feature."""
        ...

    def __call__(self, params: Tensor) -> Transform:
        """Raw parameters ``(count, *batch, features)`` to an elementwise transform."""
        ...


def vector_domain(univariate: Univariate) -> Any:
    """The constraint on vectors of what a recipe maps, which is also that on its values."""
    return constraints.independent(getattr(univariate, "domain", constraints.real), 1)


@dataclass(frozen=True)
class Additive:
    """Recipe of a translation: volume preserving, one raw parameter per feature."""

    count: ClassVar[int] = 1

    def __call__(self, params: Tensor) -> ShiftTransform:
        return ShiftTransform(params[0])


@dataclass(frozen=True)
class Affine:
    r"""Recipe of an affine map, two raw parameters per feature.

    Parameters
    ----------
    max_log_scale
        Smooth bound :math:`c` of the log-scale. A small bound keeps draws far out from being thrown
        further by every layer, which is what makes deep stacks diverge; scales beyond it are the
        business of several layers, or of linear ones.
    """

    max_log_scale: float = 2.0
    count: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.max_log_scale > 0:
            raise ValueError(f"max_log_scale: expected a positive bound, got {self.max_log_scale}")

    def __call__(self, params: Tensor) -> Transform:
        return _BoundedAffineTransform(params, self.max_log_scale)


class _BoundedAffineTransform(Transform):
    """An affine map of raw parameters ``(2, ...)``, whose gradient is analytic."""

    def __init__(self, params: Tensor, bound: float) -> None:
        super().__init__()
        self.params = params
        self.bound = bound

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return bounded_affine(x, self.params, self.bound)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return bounded_affine(y, self.params, self.bound, inverse=True)
