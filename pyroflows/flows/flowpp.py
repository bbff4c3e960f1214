"""Flow++: couplings with mixtures of logistics."""

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
from pyroflows.transforms import MixtureLogistic


class FlowPP(Flow):
    r"""Flow++: couplings by the distribution function of a logistic mixture, on the logit scale.

    The inverse (the density) costs one pass of each of the ``transforms`` networks; the forward
    direction (sampling) also costs one, and finds a root for each feature that is mapped. Starts
    near the identity; far out the maps are straight lines.

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
        What stands between the layers: by default a learned dense affine map; see `NSF`.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Ho, Chen, Srinivas, Duan and Abbeel, "Flow++: improving flow-based generative models with
    variational dequantization and architecture design", ICML 2019.

    Examples
    --------
    >>> FlowPP(2)().sample((4,)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        components: int = 8,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        univariate = MixtureLogistic(components)
        layers = scoring_layers(
            features,
            context,
            transforms,
            univariate,
            hidden_features,
            activation,
            autoregressive=False,
        )
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)
