"""Layers whose univariate maps get their parameters from a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.nn import Conditioner, MaskedResidualMLP, PeriodicMLP, ResidualMLP
from pyroflows.nn.mlp import Activation
from pyroflows.transforms import (
    Affine,
    AutoregressiveTransform,
    CouplingTransform,
    InverseTransform,
    Transform,
    Univariate,
)


class CouplingLayer(Layer):
    r"""Coupling: some features are mapped, given the others and the context.

    .. math:: y_A = x_A, \qquad y_B = u(x_B;\, \theta(x_A, c))

    Forward and inverse cost one network pass each. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none). With one feature the parameters depend on
        the context alone.
    mask
        True for the features to map, shape ``(features,)``; by default the second half.
    univariate
        Recipe of the scalar map; by default affine.
    hidden_features, activation
        Of the `pyroflows.nn.ResidualMLP` conditioner.
    periodic
        Whether the features are angles, of which the conditioner is to see cosines and sines.

    References
    ----------
    Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017.

    Examples
    --------
    >>> layer = CouplingLayer(4)
    >>> layer()(torch.ones(4))
    tensor([1., 1., 1., 1.], grad_fn=<...>)
    """

    order: Tensor
    restore: Tensor

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        mask: Tensor | Sequence[bool] | None = None,
        univariate: Univariate = Affine(),  # noqa: B008  (frozen)
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        periodic: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(features, context)
        if mask is None:
            mask = torch.arange(features) >= features // 2
        mask = torch.as_tensor(mask, dtype=torch.bool)
        if mask.shape != (features,) or not mask.any():
            raise ValueError(
                f"mask: expected {features} booleans, at least one of them True, got {mask}"
            )
        # A stable sort keeps the features of each part in their own order.
        self.register_buffer("order", mask.int().argsort(stable=True))
        self.register_buffer("restore", self.order.argsort())
        self.kept = int((~mask).sum())
        self.univariate = univariate
        network = PeriodicMLP if periodic else ResidualMLP
        self.network = network(
            self.kept,
            context,
            univariate.count * (features - self.kept),
            hidden_features,
            activation,
        )

    def forward(self, context: Tensor | None = None) -> CouplingTransform:
        conditioner = Conditioner(self.network, self.univariate.count, context, reducible=True)
        return CouplingTransform(self.univariate, conditioner, self.order, self.restore, self.kept)


class AutoregressiveLayer(Layer):
    r"""Autoregression: each feature is mapped, given those before it and the context.

    One direction costs one network pass. The other goes feature by feature; it computes each hidden
    unit once, so it costs the arithmetic of one pass in ``features`` steps. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    one_pass
        The direction that takes one pass: ``"inverse"`` for densities (MAF), ``"forward"`` for
        sampling (IAF).
    order
        The features in the order of their dependence; by default ``0, 1, ...``.
    univariate
        Recipe of the scalar map; by default affine.
    hidden_features, activation
        Of the `pyroflows.nn.MaskedResidualMLP` conditioner.

    References
    ----------
    Papamakarios, Pavlakou and Murray, "Masked autoregressive flow", NeurIPS 2017; Kingma et al.,
    "Improved variational inference with inverse autoregressive flow", NeurIPS 2016.

    Examples
    --------
    >>> AutoregressiveLayer(3, one_pass="forward")()(torch.ones(3))
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
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        check_sizes(features, context)
        if one_pass not in ("forward", "inverse"):
            raise ValueError(f"one_pass: expected 'forward' or 'inverse', got {one_pass!r}")
        self.one_pass = one_pass
        self.univariate = univariate
        self.network = MaskedResidualMLP(
            features, context, univariate.count, hidden_features, activation, order
        )

    def forward(self, context: Tensor | None = None) -> Transform:
        conditioner = Conditioner(self.network, self.univariate.count, context, reducible=True)
        transform = AutoregressiveTransform(self.univariate, conditioner)
        return transform if self.one_pass == "forward" else InverseTransform(transform)
