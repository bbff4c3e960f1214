"""Linear layers: permutations, dense maps, activation normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.transforms import (
    DiagonalAffineTransform,
    LUTransform,
    MatrixExponentialTransform,
    PermutationTransform,
    PixelwiseTransform,
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

    @classmethod
    def random(cls, features: int, generator: torch.Generator | None = None) -> Permutation:
        """A permutation drawn at random, once: it is saved like any other.

        Parameters
        ----------
        features
            Size of the event.
        generator
            By default torch's own.

        Examples
        --------
        >>> Permutation.random(4, torch.Generator().manual_seed(0)).order
        tensor([0, 1, 3, 2])
        """
        return cls(features, torch.randperm(features, generator=generator))

    def forward(self, context: Tensor | None = None) -> PermutationTransform:
        return PermutationTransform(self.order)


class LearnedPermutation(Layer):
    r"""Reordering of the features that the fit functions choose from data, once.

    Starts as the identity. `initialize_` puts first, on the base side, the feature that the others
    explain least, last the one that they explain best, by the share of variance :math:`R^2_i` of
    linear regressions on all others. An autoregressive layer on the base side then begins with what
    it must model by itself. The criterion sees linear dependence only, and no order is best for all
    data: where the order matters, a learned mixing (`LULinear`) does more.

    Parameters
    ----------
    features
        Size of the event.

    Examples
    --------
    >>> x = torch.randn(100, 1) * torch.tensor([1.0, 0.0, 2.0]) + torch.randn(100, 3)
    >>> layer = LearnedPermutation(3)
    >>> layer.initialize_(x)
    >>> layer().inv(torch.arange(3))[0]
    tensor(1)
    """

    order: Tensor
    initialized: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        check_sizes(features, 0)
        self.register_buffer("order", torch.arange(features))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, context: Tensor | None = None) -> PermutationTransform:
        return PermutationTransform(self.order)

    @torch.no_grad()
    def initialize_(self, y: Tensor) -> None:
        """Choose the order from ``y``, unless that was done before."""
        if self.initialized:
            return
        rows = y.reshape(-1, y.shape[-1]).double()
        rows = rows - rows.mean(0)
        scale = rows.square().mean(0).sqrt()
        # A constant column is explained by nothing, and correlates with nothing.
        rows = rows / torch.where(scale > 0, scale, torch.ones_like(scale))
        correlation = rows.mT @ rows / max(len(rows), 1)
        # The inverse's diagonal is 1 / (1 - R^2); the ridge bounds it where columns are copies.
        ridge = torch.full_like(scale, 1e-6).diag()
        explained = torch.linalg.inv(correlation + ridge).diagonal() * correlation.diagonal()
        self.order.copy_(explained.argsort(stable=True).argsort())
        self.initialized.fill_(True)


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


class MatrixExponential(Layer):
    r"""Learned dense affine map by a matrix exponential, :math:`y = e^{W} x + b`.

    Starts as the identity; ``log|det|`` is the trace of :math:`W`. Each direction costs one matrix
    exponential (some ten products of matrices) and one product with the values, a gradient one of
    twice the size: dearer than `LULinear`, but free of any order of the features, and alike in both
    directions.

    Parameters
    ----------
    features
        Size of the event.

    References
    ----------
    Xiao and Liu, "Generative flows with matrix exponential", ICML 2020.

    Examples
    --------
    >>> MatrixExponential(2)()(torch.ones(2))
    tensor([1., 1.], grad_fn=<AddBackward0>)
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_sizes(features, 0)
        self.weight = nn.Parameter(torch.zeros(features, features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, context: Tensor | None = None) -> MatrixExponentialTransform:
        return MatrixExponentialTransform(self.weight, self.bias)


class InvertibleConv1x1(Layer):
    r"""Invertible 1x1 convolution: one `LULinear` map of the channels, at every pixel.

    For events of shape ``(channels, height, width)``. Starts as the identity; ``log|det|`` is
    height times width times that of the map. Forward is one matrix product, the inverse two
    triangular solves, for all pixels together.

    Parameters
    ----------
    channels
        Size of the event's first dimension.

    References
    ----------
    Kingma and Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", NeurIPS 2018.

    Examples
    --------
    >>> pf.Flow([InvertibleConv1x1(3)], (3, 8, 8))().sample((5,)).shape
    torch.Size([5, 3, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = LULinear(channels)

    def forward(self, context: Tensor | None = None) -> PixelwiseTransform:
        return PixelwiseTransform(self.linear(context))


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
