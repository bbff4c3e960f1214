"""The chain rule as a layer: groups of features, each given those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.layers.composition import as_layer
from pyroflows.transforms import ChainTransform


class Chain(Layer):
    r"""Groups of features, each mapped by layers whose context holds the groups before it.

    .. math:: p(y \mid c) = \prod_k p(y_k \mid c, y_1, \dots, y_{k-1})

    Forward and inverse cost one pass of each group's layers.

    Parameters
    ----------
    parts
        For each group a layer, or a list of them, from base to data. Those of group :math:`k` have
        a context of size ``context + sizes[0] + ... + sizes[k - 1]``.
    sizes
        How many features each group has.
    context
        Size of the context (0: none).

    Examples
    --------
    >>> from pyroflows.layers import CouplingLayer, LULinear
    >>> layer = Chain([LULinear(2), [CouplingLayer(3, context=2), LULinear(3)]], [2, 3])
    >>> layer()(torch.zeros(5)).shape
    torch.Size([5])
    """

    def __init__(self, parts: Sequence[object], sizes: Sequence[int], context: int = 0) -> None:
        super().__init__()
        for size in sizes:
            check_sizes(size, context)
        if not parts or len(parts) != len(sizes):
            raise ValueError(
                f"sizes: expected one for each of {len(parts)} parts, at least one, got "
                f"{list(sizes)}"
            )
        self.parts = nn.ModuleList(as_layer(part) for part in parts)
        self.sizes = list(sizes)
        self.context = context
        given = [context + sum(self.sizes[:k]) for k in range(len(self.sizes))]
        transforms = [
            part(torch.zeros(size) if size else None)
            for part, size in zip(self.parts, given, strict=True)
        ]
        self._sequential = {
            name: any(getattr(transform, name, False) for transform in transforms)
            for name in ("sequential_forward", "sequential_inverse")
        }

    def forward(self, context: Tensor | None = None) -> ChainTransform:
        return ChainTransform(list(self.parts), self.sizes, context, **self._sequential)
