"""Which feature may see which: masks and degrees of coupling and autoregressive networks."""

from __future__ import annotations

import torch
from torch import Tensor


def hidden_degrees(width: int, features: int, lowest: int = 0) -> Tensor:
    """Degrees of hidden units, sorted and spread evenly over ``lowest .. features - 1``.

    A unit of degree ``m`` sees the ``m`` leading features; a unit of degree 0 sees none of them,
    only the context. Sorted degrees keep the units that become known together side by side.

    Parameters
    ----------
    width
        Number of units.
    features
        Number of features.
    lowest
        Smallest degree: 0 where there is context to see, 1 where there is none.

    Returns
    -------
    Tensor
        Integers of shape ``(width,)``.

    References
    ----------
    Germain, Gregor, Murray and Larochelle, "MADE", ICML 2015.

    Examples
    --------
    >>> hidden_degrees(6, 4, lowest=1)
    tensor([1, 1, 2, 2, 3, 3])
    """
    lowest = min(lowest, features - 1)
    return lowest + torch.arange(width) * (features - lowest) // max(width, 1)


def autoregressive_mask(out_degrees: Tensor, in_degrees: Tensor) -> Tensor:
    """Connections from inputs to outputs of at least their degree, ``(outputs, inputs)``.

    Examples
    --------
    >>> autoregressive_mask(torch.tensor([0, 1]), torch.tensor([1, 2])).int()
    tensor([[0, 0],
            [1, 0]], dtype=torch.int32)
    """
    return out_degrees[:, None] >= in_degrees[None, :]


def binary_code(features: int, index: int) -> Tensor:
    """Split of the features for the coupling number ``index``: True for those that are mapped.

    Couplings 2k and 2k + 1 map the features whose index has, or lacks, binary digit k. Any two
    features therefore stand on different sides after at most ``2 log2(features)`` couplings, and
    every feature is mapped by every other coupling. A single feature is always mapped.

    Examples
    --------
    >>> [binary_code(4, i).int().tolist() for i in range(4)]
    [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    """
    if features == 1:
        return torch.ones(1, dtype=torch.bool)
    digits = (features - 1).bit_length()
    digit = (torch.arange(features) >> (index // 2 % digits)) & 1
    return digit.bool() if index % 2 == 0 else ~digit.bool()
