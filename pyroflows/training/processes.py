"""Several processes that fit one flow: what they share, and what each does alone.

Started by ``torchrun``; where no process group is up, there is one process and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as group

from pyroflows.numerics import forked_rng

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Rank of this process, and how many processes there are."""
    if group.is_available() and group.is_initialized():
        return group.get_rank(), group.get_world_size()
    return 0, 1


def own_share(total: int, name: str) -> int:
    """How many of ``total`` draws are this process's; they add up to all."""
    rank, count = world()
    if total < count:
        raise ValueError(
            f"{name}: expected at least one for each of {count} processes, got {total}"
        )
    return total // count + (rank < total % count)


def agreed(value: T) -> T:
    """The first process's value, for all."""
    if world()[1] == 1:
        return value
    values = [value]
    group.broadcast_object_list(values)
    return values[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    count = world()[1]
    if count == 1:
        return [value]
    values = cast("list[T]", [None] * count)
    group.all_gather_object(values, value)
    return values


def broadcast_(tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors by the first process's; raise where others have other tensors."""
    if world()[1] == 1:
        return
    shapes = gathered({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for rank, theirs in enumerate(shapes):
        if theirs != shapes[0]:
            raise ValueError(
                "the processes of one group fit one flow together: expected the same tensors in "
                f"all, got {_but(shapes[0], theirs)} in process 0 and {_but(theirs, shapes[0])} in "
                f"process {rank}. Fit different flows in processes without a common group."
            )
    for tensor in tensors.values():
        group.broadcast(tensor.detach(), 0)


def _but(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first of the items that the other has not."""
    return next((f"{name} {shape}" for name, shape in one.items() - other.items()), "none more")


def total(value: Tensor) -> Tensor:
    """The sum over the processes."""
    if world()[1] == 1:
        return value
    value = value.clone()
    group.all_reduce(value)
    return value


@torch.no_grad()
def average_gradients_(parameters: Sequence[Tensor], loss: Tensor, weight: float) -> Tensor:
    """Average gradients over the processes, weighted by how many rows each has; the loss too.

    One sum over all processes, of everything in one vector.
    """
    if world()[1] == 1:
        return loss
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    ends = [loss.reshape(1), torch.ones_like(loss).reshape(1)]
    flat = torch.cat([g.flatten() for g in [*grads, *ends]]) * weight
    group.all_reduce(flat)
    *means, mean, _ = (flat / flat[-1]).split([g.numel() for g in [*grads, *ends]])
    for parameter, value in zip(parameters, means, strict=True):
        parameter.grad = value.view_as(parameter).to(parameter.dtype)
    return mean.reshape(())


@contextmanager
def seeded(seed: int | None, alone: bool = False) -> Iterator[None]:
    """Run from a seed, after which the random state is put back; several processes agree on one.

    Without a seed one process goes on with the global random state, unless it is to be left
    ``alone``.
    """
    count = world()[1]
    if seed is None and (alone or count > 1):
        seed = int(torch.randint(2**62, ()))
    seed = agreed(seed)
    if seed is None:
        yield
    else:
        with forked_rng(seed):
            yield


@contextmanager
def own_noise() -> Iterator[None]:
    """Random numbers of this process's own; afterwards all go on with common ones."""
    rank, count = world()
    if count == 1:
        yield
    else:
        seed = agreed(int(torch.randint(2**62, ())))
        with forked_rng(seed + rank):
            yield
        torch.manual_seed(seed + count)
