"""Flows of increasing polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pyroflows.distributions import Base
from pyroflows.flows.coupling import scoring_layers
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import Bernstein, SumOfSquares


class SOSPF(Flow):
    r"""Sum-of-squares polynomial flow: integrals of squared polynomials.

    The inverse (the density) costs one pass of each of the ``transforms`` networks. The forward
    direction (sampling) also costs one, in as many steps as features where autoregressive, and
    finds a root for each feature and layer.
    Starts as the identity; beyond ``bound`` the maps go on along their tangents.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of layers.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.MaskedResidualMLP`.
    degree
        Of the polynomials that are squared, see `pyroflows.transforms.SumOfSquares`.
    bound
        Half-width of the box, in standardised units.
    autoregressive
        Whether every layer maps all features in order, instead of one part given the other.
    mixing
        What stands between the layers: by default a learned dense affine map; see `NSF`.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Jaini, Selby and Yu, "Sum-of-squares polynomial flow", ICML 2019.

    Examples
    --------
    >>> SOSPF(2)().log_prob(torch.zeros(2))
    tensor(-1.8379, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        degree: int = 6,
        bound: float = 3.0,
        autoregressive: bool = True,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        univariate = SumOfSquares(degree, bound)
        layers = scoring_layers(
            features, context, transforms, univariate, hidden_features, activation, autoregressive
        )
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)


class BPF(Flow):
    r"""Bernstein polynomial flow: polynomials with increasing coefficients.

    The inverse (the density) costs one pass of each of the ``transforms`` networks. The forward
    direction (sampling) also costs one, in as many steps as features where autoregressive, and
    finds a root for each feature and layer.
    Starts as the identity; beyond ``bound`` the maps are the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of layers.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.MaskedResidualMLP`.
    degree
        Of the polynomials, see `pyroflows.transforms.Bernstein`.
    bound
        Half-width of the box, in standardised units.
    autoregressive
        Whether every layer maps all features in order, instead of one part given the other.
    mixing
        What stands between the layers: by default a learned dense affine map; see `NSF`.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Ramasinghe, Fernando, Khan and Barnes, "Robust normalizing flows using Bernstein-type
    polynomials", BMVC 2022.

    Examples
    --------
    >>> BPF(2)().log_prob(torch.zeros(2))
    tensor(-1.8379, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        degree: int = 16,
        bound: float = 3.0,
        autoregressive: bool = True,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        univariate = Bernstein(degree, bound)
        layers = scoring_layers(
            features, context, transforms, univariate, hidden_features, activation, autoregressive
        )
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)
