"""Sums over the dimensions of an event."""

from __future__ import annotations

from torch import Tensor


def sum_rightmost(value: Tensor, dims: int) -> Tensor:
    """Sum over the last ``dims`` dimensions, also where the batch is empty.

    The functions of that name in torch and Pyro reshape to a size that an empty batch leaves
    undetermined.

    Examples
    --------
    >>> sum_rightmost(torch.ones(0, 2, 3), 2).shape
    torch.Size([0])
    """
    return value.sum(tuple(range(-dims, 0))) if dims else value
