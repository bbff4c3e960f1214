"""The module that owns a flow's layers and is itself a Pyro transform."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import ContextError, check_dtype, check_event
from pyroflows.layers import (
    Inverse,
    Layer,
    LowRankWhitening,
    Sequential,
    Standardization,
    ToSupport,
    Whitening,
)
from pyroflows.layers.composition import as_layer
from pyroflows.nn import ZeroStart
from pyroflows.transforms import ComposedTransform, Transform


class FlowTransform(Transform, TransformModule):
    """Layers in a row, from base to data, as one Pyro ``TransformModule``.

    It owns the parameters and can stand wherever Pyro takes a transform: in
    ``dist.TransformedDistribution``, in ``AutoNormalizingFlow``. With a context,
    ``condition(context)`` gives the transform. The layers work in standardised units; the buffers
    of ``standardization`` and ``context_standardization`` lead to the user's. What leads from real
    vectors to a support comes after the standardization.

    Parameters
    ----------
    layers
        Layers, torch and Pyro bijections, lists of these: from base to data.
    event_shape
        Shape of the base's event.
    context
        Size of the context (0: none).
    support
        Constraint on the data, or a sequence with one for each column; None for the whole space.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        event_shape: Sequence[int],
        context: int = 0,
        support: Any = None,
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.context_size = context
        self.layers = nn.ModuleList(as_layer(layer) for layer in layers)
        self.to_support = None if support is None else ToSupport(support)
        self.standardization: Standardization = Standardization(self.event_shape)
        self.context_standardization = Standardization((context,)) if context else None
        self._place = self._place_of_standardization()

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.condition(self.any_context()).codomain

    @property
    def sequential_forward(self) -> bool:  # type: ignore[override]
        return self.condition(self.any_context()).sequential_forward

    @property
    def sequential_inverse(self) -> bool:  # type: ignore[override]
        return self.condition(self.any_context()).sequential_inverse

    def any_context(self) -> Tensor | None:
        """Some context of the right size, or None."""
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
        context = self.standardized(context)
        return ComposedTransform([layer(context) for layer in self._stack()])

    def _steps(self) -> list[Layer]:
        """All layers from base to data but the standardization, without nesting."""
        layers = [step for layer in self.layers for step in _flat(layer)]
        return layers if self.to_support is None else [*layers, self.to_support]

    def _stack(self) -> list[Layer]:
        steps = self._steps()
        return [*steps[: self._place], self.standardization, *steps[self._place :]]

    @torch.no_grad()
    def _place_of_standardization(self) -> int:
        """Before the first layer that leaves the real vectors; raises where layers do not fit."""
        context, shape, place = self.any_context(), self.event_shape, None
        steps = self._steps()
        for number, layer in enumerate(steps):
            _check_sizes(layer, shape, self.context_size, f"layer {number}")
            transform = layer(context)
            if place is None and _leaves_the_reals(transform):
                place = number
            shape = _forward_shape(transform, shape, f"layer {number} ({type(layer).__name__})")
        return len(steps) if place is None else place

    def unconstrain(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Data as the real numbers that ``standardization`` describes."""
        self.check_context(context)
        context = self.standardized(context)
        after = [layer(context) for layer in self._steps()[self._place :]]
        return ComposedTransform(after).inverse_and_ladj(y)[0]

    def whiten_(self, rank: int | None = None) -> Whitening | LowRankWhitening:
        """Give the standardization of a vector event correlations; location and scale stay.

        In every direction, or in so many where a rank is given that is below the features.
        """
        if len(self.event_shape) != 1:
            raise ValueError(f"whiten_: expected a vector event, got {tuple(self.event_shape)}")
        before, (features,) = self.standardization, self.event_shape
        whitening: Whitening | LowRankWhitening
        if rank is None or rank == features:
            whitening = Whitening(features)
        else:
            whitening = LowRankWhitening(features, rank)
        whitening.to(before.loc).set_(before.loc, before.scale)
        self.standardization = whitening
        return whitening

    def forward_shape(self, shape: Iterable[int]) -> torch.Size:
        return self.condition(self.any_context()).forward_shape(shape)

    def inverse_shape(self, shape: Iterable[int]) -> torch.Size:
        return self.condition(self.any_context()).inverse_shape(shape)

    def standardized(self, context: Tensor | None) -> Tensor | None:
        """The context as layers and base get it."""
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
        """Initialise what depends on data, layer by layer from data to base."""
        self.check_context(context)
        context = self.standardized(context)
        for module in self.modules():
            if isinstance(module, ZeroStart):
                module.widen_(len(y))
        for layer in reversed(self._stack()):
            layer.initialize_(y)
            y = layer(context).inv(y)


def _flat(layer: Any) -> list[Layer]:
    if not isinstance(layer, Sequential):
        return [layer]
    return [step for part in layer.layers for step in _flat(part)]


def _leaves_the_reals(transform: Any) -> bool:
    # What torch composes ends in an affine map, whose codomain tells nothing of the part before.
    parts = getattr(transform, "parts", [])
    return not is_real(transform.codomain) or any(map(_leaves_the_reals, parts))


def is_real(constraint: Any) -> bool:
    """Whether a constraint leaves the whole space, of whatever shape."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


def _check_sizes(layer: Layer, shape: torch.Size, context: int, where: str) -> None:
    """Raise unless a layer was made for events of this shape and a context of this size."""
    while isinstance(layer, Inverse):
        layer = layer.layer
    where = f"{where} ({type(layer).__name__})"
    features = layer.arguments.get("features")
    if isinstance(features, int) and len(shape) == 1 and shape[0] != features:
        raise ValueError(
            f"{where}: made for {features} features, but events of shape {tuple(shape)} reach it"
        )
    of_layer = layer.arguments.get("context", 0)
    if isinstance(of_layer, int) and of_layer not in (0, context):
        raise ValueError(
            f"{where}: made for a context of size {of_layer}, but the flow's has size {context}"
        )


def _forward_shape(transform: Any, shape: torch.Size, where: str) -> torch.Size:
    """The shape of the events that leave a transform; raises unless it takes those that come."""
    needed = transform.domain.event_dim
    if needed > len(shape):
        raise ValueError(
            f"{where}: maps events of {needed} dimensions, but events of shape {tuple(shape)} "
            "reach it. Give the flow a larger event_shape."
        )
    try:
        mapped = torch.Size(transform.forward_shape(shape))
        back = torch.Size(transform.inverse_shape(mapped))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: cannot map events of shape {tuple(shape)} ({error})") from error
    if back != shape:
        raise ValueError(
            f"{where}: maps events of shape {tuple(back)}, but events of shape {tuple(shape)} "
            "reach it"
        )
    return mapped
