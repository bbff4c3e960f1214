"""A layer of scalar maps, one for each feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.nn import Conditioner, ResidualMLP
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import Affine, ElementwiseTransform, Univariate


class ElementwiseLayer(Layer):
    r"""Every feature by its own scalar map, :math:`y_i = u(x_i;\, \theta_i(c))`.

    Without a context the raw parameters themselves are learned, and neither direction costs a
    network pass; with one, each costs one pass. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    univariate
        Recipe of the scalar map; by default affine.
    hidden_features, activation
        Of the `pyroflows.nn.ResidualMLP` from the context to the parameters; unused without one.

    Raises
    ------
    ValueError
        For sizes that are not positive.

    Examples
    --------
    >>> ElementwiseLayer(3)()(torch.ones(3))
    tensor([1., 1., 1.], grad_fn=<...>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        univariate: Univariate = Affine(),  # noqa: B008  (frozen)
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        check_sizes(features, context)
        self.univariate = univariate
        self.network = None
        if context:
            out_features = univariate.count * features
            self.network = ResidualMLP(0, context, out_features, hidden_features, activation)
        else:
            self.params = nn.Parameter(torch.zeros(univariate.count, features))

    def forward(self, context: Tensor | None = None) -> ElementwiseTransform:
        if self.network is None:
            return ElementwiseTransform(self.univariate, self.params)
        conditioner = Conditioner(self.network, self.univariate.count, context, reducible=True)
        return ElementwiseTransform(self.univariate, conditioner)
