"""Fixed affine maps to the place and scale of data or of a posterior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.transforms import (
    DiagonalAffineTransform,
    LowRankAffineTransform,
    Transform,
    TriangularAffineTransform,
)


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

    @property
    def rank(self) -> int:
        """Number of directions with a scale of their own beside the axes: none."""
        return 0

    def forward(self, context: Tensor | None = None) -> Transform:
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


class Whitening(Standardization):
    r"""Fixed affine map with correlations, :math:`y = \text{scale} \odot L x + \text{loc}`.

    The identity from construction. Guides set it to the Gaussian that fits their posterior best, so
    that their layers work where that has mean zero and unit covariance.

    Parameters
    ----------
    features
        Size of the event.

    Examples
    --------
    >>> whitening = Whitening(2)
    >>> whitening.set_covariance_(torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    >>> whitening().inv(torch.tensor([2.0, 0.5]))
    tensor([1., 0.])
    """

    factor: Tensor

    def __init__(self, features: int) -> None:
        super().__init__((features,))
        check_sizes(features, 0)
        self.register_buffer("factor", torch.eye(features))

    @property
    def rank(self) -> int:
        """Number of directions with a scale of their own: all."""
        return len(self.factor)

    def forward(self, context: Tensor | None = None) -> Transform:
        return TriangularAffineTransform(self.scale.unsqueeze(-1) * self.factor, self.loc)

    @torch.no_grad()
    def set_(self, loc: Tensor | float, scale: Tensor | float) -> None:
        """Set the location and the (positive) scale, without correlations."""
        super().set_(loc, scale)
        self.factor.copy_(torch.eye(len(self.factor)))

    @torch.no_grad()
    def set_covariance_(self, loc: Tensor, covariance: Tensor) -> None:
        """Set the mean and the covariance that a standard normal gets."""
        factor = torch.linalg.cholesky(covariance)
        scale = factor.norm(dim=-1)
        super().set_(loc, scale)
        self.factor.copy_(factor / scale.unsqueeze(-1))

    def is_identity(self) -> bool:
        return super().is_identity() and torch.equal(
            self.factor, torch.eye(len(self.loc)).to(self.factor)
        )


class LowRankWhitening(Standardization):
    r"""Fixed affine map with few correlated directions, for many features.

    .. math:: y = \text{scale} \odot \left(x + U ((t - 1) \odot U^\top x)\right) + \text{loc}

    The identity from construction. Guides set it as they set `Whitening` where fewer latents are.

    Parameters
    ----------
    features
        Size of the event.
    rank
        Number of columns of :math:`U`.

    Examples
    --------
    >>> whitening = LowRankWhitening(3, rank=1)
    >>> basis = torch.tensor([[0.6], [0.8], [0.0]])
    >>> whitening.set_low_rank_(torch.zeros(3), torch.ones(3), basis, torch.tensor([4.0]))
    >>> whitening()(torch.tensor([0.6, 0.8, 1.0]))
    tensor([1.2000, 1.6000, 1.0000])
    """

    basis: Tensor
    stretch: Tensor

    def __init__(self, features: int, rank: int) -> None:
        super().__init__((features,))
        check_sizes(features, 0)
        if not 1 <= rank <= features:
            raise ValueError(f"rank: expected 1 to {features}, the number of features, got {rank}")
        self.register_buffer("basis", torch.eye(features, rank))
        self.register_buffer("stretch", torch.ones(rank))

    @property
    def rank(self) -> int:
        """Number of directions with a scale of their own beside the axes."""
        return len(self.stretch)

    def forward(self, context: Tensor | None = None) -> Transform:
        return LowRankAffineTransform(self.scale, self.loc, self.basis, self.stretch)

    @torch.no_grad()
    def set_(self, loc: Tensor | float, scale: Tensor | float) -> None:
        """Set the location and the (positive) scale, without correlations."""
        super().set_(loc, scale)
        self.stretch.fill_(1.0)

    @torch.no_grad()
    def set_low_rank_(self, loc: Tensor, scale: Tensor, basis: Tensor, variance: Tensor) -> None:
        """Set location and scale, and the variances along an orthonormal basis, in these units."""
        if not (variance > 0).all():
            raise ValueError(f"variance: expected positive numbers, got {variance}")
        super().set_(loc, scale)
        self.basis.copy_(basis)
        self.stretch.copy_(variance.sqrt())

    def is_identity(self) -> bool:
        return super().is_identity() and bool((self.stretch == 1).all())
