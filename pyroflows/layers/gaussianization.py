"""The layer of Gaussianization flows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer
from pyroflows.layers.elementwise import ElementwiseLayer
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import InverseTransform, MixtureLogistic


class MarginalGaussianization(Layer):
    r"""Every feature of the data by itself towards the normal distribution.

    From data to base, it is the distribution function of a mixture of logistics on the logit scale,
    see `pyroflows.transforms.MixtureLogistic`; from base to data, a root for each feature. Starts
    near the identity. The fit functions, and never a forward pass, call `initialize_` once on data,
    which puts components where the data are.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    components
        Logistic distributions in each mixture.
    hidden_features, activation
        Of the `pyroflows.nn.ResidualMLP` from the context to the parameters; unused without one.

    References
    ----------
    Meng, Song, Song and Ermon, "Gaussianization flows", AISTATS 2020.

    Examples
    --------
    >>> y = 5 * torch.rand(1000, 2) - 20
    >>> layer = MarginalGaussianization(2)
    >>> layer.initialize_(y)
    >>> bool((layer().inv(y).std(0) - 1).abs().max() < 0.2)
    True
    """

    initialized: Tensor

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        components: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.mixture = MixtureLogistic(components)
        self.elementwise = ElementwiseLayer(
            features,
            context,
            univariate=self.mixture,
            hidden_features=hidden_features,
            activation=activation,
        )
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, context: Tensor | None = None) -> InverseTransform:
        return InverseTransform(self.elementwise(context))

    @torch.no_grad()
    def initialize_(self, y: Tensor) -> None:
        """Make what leaves on the base side about standard normal, unless that was done before."""
        if self.initialized:
            return
        raw = self.mixture.gaussianizing(y.reshape(-1, y.shape[-1]))
        network = self.elementwise.network
        if network is None:
            self.elementwise.params.copy_(raw)
        else:
            # The other weights of the last layer start at zero.
            *_, bias = network.parameters()
            bias.copy_(raw.flatten())
        self.initialized.fill_(True)
