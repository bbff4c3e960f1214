"""A flow: a module that gives a distribution, given a context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import Transform as TorchTransform

from pyroflows.distributions import Base, DistributionBase, FlowDistribution, StandardNormal
from pyroflows.flows.transform import FlowTransform, is_real
from pyroflows.nn import RecordedModule


class Flow(RecordedModule):
    r"""Normalizing flow: a base distribution pushed through invertible layers.

    ``flow(context)`` is a `FlowDistribution`, a ``pyro.distributions.TransformedDistribution``;
    ``flow.transform`` is a Pyro ``TransformModule``. *Forward* is base to data.

    Parameters
    ----------
    layers
        Layers, torch and Pyro bijections, lists of these: from base to data.
    event_shape
        Shape of the base's event and, but for supports of another size, of the data; an integer
        for a vector.
    context
        Size of the context (0: none).
    base
        Module that gives the base distribution, or a Pyro distribution, which does not train (see
        `DistributionBase`); by default the standard normal.
    support
        Constraint on the data, or a sequence with one for each column; None for the whole space.
        Values outside have the log density ``-inf``.

    Examples
    --------
    >>> from pyroflows.layers import CouplingLayer, LULinear
    >>> flow = Flow([CouplingLayer(2, context=3), LULinear(2)], 2, context=3)
    >>> flow(torch.zeros(7, 3)).batch_shape
    torch.Size([7])
    """

    def __init__(
        self,
        layers: Iterable[Any],
        event_shape: int | Sequence[int],
        context: int = 0,
        base: Base | Distribution | None = None,
        support: Any = None,
    ) -> None:
        super().__init__()
        shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.context_size = context
        self.transform = FlowTransform(layers, shape, context, support)
        self.event_shape = self.transform.forward_shape(shape)
        base = StandardNormal(shape) if base is None else base
        self.base: Base = DistributionBase(base) if isinstance(base, Distribution) else base
        if not isinstance(self.base, Base):
            raise TypeError(
                "base: expected an instance of a class of pyroflows.distributions or a Pyro "
                f"distribution, got {base!r}"
            )
        if self.base.event_shape != shape:
            raise ValueError(
                f"base: expected event shape {shape}, got {tuple(self.base.event_shape)}"
            )

    @property
    def support(self) -> Any:
        """The constraint on an event."""
        return self.transform.codomain

    def unconstrain(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Data as the real numbers that ``transform.standardization`` describes."""
        return self.transform.unconstrain(x, context)

    def initialize_(self, x: Tensor, context: Tensor | None = None) -> None:
        """Initialise what depends on data (ActNorm), once; the fit functions call it."""
        self.transform.initialize_(x, context)

    @property
    def inv(self) -> TorchTransform:
        """The transform from data to base; ``flow.transform.condition(context).inv`` of another."""
        return self.transform.inv

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the flow's buffers and parameters."""
        return self.transform.standardization.loc.dtype

    @property
    def device(self) -> torch.device:
        """The device of the flow's buffers and parameters."""
        return self.transform.standardization.loc.device

    @property
    def standardizes(self) -> bool:
        """Whether data may be standardised: not for a base on a box, which they would leave."""
        return is_real(self.base(self.transform.any_context()).support)

    def forward(
        self, context: Tensor | None = None, *, context_is_draw: bool = False
    ) -> FlowDistribution:
        """The distribution under a context.

        Parameters
        ----------
        context
            Shape ``(*batch, context)``; the batch becomes the distribution's, each element with
            noise of its own.
        context_is_draw
            In a guide, whether the context is itself a draw; see `FlowDistribution`.

        Raises
        ------
        ContextError, ShapeError, TypeError
            For a context that is missing, not expected, of another size or dtype.
        """
        transform = self.transform.condition(context)
        base = self.base(self.transform.standardized(context))
        if context is not None:
            base = base.expand(context.shape[:-1])
        return FlowDistribution(base, [transform], module=self, context_is_draw=context_is_draw)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's param store leaves weak references on parameters, which cannot be pickled.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()
