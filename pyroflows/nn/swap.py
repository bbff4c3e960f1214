"""A module with other tensors in the places of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def swapped(
    module: nn.Module, parameters: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Let a module compute with other tensors in the places of some of its parameters.

    As `torch.func.functional_call`, which wants names, calls ``forward`` alone, and takes three
    times as long about it.
    """
    by_id = {id(p): tensor for p, tensor in zip(parameters, tensors, strict=True)}
    places = [
        (part._parameters, name, own)
        for part in module.modules()
        for name, own in part._parameters.items()
        if id(own) in by_id
    ]
    try:
        for holder, name, own in places:
            holder[name] = by_id[id(own)]  # type: ignore[assignment]
        yield
    finally:
        for holder, name, own in places:
            holder[name] = own
