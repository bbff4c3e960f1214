"""Coupling: one part of the features is mapped, given the other part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.transforms.base import Transform
from pyroflows.transforms.univariate import Univariate, vector_domain


class CouplingTransform(Transform):
    r"""Map some features by a univariate transform whose parameters the others give.

    .. math:: y_A = x_A, \qquad y_B = u(x_B;\, \theta(x_A))

    Both directions take one evaluation of the conditioner.

    Parameters
    ----------
    univariate
        Recipe of the scalar map.
    conditioner
        From ``(*batch, kept)`` to raw parameters ``(count, *batch, features - kept)``.
    order
        The features, those that stay first: indices of shape ``(features,)``.
    restore
        The inverse permutation of ``order``.
    kept
        How many features stay.

    References
    ----------
    Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        univariate: Univariate,
        conditioner: Callable[[Tensor], Tensor],
        order: Tensor,
        restore: Tensor,
        kept: int,
    ) -> None:
        super().__init__()
        self.domain = self.codomain = vector_domain(univariate)
        self.univariate = univariate
        self.conditioner = conditioner
        self.order = order
        self.restore = restore
        self.kept = kept

    def _couple(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        # Features lead in memory, as the parameters do: a part of them is one piece.
        columns = value.movedim(-1, 0).index_select(0, self.order)
        given, old = (part.movedim(0, -1) for part in columns.tensor_split([self.kept]))
        inner = self.univariate(self.conditioner(given))
        new, ladj = inner.inverse_and_ladj(old) if inverse else inner.call_and_ladj(old)
        # The context may have added batch dimensions to the mapped part alone.
        given = given.expand(*new.shape[:-1], self.kept)
        columns = torch.cat([given.movedim(-1, 0), new.movedim(-1, 0)])
        return columns.index_select(0, self.restore).movedim(0, -1), ladj.sum(-1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple(x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple(y, inverse=True)
