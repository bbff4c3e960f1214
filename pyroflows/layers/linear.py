"""Linear layers: permutation, LU mixing, activation normalisation, standardisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.transforms import (
    DiagonalAffineTransform,
    LUTransform,
    PermutationTransform,
)


class Permutation(Layer):
    """Fixed reordering of the features, saved with the weights.

    Parameters
    ----------
    features
        Size of the event.
    order
        ``y[..., i] = x[..., order[i]]``; by default the reversal.

    Examples
    --------
    >>> Permutation(3)()(torch.tensor([1.0, 2.0, 3.0]))
    tensor([3., 2., 1.])
    """

    order: Tensor

    def __init__(self, features: int, order: Tensor | Sequence[int] | None = None) -> None:
        super().__init__()
        check_sizes(features, 0)
        order = torch.arange(features).flip(0) if order is None else torch.as_tensor(order)
        if order.tolist() and sorted(order.tolist()) != list(range(features)):
            raise ValueError(f"order: expected a permutation of {features} features, got {order}")
        self.register_buffer("order", order)

    def forward(self, context: Tensor | None = None) -> PermutationTransform:
        return PermutationTransform(self.order)


class LULinear(Layer):
    r"""Learned dense affine map by its LU factors, :math:`y = L U x + b`.

    Starts as the identity; ``log|det|`` costs nothing. Forward is one matrix product, the inverse
    two triangular solves. It rotates, scales and correlates features between nonlinear layers.

    Parameters
    ----------
    features
        Size of the event.

    References
    ----------
    Kingma and Dhariwal, "Glow", NeurIPS 2018; Durkan et al., "Neural spline flows", NeurIPS 2019.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_sizes(features, 0)
        self.factors = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, context: Tensor | None = None) -> LUTransform:
        return LUTransform(self.factors, self.log_diagonal, self.bias)


class ActNorm(Layer):
    r"""Activation normalisation: a learned elementwise affine map, :math:`y = x \odot e^s + t`.

    Starts as the identity. The fit functions, and never a forward pass, call `initialize_` once on
    data, so that what leaves the layer on the base side has mean zero and unit variance. Whether
    that has happened is saved with the weights.

    Parameters
    ----------
    features
        Size of the event.

    References
    ----------
    Kingma and Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", NeurIPS 2018.
    """

    initialized: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        check_sizes(features, 0)
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, context: Tensor | None = None) -> DiagonalAffineTransform:
        return DiagonalAffineTransform(self.shift, self.log_scale)

    @torch.no_grad()
    def initialize_(self, y: Tensor) -> None:
        """Set shift and scale to the mean and deviation of ``y``, unless that was done before."""
        if self.initialized:
            return
        rows = y.reshape(-1, y.shape[-1])
        self.shift.copy_(rows.mean(0))
        # A constant column keeps its scale.
        scale = rows.std(0, correction=0)
        self.log_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)).log())
        self.initialized.fill_(True)


class Standardization(Layer):
    r"""Fixed location and scale, :math:`y = x \odot \text{scale} + \text{loc}`, as buffers.

    The identity from construction; the fit functions set it from data, guides from the model.

    Parameters
    ----------
    event_shape
        Shape of the event.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(tuple(event_shape)))
        self.register_buffer("scale", torch.ones(tuple(event_shape)))

    def forward(self, context: Tensor | None = None) -> DiagonalAffineTransform:
        return DiagonalAffineTransform(self.loc, self.scale.log())

    @torch.no_grad()
    def set_(self, loc: Tensor | float, scale: Tensor | float) -> None:
        """Set the location and the (positive) scale, broadcast to the event."""
        scale = torch.as_tensor(scale)
        if not (scale > 0).all():
            raise ValueError(f"scale: expected positive numbers, got {scale}")
        self.loc.copy_(torch.as_tensor(loc))
        self.scale.copy_(scale)

    def is_identity(self) -> bool:
        """Whether nothing has set it yet."""
        return bool((self.loc == 0).all() and (self.scale == 1).all())
