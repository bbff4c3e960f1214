"""Layers made of other layers and of foreign bijections, and the one that leads to a support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    rest; what Pyro's own transform cannot do, such as an inverse that is missing, stays missing.

    Parameters
    ----------
    transform
        The bijection.

    Examples
    --------
    >>> from torch.distributions import ExpTransform
    >>> Bijection(ExpTransform())()(torch.zeros(2))
    tensor([1., 1.])
    """

    def __init__(self, transform: torch_transforms.Transform) -> None:
        super().__init__()
        if not isinstance(transform, torch_transforms.Transform) or not transform.bijective:
            raise TypeError(f"transform: expected a torch or Pyro bijection, got {transform!r}")
        self.transform = transform

    def forward(self, context: Tensor | None = None) -> ComposedTransform:
        # One part, for fused passes.
        return ComposedTransform([self.transform])


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
        Layers, and torch or Pyro bijections.

    Examples
    --------
    >>> from torch.distributions import AffineTransform, ExpTransform
    >>> Sequential([AffineTransform(1.0, 2.0), ExpTransform()])()(torch.zeros(2))
    tensor([2.7183, 2.7183])
    """

    def __init__(self, layers: Iterable[Layer | torch_transforms.Transform]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(as_layer(layer) for layer in layers)

    def forward(self, context: Tensor | None = None) -> ComposedTransform:
        return ComposedTransform([layer(context) for layer in self.layers])


def as_layer(layer: Layer | torch_transforms.Transform) -> Layer:
    """The layer itself, or a foreign bijection as one."""
    return layer if isinstance(layer, Layer) else Bijection(layer)


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
    if isinstance(support, Sequence):
        support = constraints.stack(list(support), -1)
    if isinstance(support, constraints.stack):
        columns = [_by_columns(constraint) for constraint in support.cseq]
        wrong = [c for c in columns if getattr(c, "event_dim", 1) or c.is_discrete]
        if support.dim != -1 or wrong:
            raise ValueError(
                f"support: expected a scalar, continuous constraint for each column, got {support}"
            )
        return constraints.stack(columns, -1)
    if type(support) in INTERVALS:
        given = [
            torch.as_tensor(getattr(support, name), dtype=torch.float64)
            for name in INTERVALS[type(support)]
        ]
        bounds = torch.stack(torch.broadcast_tensors(*given), -1)
        if bounds.dim() > 2:
            raise ValueError(f"support: expected bounds that are numbers or vectors, got {support}")
        if bounds.dim() == 1:
            return type(support)(*bounds.tolist())
        return constraints.stack([type(support)(*row) for row in bounds.tolist()], -1)
    if not isinstance(support, constraints.Constraint):
        raise TypeError(f"support: expected a constraint or a sequence of them, got {support!r}")
    return support
