"""The chain rule: groups of features, each mapped given the groups before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.transforms.base import Transform, call_and_ladj, constant, inverse_and_ladj


class ChainTransform(Transform):
    r"""Map groups of features one after the other, each given those before it and the context.

    .. math:: y_k = f_k(x_k;\, c, y_1, \dots, y_{k-1})

    Both directions take one pass of each group's map.

    Parameters
    ----------
    maps
        For each group, from the context and the groups before it, side by side
        ``(*batch, size)``, to a transform; None is given where there is neither.
    sizes
        How many features each group has.
    context
        The context, or None.
    sequential_forward, sequential_inverse
        Whether a part goes feature by feature in that direction.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        maps: Sequence[Callable[[Tensor | None], Any]],
        sizes: Sequence[int],
        context: Tensor | None = None,
        *,
        sequential_forward: bool = False,
        sequential_inverse: bool = False,
    ) -> None:
        super().__init__()
        self.maps = list(maps)
        self.sizes = list(sizes)
        self.context = context
        self.sequential_forward = sequential_forward
        self.sequential_inverse = sequential_inverse
        self._constant = False

    def _part(self, k: int, before: Sequence[Tensor]) -> Any:
        given = [*([] if self.context is None else [self.context]), *before]
        if not given:
            transform = self.maps[k](None)
        else:
            batch = torch.broadcast_shapes(*(g.shape[:-1] for g in given))
            side_by_side = torch.cat([g.expand(*batch, g.shape[-1]) for g in given], -1)
            transform = self.maps[k](side_by_side)
        # The groups before are no parameters: gradients go on through them.
        return constant(transform, True) if self._constant else transform

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        done: list[Tensor] = []
        total: Any = 0.0
        for k, old in enumerate(x.split(self.sizes, -1)):
            new, ladj = call_and_ladj(self._part(k, done), old)
            done.append(new)
            total = total + ladj
        return _side_by_side(done, total), total

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        groups = y.split(self.sizes, -1)
        done: list[Tensor] = []
        total: Any = 0.0
        for k, old in enumerate(groups):
            new, ladj = inverse_and_ladj(self._part(k, groups[:k]), old)
            done.append(new)
            total = total + ladj
        return _side_by_side(done, total), total

    def detach_params(self, keep_context: bool = False) -> ChainTransform:
        detached = copy.copy(self)
        detached._constant = True
        if self.context is not None and not keep_context:
            detached.context = self.context.detach()
        return detached


def _side_by_side(groups: Sequence[Tensor], like: Tensor) -> Tensor:
    # The context may have added batch dimensions to some groups alone.
    return torch.cat([group.expand(*like.shape, group.shape[-1]) for group in groups], -1)
