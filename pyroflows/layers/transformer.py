"""Autoregression whose parameters a causal transformer gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.nn import CausalTransformer, Conditioner
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import (
    Affine,
    AutoregressiveTransform,
    InverseTransform,
    Transform,
    Univariate,
)


class TransformerLayer(Layer):
    r"""Autoregression: each feature is mapped, given those before it, by a causal transformer.

    .. math:: y_i = u(x_i;\, \theta_i(x_{<i}, c))

    One direction costs one network pass. The other goes feature by feature; it computes each token
    once, so it costs the arithmetic of one pass in ``features`` steps. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    one_pass
        The direction that takes one pass: ``"inverse"`` for densities, ``"forward"`` for sampling.
    order
        The features in the order of their dependence; by default ``0, 1, ...``.
    univariate
        Recipe of the scalar map; by default affine.
    width, heads, blocks, activation
        Of the `pyroflows.nn.CausalTransformer` conditioner.

    References
    ----------
    Patacchiola, Shysheya, Hofmann and Turner, "Transformer neural autoregressive flows", 2024.

    Examples
    --------
    >>> TransformerLayer(3, one_pass="forward", width=8)()(torch.ones(3))
    tensor([1., 1., 1.], grad_fn=<...>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        one_pass: Literal["forward", "inverse"] = "inverse",
        order: Sequence[int] | None = None,
        univariate: Univariate = Affine(),  # noqa: B008  (frozen)
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        check_sizes(features, context)
        if one_pass not in ("forward", "inverse"):
            raise ValueError(f"one_pass: expected 'forward' or 'inverse', got {one_pass!r}")
        self.one_pass = one_pass
        self.univariate = univariate
        self.network = CausalTransformer(
            features, context, univariate.count, width, heads, blocks, activation, order
        )

    def forward(self, context: Tensor | None = None) -> Transform:
        conditioner = Conditioner(self.network, self.univariate.count, context, reducible=True)
        transform = AutoregressiveTransform(self.univariate, conditioner)
        return transform if self.one_pass == "forward" else InverseTransform(transform)
