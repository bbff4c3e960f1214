"""Any Pyro distribution as a base."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import Transform as TorchTransform

from pyroflows.distributions.bases import Base
from pyroflows.errors import ShapeError


class DistributionBase(Base):
    """A Pyro distribution that is handed in, or a function from contexts to one, as a base.

    The tensors of a distribution become buffers: they move and change dtype with the flow, are
    stored in its state, and do not train (parameters are taken as constants). A function is called
    with the context at every use; if it is an ``nn.Module``, its parameters train with the flow's.
    Its context is that of the layers, standardised where the flow standardises contexts. Values
    are not validated: a NaN gives NaN.

    Such a flow is stored by ``torch.save(flow.state_dict(), path)``; `pyroflows.save` raises
    `TypeError`, for its file describes only what pyroflows can build by itself.

    Parameters
    ----------
    distribution
        A Pyro distribution of batch shape ``()``, or a function ``context -> distribution`` of
        batch shape ``()`` or that of the context (which is None for a flow without).
    event_shape
        For a function, the event shape of what it gives; an integer for a vector.

    Raises
    ------
    TypeError
        For what is neither a Pyro distribution nor a function.
    ValueError
        For a function without an event shape.
    ShapeError
        For a distribution with a batch, or of another event shape than was said.

    Examples
    --------
    >>> gumbel = pyro.distributions.Gumbel(torch.zeros(2), 1.0).to_event(1)
    >>> pf.Flow([pf.layers.LULinear(2)], 2, base=DistributionBase(gumbel)).base.event_shape
    torch.Size([2])
    >>> def shifted(context):
    ...     return pyro.distributions.Normal(context[..., :2], 1.0).to_event(1)
    >>> flow = pf.NSF(2, context=3, base=DistributionBase(shifted, event_shape=2))
    >>> flow(torch.zeros(7, 3)).batch_shape
    torch.Size([7])
    """

    def __init__(
        self,
        distribution: Distribution | Callable[[Tensor | None], Distribution],
        event_shape: int | Sequence[int] | None = None,
    ) -> None:
        if isinstance(distribution, Distribution):
            event_shape = distribution.event_shape if event_shape is None else event_shape
        elif not callable(distribution):
            raise TypeError(
                "distribution: expected a Pyro distribution, or a function from contexts to one, "
                f"got {distribution!r}"
            )
        if event_shape is None:
            raise ValueError("event_shape: expected the event shape of what the function gives")
        super().__init__(event_shape)
        self.distribution: Any = distribution
        if isinstance(distribution, Distribution):
            self._check(distribution, torch.Size())
            self.distribution = _mapped(distribution, self._hold)

    def forward(self, context: Tensor | None = None) -> Any:
        if isinstance(self.distribution, Distribution):
            return _mapped(self.distribution, self._held)
        distribution = self.distribution(context)
        self._check(distribution, torch.Size() if context is None else context.shape[:-1])
        return _mapped(distribution, lambda _, tensor: tensor)

    def _check(self, distribution: Any, batch: torch.Size) -> None:
        if not isinstance(distribution, TorchDistributionMixin):
            raise TypeError(
                f"expected a Pyro distribution, got {distribution!r}: pyro.distributions has "
                "torch's distributions under the same names"
            )
        if distribution.event_shape != self.event_shape:
            raise ShapeError(
                f"base: expected event shape {tuple(self.event_shape)}, got "
                f"{tuple(distribution.event_shape)}. Give the distribution's own."
            )
        if distribution.batch_shape not in (torch.Size(), batch):
            allowed = " or ".join({str(tuple(shape)): 0 for shape in (torch.Size(), batch)})
            raise ShapeError(
                f"base: expected batch shape {allowed}, got {tuple(distribution.batch_shape)}. "
                "Batch dimensions that belong to the event are made so by .to_event(n)."
            )

    def _hold(self, path: str, tensor: Tensor) -> _Slot:
        """The tensor as a buffer, and a mark in its place."""
        self.register_buffer(path, tensor.detach().clone())
        return _Slot()

    def _held(self, path: str, slot: _Slot) -> Tensor:
        return self.get_buffer(path)


class _Slot:
    """Marks where a tensor was."""


def _mapped(
    value: Any,
    function: Callable[[str, Any], Any],
    path: str = "held",
    done: dict[int, Any] | None = None,
) -> Any:
    """A copy of a distribution with each tensor, found at its path, given to a function."""
    done = {} if done is None else done
    if isinstance(value, (Tensor, _Slot)):
        return function(path, value)
    if type(value) in (list, tuple):
        items = [_mapped(item, function, f"{path}/{i}", done) for i, item in enumerate(value)]
        return type(value)(items)
    if not isinstance(value, (Distribution, TorchTransform)):
        # A transform's weak reference leads to an inverse that knows the old tensors.
        return None if isinstance(value, weakref.ref) else value
    # A transform and its inverse may refer to each other.
    if id(value) not in done:
        copied: Any = type(value).__new__(type(value))
        done[id(value)] = copied
        for name, item in vars(value).items():
            copied.__dict__[name] = _mapped(item, function, f"{path}/{name}", done)
        if isinstance(copied, Distribution):
            copied._validate_args = False
    return done[id(value)]
