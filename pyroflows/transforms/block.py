"""Block autoregression: each feature goes through an increasing network of its own."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics import increasing_root
from pyroflows.numerics.roots import Increasing
from pyroflows.transforms.base import Transform


class IncreasingNetwork(Protocol):
    """A network that increases in each feature, evaluated at once or feature by feature."""

    def __call__(self, x: Tensor) -> Tensor:
        """Values and logarithms of slopes: ``(*batch, features)`` to ``(2, *batch, features)``."""
        ...

    def unroll(self, value: Tensor) -> tuple[Tensor, Generator[Increasing, Tensor, None]]:
        """The features in order, and a generator over them.

        For each feature it yields an increasing function, and is sent the feature's values.
        """
        ...


class BlockTransform(Transform):
    r"""Map every feature by a network that increases in it, given the earlier ones.

    .. math:: y_i = f_i(x_i;\, x_{<i}), \qquad \frac{\partial f_i}{\partial x_i} > 0

    The forward direction takes one evaluation of the network. The inverse goes feature by feature
    and finds each as a root of a scalar function, to the rounding of the dtype, which evaluates the
    hidden units of that feature alone. For a density in one pass, use its inverse.

    Parameters
    ----------
    network
        With its context in hand.

    Raises
    ------
    InversionError
        Where a root is not found to the tolerance.

    References
    ----------
    De Cao, Titov and Aziz, "Block neural autoregressive flow", UAI 2019.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    sequential_inverse = True

    def __init__(self, network: IncreasingNetwork) -> None:
        super().__init__()
        self.network = network

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = self.network(x).unbind(0)
        return y, log_slope.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        order, steps = self.network.unroll(y)
        solved: list[Tensor] = []
        ladjs: list[Tensor] = []
        function = next(steps)
        # In the order of dependence, so that no index has to leave the device.
        for column in y.index_select(-1, order).unbind(-1):
            if solved:
                function = steps.send(solved[-1])
            x, ladj = increasing_root(function, column)
            solved.append(x)
            ladjs.append(ladj)
        # The first features do not know yet what batch the others have.
        columns = torch.broadcast_tensors(*solved)
        x = torch.stack(columns, -1).index_select(-1, order.argsort())
        return x, torch.stack(torch.broadcast_tensors(*ladjs)).sum(0)
