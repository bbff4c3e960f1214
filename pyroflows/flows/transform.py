"""The module that owns a flow's layers and is itself a Pyro transform."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import ContextError, check_dtype, check_event
from pyroflows.layers import ActNorm, Layer, Standardization
from pyroflows.transforms import ComposedTransform, Transform


class FlowTransform(Transform, TransformModule):
    """Layers in a row, from base to data, as one Pyro ``TransformModule``.

    It owns the parameters and can stand wherever Pyro takes a transform: in
    ``dist.TransformedDistribution``, in ``AutoNormalizingFlow``. With a context,
    ``condition(context)`` gives the transform. The layers work in standardised units; the buffers
    of ``standardization`` and ``context_standardization`` lead to the user's.

    Parameters
    ----------
    layers
        Layers from base to data.
    event_shape
        Shape of the event.
    context
        Size of the context (0: none).
    """

    def __init__(
        self, layers: Iterable[Layer], event_shape: Sequence[int], context: int = 0
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.context_size = context
        self.layers = nn.ModuleList(layers)
        self.standardization = Standardization(self.event_shape)
        self.context_standardization = Standardization((context,)) if context else None

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.domain

    @property
    def sequential_forward(self) -> bool:  # type: ignore[override]
        return self.condition(self._any_context()).sequential_forward

    @property
    def sequential_inverse(self) -> bool:  # type: ignore[override]
        return self.condition(self._any_context()).sequential_inverse

    def _any_context(self) -> Tensor | None:
        return None if self.context_standardization is None else self.context_standardization.loc

    def check_context(self, context: Tensor | None) -> None:
        """Raise unless the context is what the layers expect."""
        if self.context_size == 0 and context is not None:
            raise ContextError(
                f"got a context of shape {tuple(context.shape)}, but the flow has none. "
                "Construct it with context=<size of the context>."
            )
        if self.context_size and context is None:
            raise ContextError(
                f"expected a context of shape (*batch, {self.context_size}), got none. Call "
                "flow(context), or flow.transform.condition(context) for the transform alone."
            )
        if context is not None:
            check_event("context", context, (self.context_size,))
            check_dtype("context", context, self.standardization.loc.dtype)

    def condition(self, context: Tensor | None = None) -> ComposedTransform:
        """The transform under a context of shape ``(*batch, context)``, made afresh."""
        self.check_context(context)
        context = self._standardized(context)
        parts = [layer(context) for layer in (*self.layers, self.standardization)]
        return ComposedTransform(parts)

    def _standardized(self, context: Tensor | None) -> Tensor | None:
        if context is None or self.context_standardization is None:
            return context
        return self.context_standardization().inv(context)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.condition().call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.condition().inverse_and_ladj(y)

    def detach_params(self, keep_context: bool = False) -> ComposedTransform:
        return self.condition().detach_params(keep_context)

    @torch.no_grad()
    def initialize_(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initialise what depends on data (ActNorm), layer by layer from data to base."""
        self.check_context(context)
        context = self._standardized(context)
        y = self.standardization().inv(y)
        for layer in reversed(self.layers):
            if isinstance(layer, ActNorm):
                layer.initialize_(y)
            y = layer(context).inv(y)
