"""Autoregressive flows whose conditioners are causal transformers."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from pyroflows.distributions import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.layers import TransformerLayer
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import Affine, Univariate


class TransformerAR(Flow):
    r"""Autoregressive flow by causal attention over the features, for hundreds of them.

    .. math:: y_i = u(x_i;\, \theta_i(x_{<i}, c))

    One direction costs one pass of each of the ``transforms`` networks: time and memory grow with
    the square of the features, the number of parameters only in proportion to them. The other goes
    feature by feature at the arithmetic of one pass. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of autoregressive layers; the order of the features alternates.
    width, heads, blocks, activation
        Of the conditioners, see `pyroflows.nn.CausalTransformer`.
    univariate
        Recipe of the scalar maps, for instance ``pyroflows.transforms.RationalQuadratic()``; by
        default affine.
    one_pass
        The direction that takes one pass: ``"inverse"`` for densities, ``"forward"`` for sampling.
    mixing
        See `NSF`; None for none.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Zhai et al., "Normalizing flows are capable generative models", ICML 2025; Patacchiola,
    Shysheya, Hofmann and Turner, "Transformer neural autoregressive flows", 2024.

    Examples
    --------
    >>> TransformerAR(3, width=16)().log_prob(torch.zeros(3))
    tensor(-2.7568, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 4,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        activation: Activation = nn.SiLU,
        univariate: Univariate = Affine(),  # noqa: B008  (frozen)
        one_pass: Literal["forward", "inverse"] = "inverse",
        mixing: Mixing = None,
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        order = list(range(features))
        layers = [
            TransformerLayer(
                features,
                context,
                one_pass=one_pass,
                order=order if i % 2 == 0 else order[::-1],
                univariate=univariate,
                width=width,
                heads=heads,
                blocks=blocks,
                activation=activation,
            )
            for i in range(transforms)
        ]
        super().__init__(
            mixed(layers, features, mixing, act_norm), features, context, base, support
        )
