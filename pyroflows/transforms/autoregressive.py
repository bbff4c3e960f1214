"""Autoregression: each feature is mapped, given those before it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.transforms.base import Transform
from pyroflows.transforms.univariate import Univariate, vector_domain


class SequentialConditioner(Protocol):
    """A masked network that can also be evaluated feature by feature."""

    def __call__(self, x: Tensor) -> Tensor:
        """All parameters at once: ``(*batch, features)`` to ``(count, *batch, features)``."""
        ...

    def unroll(self, value: Tensor) -> tuple[torch.Size, Tensor, Generator[Tensor, Tensor, None]]:
        """The broadcast batch shape, the features in order, and a generator over them.

        For each feature it yields the parameters, ``(count, N)`` for the flattened batch, and is
        sent the feature's values, ``(N,)``.
        """
        ...


class AutoregressiveTransform(Transform):
    r"""Map every feature by a univariate transform whose parameters the earlier ones give.

    .. math:: y_i = u(x_i;\, \theta_i(x_{<i}))

    The forward direction takes one evaluation of the conditioner; the inverse goes feature by
    feature and computes each hidden unit once, which is the arithmetic of one evaluation in as
    many steps as there are features. For a density in one pass (MAF), use its inverse.

    Parameters
    ----------
    univariate
        Recipe of the scalar map.
    conditioner
        A masked network with its context in hand.

    References
    ----------
    Kingma et al., "Improved variational inference with inverse autoregressive flow", NeurIPS 2016;
    Papamakarios, Pavlakou and Murray, "Masked autoregressive flow", NeurIPS 2017.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    sequential_inverse = True

    def __init__(self, univariate: Univariate, conditioner: SequentialConditioner) -> None:
        super().__init__()
        self.domain = self.codomain = vector_domain(univariate)
        self.univariate = univariate
        self.conditioner = conditioner

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.univariate(self.conditioner(x)).call_and_ladj(x)
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        batch, order, steps = self.conditioner.unroll(y)
        features = y.shape[-1]
        # In the order of dependence, so that no index has to leave the device.
        columns = y.index_select(-1, order).expand(*batch, features).reshape(-1, features)
        solved: list[Tensor] = []
        ladjs: list[Tensor] = []
        params = next(steps)
        for column in columns.unbind(-1):
            if solved:
                params = steps.send(solved[-1])
            x, ladj = self.univariate(params).inverse_and_ladj(column)
            solved.append(x)
            ladjs.append(ladj)
        x = torch.stack(solved, dim=-1).index_select(-1, order.argsort())
        return x.reshape(*batch, features), torch.stack(ladjs).sum(0).reshape(batch)
