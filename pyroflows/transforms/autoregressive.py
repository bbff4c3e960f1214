"""Autoregression: each feature is mapped, given those before it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics.concrete import has_values
from pyroflows.transforms.base import Transform
from pyroflows.transforms.univariate import Univariate, vector_domain

#: Most sweeps of the Jacobi iteration, and the change at which it ends, in units in the last place.
SWEEPS, TOLERANCE = 24, 64
#: Sweeps are for so many features and more, and on a CPU for so few events: beyond that, or twice
#: as many as there are features, a sweep costs more than the steps that it saves (measured on
#: trained weights: affine maps of 16, 64 and 256 features, splines of 16).
SWEPT_FEATURES, SWEPT_EVENTS = 16, 128


def sweeps_pay(y: Tensor) -> bool:
    """Whether to invert by sweeps over all features rather than feature by feature.

    A small step takes as long as a large one where neither fills the machine: a GPU always, a CPU
    with few events. Gradients go feature by feature, through each hidden unit once.
    """
    features = y.shape[-1]
    if features < SWEPT_FEATURES or torch.is_grad_enabled() or not has_values(y):
        return False
    events = y.shape[:-1].numel()
    return y.device.type != "cpu" or events <= min(SWEPT_EVENTS, 2 * features)


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
    many steps as there are features. Of few events, and on a GPU, where many small steps take long,
    an inverse without gradients is found by Jacobi iteration, one evaluation a sweep, to 64 units
    in the last place; where 24 sweeps do not reach that, feature by feature. For a density in one
    pass (MAF), use its inverse.

    Parameters
    ----------
    univariate
        Recipe of the scalar map.
    conditioner
        A masked network with its context in hand.

    References
    ----------
    Kingma et al., "Improved variational inference with inverse autoregressive flow", NeurIPS 2016;
    Papamakarios, Pavlakou and Murray, "Masked autoregressive flow", NeurIPS 2017; Song, Meng, Liao
    and Ermon, "Accelerating feedforward computation via parallel nonlinear equation solving",
    ICML 2021 (Jacobi iteration).
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
        found = self._by_sweeps(y) if sweeps_pay(y) else None
        return self._by_features(y) if found is None else found

    def _by_sweeps(self, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Jacobi iteration: all features at once, given those of the sweep before.

        Each sweep gets one feature more exactly right; mostly a few bring all to the tolerance,
        relative to the size of the values. None where they do not.
        """
        x = y
        for _ in range(SWEEPS):
            before = x
            x, ladj = self.univariate(self.conditioner(before)).inverse_and_ladj(y)
            change = (x - before).abs() - TOLERANCE * torch.finfo(x.dtype).eps * (1 + x.abs())
            if (change <= 0).all():
                return x, ladj.sum(-1)
        return None

    def _by_features(self, y: Tensor) -> tuple[Tensor, Tensor]:
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
