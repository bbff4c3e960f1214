"""Flows of maps whose inverse is a root; neural ones."""

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
from pyroflows.transforms import DeepSigmoidal, UnconstrainedMonotonic


class NAF(Flow):
    r"""Neural autoregressive flow: deep sigmoidal maps of each feature given those before it.

    The inverse (the density) costs one pass of each of the ``transforms`` networks. The forward
    direction (sampling) also costs one, in as many steps as features where autoregressive, and
    finds a root for each feature and layer.
    Starts near the identity; far out the maps are straight lines.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of layers.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.MaskedResidualMLP`.
    units, depth
        Sigmoids in each layer of a map, and the number of these layers; see
        `pyroflows.transforms.DeepSigmoidal`.
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
    Huang, Krueger, Lacoste and Courville, "Neural autoregressive flows", ICML 2018.

    Examples
    --------
    >>> flow = NAF(2, context=3)
    >>> flow(torch.zeros(5, 3)).log_prob(torch.zeros(2)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        units: int = 8,
        depth: int = 1,
        autoregressive: bool = True,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        univariate = DeepSigmoidal(units, depth)
        layers = scoring_layers(
            features, context, transforms, univariate, hidden_features, activation, autoregressive
        )
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)


class UNAF(Flow):
    r"""Unconstrained monotonic neural autoregressive flow: integrals of positive networks.

    The inverse (the density) costs one pass of each of the ``transforms`` networks. The forward
    direction (sampling) also costs one, in as many steps as features where autoregressive, and
    finds a root for each feature and layer.
    Every evaluation of a map is an integral by quadrature. Starts as the identity; beyond ``bound``
    the maps go on along their tangents.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of layers.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.MaskedResidualMLP`.
    units
        Hidden units of the integrand, see `pyroflows.transforms.UnconstrainedMonotonic`.
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
    Wehenkel and Louppe, "Unconstrained monotonic neural networks", NeurIPS 2019.

    Examples
    --------
    >>> UNAF(2)().log_prob(torch.zeros(2))
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
        units: int = 8,
        bound: float = 3.0,
        autoregressive: bool = True,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        univariate = UnconstrainedMonotonic(units, bound)
        layers = scoring_layers(
            features, context, transforms, univariate, hidden_features, activation, autoregressive
        )
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)
