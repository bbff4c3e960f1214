"""Residual flows: layers that add a contraction to the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pyroflows.distributions import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.layers import ResidualLayer
from pyroflows.layers.planar import OnePass


class ResidualFlow(Flow):
    r"""Residual flow: each layer adds a contraction, :math:`x + g(x)`, all features at once.

    One direction (by default the density) is closed-form: for each layer one network pass, and for
    the log-determinant one vector-Jacobian product for each feature, or some 18 one after another
    where it is estimated. The other solves a fixed point for each layer: some ten passes, each with
    a Jacobian (up to 64 features), or up to hundreds of plain ones. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of residual layers.
    hidden_features
        Of the networks, see `pyroflows.nn.LipschitzMLP`.
    one_pass
        The closed-form direction: ``"inverse"`` for densities of data, ``"forward"`` for guides.
    log_det
        ``"exact"``, ``"unbiased"`` (densities are random estimates, in nats), or ``"auto"``: exact
        up to 64 features. The weights of one serve the other.
    lipschitz
        Bound of each network's Lipschitz constant, below 1.
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
    Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML 2019;
    Chen, Behrmann, Duvenaud and Jacobsen, "Residual flows for invertible generative modeling",
    NeurIPS 2019.

    Examples
    --------
    >>> ResidualFlow(3)().log_prob(torch.zeros(3))
    tensor(-2.7568, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        one_pass: OnePass = "inverse",
        log_det: Literal["auto", "exact", "unbiased"] = "auto",
        lipschitz: float = 0.97,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        layers = [
            ResidualLayer(
                features,
                context,
                one_pass=one_pass,
                log_det=log_det,
                lipschitz=lipschitz,
                hidden_features=hidden_features,
            )
            for _ in range(transforms)
        ]
        stack = mixed(layers, features, mixing, act_norm)
        super().__init__(stack, features, context, base, support)
