"""Layers made of other layers and of foreign bijections, and the one that leads to a support."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions import transforms as torch_transforms

from pyroflows.layers.base import Layer
from pyroflows.transforms import ColumnsTransform, ComposedTransform, Transform, to_support
from pyroflows.transforms.supports import INTERVALS


class Bijection(Layer):
    """Any torch or Pyro bijection as a layer; `Sequential` and `Flow` wrap such by themselves.

    A ``TransformModule`` (Pyro's splines, couplings and others) has its parameters trained with the
    rest. What can be conditioned, such as another flow's ``flow.transform`` and Pyro's conditional
    transforms, is given the context. A direction that the bijection lacks stays missing.

    Parameters
    ----------
    transform
        The bijection, or a module with ``condition(context)`` that gives one.

    Raises
    ------
    TypeError
        If it is neither.

    Examples
    --------
    >>> from torch.distributions import ExpTransform
    >>> Bijection(ExpTransform())()(torch.zeros(2))
    tensor([1., 1.])
    """

    def __init__(self, transform: Any) -> None:
        super().__init__()
        is_transform = isinstance(transform, torch_transforms.Transform) and transform.bijective
        if not is_transform and not hasattr(transform, "condition"):
            raise TypeError(
                f"expected layers and torch or Pyro bijections, got {transform!r:.200}. Of another "
                "flow, give flow.transform."
            )
        self.transform = transform

    def forward(self, context: Tensor | None = None) -> ComposedTransform:
        # Pyro's modules remember values of their last call: the copy is thrown away with them.
        transform = copy.copy(self.transform)
        if hasattr(transform, "condition"):
            has_context = getattr(transform, "context_size", True)
            transform = transform.condition(context if has_context else None)
        # One part, for fused passes.
        return ComposedTransform([transform])


class Inverse(Layer):
    """A layer with its two directions exchanged.

    Parameters
    ----------
    layer
        A layer, or a torch or Pyro bijection.

    Examples
    --------
    >>> from torch.distributions import ExpTransform
    >>> Inverse(ExpTransform())()(torch.ones(2))
    tensor([0., 0.])
    """

    def __init__(self, layer: Layer | torch_transforms.Transform) -> None:
        super().__init__()
        self.layer = as_layer(layer)

    def forward(self, context: Tensor | None = None) -> Transform:
        inverse: Any = self.layer(context).inv
        return inverse


class Sequential(Layer):
    """Layers in a row, from base to data, as one layer.

    Parameters
    ----------
    layers
        Layers, torch and Pyro bijections, lists of these.

    Examples
    --------
    >>> from torch.distributions import AffineTransform, ExpTransform
    >>> Sequential([AffineTransform(1.0, 2.0), ExpTransform()])()(torch.zeros(2))
    tensor([2.7183, 2.7183])
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(as_layer(layer) for layer in layers)

    def forward(self, context: Tensor | None = None) -> ComposedTransform:
        return ComposedTransform([layer(context) for layer in self.layers])


def as_layer(layer: Any) -> Layer:
    """The layer itself; a foreign bijection, or a list of any of these, as one."""
    if isinstance(layer, Layer):
        return layer
    return Sequential(layer) if isinstance(layer, (list, tuple)) else Bijection(layer)


class ToSupport(Layer):
    """From unconstrained values to a support; no parameters.

    Parameters
    ----------
    support
        A torch or Pyro constraint; a sequence of scalar ones, or ``constraints.stack`` of them,
        holds one for each column.

    Raises
    ------
    ValueError
        If there is no bijection to it from real values.

    Examples
    --------
    >>> layer = ToSupport([constraints.positive, constraints.real, constraints.unit_interval])
    >>> layer()(torch.zeros(3))
    tensor([1.0000, 0.0000, 0.5000])
    """

    order: Tensor
    restore: Tensor

    def __init__(self, support: Any) -> None:
        super().__init__()
        self.support = _by_columns(support)
        self.columns = isinstance(self.support, constraints.stack)
        if not self.columns:
            self.transform = to_support(self.support)
            return
        groups: dict[str, list[int]] = {}
        for column, constraint in enumerate(self.support.cseq):
            groups.setdefault(repr(constraint), []).append(column)
        first = [columns[0] for columns in groups.values()]
        self.parts = [to_support(self.support.cseq[column]) for column in first]
        self.sizes = [len(columns) for columns in groups.values()]
        order = torch.tensor([c for columns in groups.values() for c in columns])
        self.register_buffer("order", order)
        self.register_buffer("restore", order.argsort())

    def forward(self, context: Tensor | None = None) -> torch_transforms.Transform:  # type: ignore[override]
        if not self.columns:
            return self.transform
        return ColumnsTransform(self.parts, self.sizes, self.order, self.restore, self.support)


def _by_columns(support: Any) -> Any:
    """A sequence as ``constraints.stack``, vectors of bounds too, and the rest as it is."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, (list, tuple)):
        support = constraints.stack(list(map(_by_columns, support)), -1)
    if isinstance(support, constraints.stack):
        parts = support.cseq
        if support.dim != -1 or any(part.event_dim for part in parts):
            raise ValueError(f"support: expected a scalar constraint per column, got {parts}")
        return support
    if not isinstance(support, constraints.Constraint):
        raise TypeError(f"support: expected a constraint or a list of them, got {support!r}")
    if type(support) not in INTERVALS:
        return support
    names = INTERVALS[type(support)]
    given = [torch.as_tensor(getattr(support, name), dtype=torch.float64) for name in names]
    bounds = torch.stack(torch.broadcast_tensors(*given), -1)
    if bounds.dim() > 2:
        raise ValueError(f"support: expected bounds that are numbers or vectors, got {support}")
    if bounds.dim() == 1:
        return type(support)(*bounds.tolist())
    return constraints.stack([type(support)(*row) for row in bounds.tolist()], -1)
