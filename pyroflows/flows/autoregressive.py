"""Autoregressive flows: one direction in one pass, the other feature by feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from pyroflows.distributions import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.layers import AutoregressiveLayer, Layer
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import Affine, Univariate


def autoregressive_layers(
    features: int,
    context: int,
    transforms: int,
    univariate: Univariate,
    hidden_features: Sequence[int],
    activation: Activation,
    one_pass: Literal["forward", "inverse"] = "inverse",
) -> list[Layer]:
    """Autoregressive layers whose order turns round from one to the next."""
    order = list(range(features))
    return [
        AutoregressiveLayer(
            features,
            context,
            one_pass=one_pass,
            order=order if i % 2 == 0 else order[::-1],
            univariate=univariate,
            hidden_features=hidden_features,
            activation=activation,
        )
        for i in range(transforms)
    ]


class _AffineAutoregressive(Flow):
    one_pass: Literal["forward", "inverse"]

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.GELU,
        max_log_scale: float = 2.0,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        affine = Affine(max_log_scale)
        layers = autoregressive_layers(
            features, context, transforms, affine, hidden_features, activation, self.one_pass
        )
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)


class MAF(_AffineAutoregressive):
    r"""Masked autoregressive flow: affine maps of each feature given those before it.

    The inverse (the density) costs one pass of each of the ``transforms`` networks; the forward
    direction (sampling) goes feature by feature at the arithmetic of one pass. Starts as the
    identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of autoregressive layers; the order of the features alternates.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.MaskedResidualMLP`.
    max_log_scale
        Smooth bound of each layer's log-scale, see `pyroflows.transforms.Affine`.
    mixing
        What follows each layer: ``"lu"``, a learned dense affine map; ``"orthogonal"`` or
        ``"householder"``, a learned rotation; ``"permutation"``, a fixed random order; or None.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Papamakarios, Pavlakou and Murray, "Masked autoregressive flow for density estimation",
    NeurIPS 2017.

    Examples
    --------
    >>> MAF(3)().log_prob(torch.zeros(3))
    tensor(-2.7568, grad_fn=<AddBackward0>)
    """

    one_pass = "inverse"


class IAF(_AffineAutoregressive):
    r"""Inverse autoregressive flow: as `MAF`, with sampling in one pass.

    The forward direction (sampling, with the density of the draw) costs one pass of each of the
    ``transforms`` networks; the inverse (the density of a given value) goes feature by feature at
    the arithmetic of one pass. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of autoregressive layers; the order of the features alternates.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.MaskedResidualMLP`.
    max_log_scale
        Smooth bound of each layer's log-scale, see `pyroflows.transforms.Affine`.
    mixing
        What follows each layer: ``"lu"``, a learned dense affine map; ``"orthogonal"`` or
        ``"householder"``, a learned rotation; ``"permutation"``, a fixed random order; or None.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling, "Improved variational inference with
    inverse autoregressive flow", NeurIPS 2016.

    Examples
    --------
    >>> IAF(3)().rsample_and_log_prob((5,))[1].shape
    torch.Size([5])
    """

    one_pass = "forward"
