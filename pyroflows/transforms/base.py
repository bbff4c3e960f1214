"""The contract of an invertible map: value and log-determinant together, in both directions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from functools import reduce, singledispatch
from operator import add
from typing import Any

import torch
from pyro.distributions.util import detach
from torch import Tensor
from torch.distributions import constraints
from torch.distributions import transforms as torch_transforms

from pyroflows.numerics import sum_rightmost


class Transform(torch_transforms.Transform):
    """An invertible map that holds its parameter tensors, with fused passes.

    *Forward* is base to data (sampling), *inverse* is data to base (scoring). A subclass holds
    tensors, other transforms and conditioners as plain attributes and implements

    - ``call_and_ladj(x)``: the value ``y`` and ``log|det dy/dx|``;
    - ``inverse_and_ladj(y)``: the value ``x`` and ``log|det dx/dy|``.

    Everything else follows. Log-determinants have the shape of the value without its event
    dimensions, in nats. Nothing is remembered between calls, and there is no cache to clear.
    """

    bijective = True
    domain: Any = constraints.real
    codomain: Any = constraints.real
    sign = +1
    #: Whether a direction takes one step per feature instead of one pass.
    sequential_forward = False
    sequential_inverse = False

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The forward value and ``log|det dy/dx|``, from one pass."""
        raise NotImplementedError(f"{type(self).__name__} has no forward direction")

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse value and ``log|det dx/dy|``, from one pass."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse direction")

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` at ``x`` or, where that is cheaper, at ``y``."""
        if self.sequential_forward and not self.sequential_inverse:
            return -self.inverse_and_ladj(y)[1]
        return self.call_and_ladj(x)[1]

    @property
    def inv(self) -> torch_transforms.Transform:
        """The inverse transform; it has ``call_and_ladj`` too."""
        return InverseTransform(self)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """The transform itself: there is nothing to cache."""
        return self

    def detach_params(self, keep_context: bool = False) -> Transform:
        """The same map with its parameters and, unless it is kept, its context as constants."""
        constant_self = copy.copy(self)
        for name, value in vars(self).items():
            setattr(constant_self, name, constant(value, keep_context))
        return constant_self


@singledispatch
def constant(value: Any, keep_context: bool = False) -> Any:
    """A copy of ``value`` that gradients do not reach, except through arguments of calls."""
    return value.detach_params(keep_context) if hasattr(value, "detach_params") else value


@constant.register
def _(value: Tensor, keep_context: bool = False) -> Tensor:
    return value.detach()


@constant.register
def _(value: torch_transforms.Transform, keep_context: bool = False) -> torch_transforms.Transform:
    if isinstance(value, Transform):
        return value.detach_params(keep_context)
    # A foreign transform may keep its parameters anywhere.
    copied: torch_transforms.Transform = detach(value)
    return copied


@constant.register(torch_transforms.IndependentTransform)
def _(value: Any, keep_context: bool = False) -> torch_transforms.Transform:
    inner = constant(value.base_transform, keep_context)
    return torch_transforms.IndependentTransform(inner, value.reinterpreted_batch_ndims)


class InverseTransform(Transform):
    """A transform with its two directions exchanged."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return self.transform.codomain

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.transform.domain

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return self.transform.bijective

    @property
    def sign(self) -> Any:  # type: ignore[override]
        return self.transform.sign

    @property
    def sequential_forward(self) -> bool:  # type: ignore[override]
        return self.transform.sequential_inverse

    @property
    def sequential_inverse(self) -> bool:  # type: ignore[override]
        return self.transform.sequential_forward

    @property
    def inv(self) -> torch_transforms.Transform:
        return self.transform

    def _call(self, x: Tensor) -> Tensor:
        return self.transform._inverse(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform._call(y)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(y)

    def forward_shape(self, shape: Iterable[int]) -> torch.Size:
        return torch.Size(self.transform.inverse_shape(shape))

    def inverse_shape(self, shape: Iterable[int]) -> torch.Size:
        return torch.Size(self.transform.forward_shape(shape))


class ComposedTransform(Transform):
    """Transforms in a row, forward from the first to the last, each evaluated once.

    Foreign torch and Pyro transforms are welcome among the parts; they cost one call for the value
    and another for the log-determinant.

    Parameters
    ----------
    parts
        The transforms; none is the identity.
    """

    def __init__(self, parts: Iterable[torch_transforms.Transform]) -> None:
        super().__init__()
        self.parts = list(parts)
        # The event must be large enough for every part; what a part sees as batch is summed.
        needed, shifts, shift = 0, [], 0
        for part in self.parts:
            domain_dim = part.domain.event_dim
            needed = max(needed, domain_dim - shift)
            shifts.append(shift - domain_dim)
            shift += part.codomain.event_dim - domain_dim
        self._summed = [needed + s for s in shifts]
        if self.parts:
            self.domain = _lifted(self.parts[0].domain, needed)
            self.codomain = _lifted(self.parts[-1].codomain, needed + shift)

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return all(part.bijective for part in self.parts)

    @property
    def sign(self) -> Any:  # type: ignore[override]
        return math.prod(part.sign for part in self.parts)

    @property
    def sequential_forward(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "sequential_forward", False) for part in self.parts)

    @property
    def sequential_inverse(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "sequential_inverse", False) for part in self.parts)

    def _call(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.inv(y)
        return y

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.parts:
            return x, torch.zeros_like(x)
        ladjs = []
        for part, summed in zip(self.parts, self._summed, strict=True):
            x, ladj = call_and_ladj(part, x)
            ladjs.append(sum_rightmost(ladj, summed))
        return x, _sum(ladjs)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if not self.parts:
            return y, torch.zeros_like(y)
        ladjs = []
        for part, summed in zip(reversed(self.parts), reversed(self._summed), strict=True):
            y, ladj = inverse_and_ladj(part, y)
            ladjs.append(sum_rightmost(ladj, summed))
        return y, _sum(ladjs)

    def forward_shape(self, shape: Iterable[int]) -> torch.Size:
        for part in self.parts:
            shape = part.forward_shape(shape)
        return torch.Size(shape)

    def inverse_shape(self, shape: Iterable[int]) -> torch.Size:
        for part in reversed(self.parts):
            shape = part.inverse_shape(shape)
        return torch.Size(shape)

    def detach_params(self, keep_context: bool = False) -> ComposedTransform:
        return ComposedTransform([constant(part, keep_context) for part in self.parts])


def _sum(ladjs: list[Tensor]) -> Tensor:
    # Not from a zero on, whose sum with the first would be recorded too.
    return reduce(add, ladjs)


def _lifted(constraint: Any, event_dim: int) -> Any:
    """The constraint on events of at least ``event_dim`` dimensions."""
    extra = event_dim - constraint.event_dim
    return constraints.independent(constraint, extra) if extra else constraint


def call_and_ladj(transform: torch_transforms.Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward value and log-determinant of any torch transform, fused where it can be."""
    if hasattr(transform, "call_and_ladj"):
        return transform.call_and_ladj(x)
    if isinstance(transform, torch_transforms.IndependentTransform):
        y, ladj = call_and_ladj(transform.base_transform, x)
        return y, sum_rightmost(ladj, transform.reinterpreted_batch_ndims)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inverse_and_ladj(transform: torch_transforms.Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse value and its log-determinant of any torch transform, fused where it can be."""
    if hasattr(transform, "inverse_and_ladj"):
        return transform.inverse_and_ladj(y)
    if isinstance(transform, torch_transforms.IndependentTransform):
        x, ladj = inverse_and_ladj(transform.base_transform, y)
        return x, sum_rightmost(ladj, transform.reinterpreted_batch_ndims)
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)
