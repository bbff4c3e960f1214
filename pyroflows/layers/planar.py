"""Planar, radial and Sylvester layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.nn import Conditioner, ResidualMLP
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import (
    ConditionalTransform,
    InverseTransform,
    PlanarTransform,
    RadialTransform,
    SylvesterTransform,
    Transform,
)

OnePass = Literal["forward", "inverse"]


class _LowRankLayer(Layer):
    """A layer whose raw parameters are learned, or come from a network of the context."""

    #: Whether the transform's own inverse is not closed-form.
    _sequential: ClassVar[bool] = True

    def __init__(
        self,
        start: Tensor,
        context: int,
        one_pass: OnePass,
        hidden_features: Sequence[int],
        activation: Activation,
    ) -> None:
        super().__init__()
        check_one_pass(one_pass)
        self.one_pass = one_pass
        self.network = None
        if not context:
            self.params = nn.Parameter(start)
            return
        self.network = ResidualMLP(0, context, len(start), hidden_features, activation)
        # The start under every context: what it multiplies is zero.
        *_, bias = (p for name, p in self.network.named_parameters() if name.endswith("bias"))
        bias.data.copy_(start)

    def _build(self, params: Tensor) -> Transform:
        raise NotImplementedError

    def forward(self, context: Tensor | None = None) -> Transform:
        given = None if self.network is None else Conditioner(self.network, 1, context)
        transform = ConditionalTransform(
            self._build, given or self.params, sequential_inverse=self._sequential
        )
        return transform if self.one_pass == "forward" else InverseTransform(transform)


def check_one_pass(one_pass: str) -> None:
    """Raise `ValueError` unless it names a direction."""
    if one_pass not in ("forward", "inverse"):
        raise ValueError(f"one_pass: expected 'forward' or 'inverse', got {one_pass!r}")


class PlanarLayer(_LowRankLayer):
    r"""Planar map, :math:`y = x + u \tanh(w^\top x + b)`, invertible for all parameters.

    One direction is closed-form, the other solves one scalar equation for each event. Without a
    context the parameters themselves are learned; with one (amortised), each direction costs one
    network pass. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    one_pass
        The closed-form direction: ``"inverse"`` for densities of data, ``"forward"`` for guides.
    hidden_features, activation
        Of the `pyroflows.nn.ResidualMLP` from the context to the parameters; unused without one.

    Raises
    ------
    ValueError
        For sizes that are not positive, or another direction.

    References
    ----------
    Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Examples
    --------
    >>> PlanarLayer(3, one_pass="forward")()(torch.ones(3))
    tensor([1., 1., 1.], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        one_pass: OnePass = "inverse",
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        check_sizes(features, context)
        weight = torch.randn(features) / features**0.5
        start = torch.cat([weight, torch.zeros(features), torch.randn(1)])
        super().__init__(start, context, one_pass, hidden_features, activation)
        self.features = features

    def _build(self, params: Tensor) -> PlanarTransform:
        weight, scale, bias = params.split([self.features, self.features, 1], -1)
        return PlanarTransform(weight, scale, bias.squeeze(-1))


class RadialLayer(_LowRankLayer):
    r"""Radial map about a centre, :math:`y = x + \beta (x - x_0) / (\alpha + |x - x_0|)`.

    Invertible for all parameters, and closed-form in both directions. Without a context the
    parameters themselves are learned; with one (amortised), each direction costs one network pass.
    Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    one_pass
        The direction of the formula: ``"inverse"`` maps data by it, ``"forward"`` draws.
    hidden_features, activation
        Of the `pyroflows.nn.ResidualMLP` from the context to the parameters; unused without one.

    Raises
    ------
    ValueError
        For sizes that are not positive, or another direction.

    References
    ----------
    Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Examples
    --------
    >>> RadialLayer(3, one_pass="forward")()(torch.ones(3))
    tensor([1., 1., 1.], grad_fn=<AddBackward0>)
    """

    _sequential = False

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        one_pass: OnePass = "inverse",
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        check_sizes(features, context)
        start = torch.cat([torch.randn(features), torch.zeros(2)])
        super().__init__(start, context, one_pass, hidden_features, activation)
        self.features = features

    def _build(self, params: Tensor) -> RadialTransform:
        center, log_radius, strength = params.split([self.features, 1, 1], -1)
        return RadialTransform(center, log_radius.squeeze(-1), strength.squeeze(-1))


class SylvesterLayer(_LowRankLayer):
    r"""Sylvester map, :math:`y = x + Q R \tanh(\tilde R Q^\top x + b)`.

    Invertible for all parameters, :math:`Q` with orthonormal columns by Householder reflections.
    One direction is closed-form, the other solves ``rank`` scalar equations in turn. Without a
    context the parameters themselves are learned; with one (amortised), each direction costs one
    network pass. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    rank
        Number of directions, 1 to ``features``; by default 8, or ``features`` if those are fewer.
    one_pass
        The closed-form direction: ``"inverse"`` for densities of data, ``"forward"`` for guides.
    hidden_features, activation
        Of the `pyroflows.nn.ResidualMLP` from the context to the parameters; unused without one.

    Raises
    ------
    ValueError
        For sizes that are not positive, a rank beyond its limits, or another direction.

    References
    ----------
    van den Berg, Hasenclever, Tomczak and Welling, "Sylvester normalizing flows for variational
    inference", UAI 2018.

    Examples
    --------
    >>> SylvesterLayer(3, one_pass="forward")()(torch.ones(3))
    tensor([1., 1., 1.], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        rank: int | None = None,
        one_pass: OnePass = "inverse",
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        check_sizes(features, context)
        rank = min(features, 8) if rank is None else rank
        if not 1 <= rank <= features:
            raise ValueError(f"rank: expected 1 to {features} (the features), got {rank}")
        vectors = torch.randn(rank * features) / features**0.5
        inner = torch.eye(rank).flatten()
        start = torch.cat([vectors, torch.zeros(rank * rank), inner, torch.randn(rank)])
        super().__init__(start, context, one_pass, hidden_features, activation)
        self.features, self.rank = features, rank

    def _build(self, params: Tensor) -> SylvesterTransform:
        square = (self.rank, self.rank)
        sizes = [self.rank * self.features, self.rank**2, self.rank**2, self.rank]
        vectors, outer, inner, bias = params.split(sizes, -1)
        return SylvesterTransform(
            vectors.unflatten(-1, (self.rank, self.features)),
            outer.unflatten(-1, square),
            inner.unflatten(-1, square),
            bias,
        )
