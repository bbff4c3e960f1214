"""Gaussianization flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pyroflows.distributions import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.layers import Layer, MarginalGaussianization, OrthogonalLinear
from pyroflows.nn.mlp import Activation


class GF(Flow):
    r"""Gaussianization flow: distribution functions of single features and rotations in turn.

    The distribution functions are mixtures of logistics, taken on the logit scale and not to normal
    quantiles: so they are straight lines far out, and keep the base's tails. Either direction costs
    one pass of each of the ``transforms`` networks from the context, and none without a context;
    the forward direction (sampling) finds a root for each feature and layer. Starts near a
    rotation.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of layers.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.ResidualMLP`.
    components
        Logistic distributions in each mixture, see `pyroflows.transforms.MixtureLogistic`.
    mixing
        What stands between the layers: by default a learned rotation, random at the start; see
        `NSF`.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Meng, Song, Song and Ermon, "Gaussianization flows", AISTATS 2020.

    Examples
    --------
    >>> GF(2)().sample((4,)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 6,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        components: int = 8,
        mixing: Mixing = "orthogonal",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        layers: list[Layer] = [
            MarginalGaussianization(
                features,
                context,
                components=components,
                hidden_features=hidden_features,
                activation=activation,
            )
            for _ in range(transforms)
        ]
        layers = mixed(layers, features, mixing, act_norm)
        for layer in layers:
            if isinstance(layer, OrthogonalLinear):
                # Maps of single features see nothing new unless they see other directions.
                nn.init.normal_(layer.weight)
        super().__init__(layers, features, context, base, support)
