"""Flows of planar, radial and Sylvester maps: the first flows for variational inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pyroflows.distributions import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.layers import PlanarLayer, RadialLayer, SylvesterLayer
from pyroflows.layers.planar import OnePass
from pyroflows.nn.mlp import Activation


class Planar(Flow):
    r"""Planar flow: each map moves the space along one direction, by a tanh of another.

    One direction is closed-form at the cost of two products of vectors for each map; the other
    solves one scalar equation for each. With a context, the parameters of each map come from a
    network of it (amortised), one pass each. Invertible for all parameters; starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of maps.
    one_pass
        The closed-form direction: ``"inverse"`` for densities of data, ``"forward"`` for guides.
    hidden_features, activation
        Of the networks from the context to the parameters, see `pyroflows.nn.ResidualMLP`; unused
        without one.
    mixing
        What stands between the maps, as in `NSF`; None for nothing.
    act_norm
        Whether an `ActNorm` follows each map.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Examples
    --------
    >>> Planar(3)().log_prob(torch.zeros(3))
    tensor(-2.7568, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 16,
        one_pass: OnePass = "inverse",
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        mixing: Mixing = None,
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        layers = [
            PlanarLayer(
                features,
                context,
                one_pass=one_pass,
                hidden_features=hidden_features,
                activation=activation,
            )
            for _ in range(transforms)
        ]
        stack = mixed(layers, features, mixing, act_norm)
        super().__init__(stack, features, context, base, support)


class Radial(Flow):
    r"""Radial flow: each map pushes the space away from a centre, or draws it in.

    Both directions are closed-form, at the cost of a few sums over the features for each map. With
    a context, the parameters of each map come from a network of it (amortised), one pass each.
    Invertible for all parameters; starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of maps.
    one_pass
        The direction of the formula: ``"inverse"`` maps data by it, ``"forward"`` draws.
    hidden_features, activation
        Of the networks from the context to the parameters, see `pyroflows.nn.ResidualMLP`; unused
        without one.
    mixing
        What stands between the maps, as in `NSF`; None for nothing.
    act_norm
        Whether an `ActNorm` follows each map.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Examples
    --------
    >>> Radial(3)().log_prob(torch.zeros(3))
    tensor(-2.7568, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 16,
        one_pass: OnePass = "inverse",
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        mixing: Mixing = None,
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        layers = [
            RadialLayer(
                features,
                context,
                one_pass=one_pass,
                hidden_features=hidden_features,
                activation=activation,
            )
            for _ in range(transforms)
        ]
        stack = mixed(layers, features, mixing, act_norm)
        super().__init__(stack, features, context, base, support)


class Sylvester(Flow):
    r"""Sylvester flow: planar maps of several orthogonal directions at once.

    One direction is closed-form at the cost of two products with ``rank`` vectors for each map; the
    other solves ``rank`` scalar equations in turn for each. With a context, the parameters of each
    map come from a network of it (amortised), one pass each. Invertible for all parameters; starts
    as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of maps.
    rank
        Directions of each map, 1 to ``features``; by default 8, or ``features`` if those are fewer.
    one_pass
        The closed-form direction: ``"inverse"`` for densities of data, ``"forward"`` for guides.
    hidden_features, activation
        Of the networks from the context to the parameters, see `pyroflows.nn.ResidualMLP`; unused
        without one.
    mixing
        What stands between the maps, as in `NSF`; None for nothing.
    act_norm
        Whether an `ActNorm` follows each map.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    van den Berg, Hasenclever, Tomczak and Welling, "Sylvester normalizing flows for variational
    inference", UAI 2018.

    Examples
    --------
    >>> Sylvester(3, rank=2)().log_prob(torch.zeros(3))
    tensor(-2.7568, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 8,
        rank: int | None = None,
        one_pass: OnePass = "inverse",
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        mixing: Mixing = None,
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        layers = [
            SylvesterLayer(
                features,
                context,
                rank=rank,
                one_pass=one_pass,
                hidden_features=hidden_features,
                activation=activation,
            )
            for _ in range(transforms)
        ]
        stack = mixed(layers, features, mixing, act_norm)
        super().__init__(stack, features, context, base, support)
