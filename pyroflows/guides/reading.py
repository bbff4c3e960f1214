"""What one call of a model shows: its sites, its plates with their indices, and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyroflows.errors import ShapeError

Model = Callable[..., Any]
Frames = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """One call of a model.

    Attributes
    ----------
    sites
        The sample sites without factors and subsampling, by name, in the order of the model.
    indices
        The indices of each plate that has a size; those of the minibatch where it is subsampled.
    """

    sites: Mapping[str, Any]
    indices: Mapping[str, Tensor]

    def frames(self, name: str) -> Frames:
        """The plates around a site by name, from the left dimension to the right.

        Raises
        ------
        NotImplementedError
            For a sequential plate, which has no dimension.
        """
        stack = self.sites[name]["cond_indep_stack"]
        if not all(frame.vectorized for frame in stack):
            raise NotImplementedError(
                f"site {name!r} is in a sequential plate: write the plate as a `with` statement"
            )
        return {frame.name: frame for frame in sorted(stack, key=lambda frame: frame.dim)}

    def plate(self, frame: Any) -> pyro.plate:
        """The same plate for a guide, with the same indices."""
        if frame.name not in self.indices:
            return pyro.plate(frame.name, dim=frame.dim)
        size = frame.size if frame.full_size is None else frame.full_size
        return pyro.plate(frame.name, size, subsample=self.indices[frame.name], dim=frame.dim)

    def data(self, name: str, plates: Sequence[str] = (), value: Tensor | None = None) -> Tensor:
        """The value of an observed site, ``(*plates, *other batch dimensions, *event)``.

        An event without dimensions gets one, of size one. A value given instead, for instance
        simulations, may have more dimensions on the left, and keeps them there.
        """
        node, frames = self.sites[name], self.frames(name)
        fn = node["fn"]
        own = torch.as_tensor(node["value"])
        shape = torch.broadcast_shapes(own.shape, fn.shape())
        value = own.expand(shape) if value is None else value
        if plates and node["infer"].get("_deterministic") and fn.event_dim == own.dim():
            raise ShapeError(
                f"site {name!r}: which dimensions of {tuple(own.shape)} belong to the plates is "
                "not known. Write pyro.deterministic(name, value, event_dim=<of one row>)."
            )
        leading = value.dim() - len(shape)
        batch = value.dim() - fn.event_dim
        first = [batch + frames[plate].dim for plate in plates]
        kept = {batch + frame.dim for frame in frames.values()} | set(range(leading))
        # Dimensions of size one left of a plate or between two only pad.
        rest = [
            d for d in range(leading, batch) if d not in first and (d in kept or value.shape[d] > 1)
        ]
        order = [*range(leading), *first, *rest, *range(batch, value.dim())]
        padding = [d for d in range(batch) if d not in order]
        moved = value.permute((*padding, *order))
        moved = moved.reshape(moved.shape[len(padding) :])
        return moved if fn.event_dim else moved.unsqueeze(-1)


class _Indices(Messenger):
    """Gives plates the indices of others of the same names."""

    def __init__(self, plates: Mapping[str, Any]) -> None:
        super().__init__()
        self.plates = plates

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.plates:
            msg["value"], msg["done"] = self.plates[msg["name"]].indices, True


def read_model(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    init: Callable[[Any], Any] | None,
    plates: Mapping[str, Any] | None = None,
) -> Reading:
    """Run a model apart from all handlers, its latents at start values or, for None, drawn.

    Where there are ``plates`` by name already, the model's take their indices.
    """
    runnable = model if init is None else InitMessenger(init)(model)
    with torch.no_grad(), poutine.block(), _Indices(plates or {}):
        trace: Any = poutine.trace(runnable).get_trace(*args, **kwargs)
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    subsamples = {name for name, node in nodes.items() if site_is_subsample(node)}
    return Reading(
        {n: v for n, v in nodes.items() if n not in subsamples and not site_is_factor(v)},
        {name: torch.as_tensor(nodes[name]["value"]) for name in subsamples},
    )


def named(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(map(repr, names)) or "none"
