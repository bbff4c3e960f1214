"""A network on angles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.nn.mlp import Activation, ResidualMLP


class PeriodicMLP(ResidualMLP):
    """`ResidualMLP` of the cosines and sines of its inputs: the same after a turn of any of them.

    The parameters are those of `ResidualMLP`.

    Examples
    --------
    >>> net = PeriodicMLP(2, 0, out_features=1)
    >>> angles = torch.tensor([[-torch.pi, 1.0], [torch.pi, 1.0]])
    >>> first, last = net(angles)
    >>> torch.allclose(first, last)
    True
    """

    def __init__(
        self,
        features: int,
        context: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(2 * features, context, out_features, hidden_features, activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(torch.cat([x.cos(), x.sin()], -1), context)
