"""Block neural autoregressive flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyroflows.distributions import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.layers import BlockLayer
from pyroflows.layers.planar import OnePass


class BNAF(Flow):
    r"""Block neural autoregressive flow: the layer itself is a network, increasing in each feature.

    The density (by default) costs one pass of each of the ``transforms`` networks, whose width is
    ``features`` times that of ``hidden_features``; sampling goes feature by feature and finds each
    as a root, by some twenty evaluations of its own hidden units. Starts near the identity; its
    tails are straight, and it reaches every value.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of networks; the order of the features alternates.
    hidden_features
        Hidden units of each feature, one number for each layer, see `pyroflows.nn.BlockNetwork`.
    one_pass
        The direction that takes one pass: ``"inverse"`` for densities of data, ``"forward"`` for
        guides.
    mixing
        What stands between the layers, as in `NSF`; None for nothing.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    De Cao, Titov and Aziz, "Block neural autoregressive flow", UAI 2019.

    Examples
    --------
    >>> BNAF(3)().log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 3,
        hidden_features: Sequence[int] = (16, 16),
        one_pass: OnePass = "inverse",
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        order = list(range(features))
        layers = [
            BlockLayer(
                features,
                context,
                one_pass=one_pass,
                order=order if i % 2 == 0 else order[::-1],
                hidden_features=hidden_features,
            )
            for i in range(transforms)
        ]
        stack = mixed(layers, features, mixing, act_norm)
        super().__init__(stack, features, context, base, support)
