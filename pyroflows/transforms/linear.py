"""Linear maps: permutation, elementwise affine, LU, triangular, matrix exponential, pixelwise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics import log_abs_det, sum_rightmost
from pyroflows.transforms.base import Transform, call_and_ladj, inverse_and_ladj


class PermutationTransform(Transform):
    """Reordering of the features, ``y[..., i] = x[..., order[i]]``.

    Examples
    --------
    >>> PermutationTransform(torch.tensor([2, 0, 1]))(torch.tensor([1.0, 2.0, 3.0]))
    tensor([3., 1., 2.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.order), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.order.argsort()), y.new_zeros(y.shape[:-1])


class DiagonalAffineTransform(Transform):
    r"""Elementwise affine map of a whole event, :math:`y = x \odot e^{s} + t`.

    Parameters
    ----------
    shift, log_scale
        Tensors of the event's shape.
    """

    def __init__(self, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.event_dims = shift.dim()
        if log_scale.shape != shift.shape:  # the sum of log-scales is over all features
            shift, log_scale = torch.broadcast_tensors(shift, log_scale)
        self.shift, self.log_scale = shift, log_scale
        self.domain = self.codomain = constraints.independent(constraints.real, self.event_dims)

    def _ladj(self, value: Tensor) -> Tensor:
        batch = value.shape[: value.dim() - self.event_dims]
        return sum_rightmost(self.log_scale, self.event_dims).expand(batch)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.addcmul(self.shift, x, self.log_scale.exp())
        return y, self._ladj(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.shift) * (-self.log_scale).exp()
        return x, -self._ladj(x)


class LUTransform(Transform):
    r"""Dense affine map by its LU factors, :math:`y = L U x + b`.

    :math:`L` is unit lower triangular, :math:`U` upper triangular with diagonal
    :math:`e^{d} > 0`; ``log|det| = sum(d)``. The inverse is two triangular solves.

    Parameters
    ----------
    factors
        Shape ``(features, features)``: strictly below the diagonal those of :math:`L`, strictly
        above those of :math:`U`; the diagonal is not read.
    log_diagonal, bias
        :math:`d` and :math:`b`, shape ``(features,)``.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, factors: Tensor, log_diagonal: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.factors = factors
        self.log_diagonal = log_diagonal
        self.bias = bias

    def _lower_upper(self) -> tuple[Tensor, Tensor]:
        lower = self.factors.tril(-1) + torch.ones_like(self.log_diagonal).diag()
        upper = self.factors.triu(1) + self.log_diagonal.exp().diag()
        return lower, upper

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._lower_upper()
        y = x @ (lower @ upper).mT + self.bias
        return y, self.log_diagonal.sum().expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._lower_upper()
        # One matrix of right-hand sides: batch dimensions would repeat the solve.
        rhs = (y - self.bias).reshape(-1, y.shape[-1])
        rhs = torch.linalg.solve_triangular(lower.mT, rhs, upper=True, left=False)
        x = torch.linalg.solve_triangular(upper.mT, rhs, upper=False, left=False)
        return x.reshape(y.shape), -self.log_diagonal.sum().expand(y.shape[:-1])


class TriangularAffineTransform(Transform):
    r"""Dense affine map by a lower triangular matrix, :math:`y = L x + b`.

    ``log|det|`` is the sum of the diagonal's logarithms. Forward is one matrix product, the inverse
    one triangular solve. With :math:`L` a Cholesky factor it gives a standard normal any
    covariance.

    Parameters
    ----------
    factor
        :math:`L`, shape ``(features, features)``: the diagonal is positive, what lies above it is
        not read.
    bias
        :math:`b`, shape ``(features,)``.

    Examples
    --------
    >>> factor = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    >>> TriangularAffineTransform(factor, torch.zeros(2))(torch.ones(2))
    tensor([2., 2.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, factor: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.factor = factor
        self.bias = bias

    def _log_det(self, like: Tensor) -> Tensor:
        return self.factor.diagonal().log().sum().expand(like.shape[:-1])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.factor.tril().mT + self.bias
        return y, self._log_det(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # One matrix of right-hand sides: batch dimensions would repeat the solve.
        rhs = (y - self.bias).reshape(-1, y.shape[-1])
        x = torch.linalg.solve_triangular(self.factor.mT, rhs, upper=True, left=False)
        return x.reshape(y.shape), -self._log_det(y)


class LowRankAffineTransform(Transform):
    r"""Affine map with few correlated directions, :math:`y = s \odot x' + b`.

    .. math:: x' = x + U \left((t - 1) \odot U^\top x\right)

    stretches by :math:`t` along the orthonormal columns of :math:`U`. It gives a standard normal a
    covariance of low rank plus diagonal. Each direction costs two products with ``features`` by
    ``rank`` numbers; determinant and inverse are those of a matrix of the rank's size, and exact
    however the columns were rounded.

    Parameters
    ----------
    scale, bias
        :math:`s`, positive, and :math:`b`, shape ``(features,)``.
    basis
        :math:`U`, shape ``(features, rank)``, orthonormal columns.
    stretch
        :math:`t`, positive, shape ``(rank,)``.

    Examples
    --------
    >>> basis = torch.tensor([[0.6], [0.8]])
    >>> stretch = torch.tensor([3.0])
    >>> LowRankAffineTransform(torch.ones(2), torch.zeros(2), basis, stretch)(basis[:, 0])
    tensor([1.8000, 2.4000])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, scale: Tensor, bias: Tensor, basis: Tensor, stretch: Tensor) -> None:
        super().__init__()
        self.scale = scale
        self.bias = bias
        self.basis = basis
        self.stretch = stretch

    def _small(self) -> Tensor:
        gram = self.basis.mT @ self.basis
        unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return unit + (self.stretch - 1).unsqueeze(-1) * gram

    def _log_det(self, small: Tensor, like: Tensor) -> Tensor:
        log_det = self.scale.log().sum() + log_abs_det(small)
        return log_det.expand(like.shape[:-1])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        along = (x @ self.basis) * (self.stretch - 1)
        y = (x + along @ self.basis.mT) * self.scale + self.bias
        return y, self._log_det(self._small(), y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        small = self._small()
        x = (y - self.bias) / self.scale
        along = (x @ self.basis) * (self.stretch - 1)
        along = torch.linalg.solve(small, along.reshape(-1, len(small)).mT).mT.reshape(along.shape)
        return x - along @ self.basis.mT, -self._log_det(small, y)


class MatrixExponentialTransform(Transform):
    r"""Dense affine map by the exponential of a matrix, :math:`y = e^{W} x + b`.

    ``log|det|`` is the trace of :math:`W`, and the inverse matrix is :math:`e^{-W}`. Each direction
    costs one matrix exponential, some ten products of matrices, and one product with the values.

    Parameters
    ----------
    weight, bias
        :math:`W` and :math:`b`, shapes ``(features, features)`` and ``(features,)``.

    References
    ----------
    Hoogeboom, Garcia Satorras, Tomczak and Welling, "The convolution exponential and generalized
    Sylvester flows", NeurIPS 2020; Xiao and Liu, "Generative flows with matrix exponential",
    ICML 2020.

    Examples
    --------
    >>> turn = MatrixExponentialTransform(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.zeros(2))
    >>> turn(torch.tensor([1.0, 0.0]))
    tensor([0.5403, 0.8415])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ torch.linalg.matrix_exp(self.weight).mT + self.bias
        return y, self.weight.trace().expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.bias) @ torch.linalg.matrix_exp(-self.weight).mT
        return x, -self.weight.trace().expand(x.shape[:-1])


class PixelwiseTransform(Transform):
    """A map of the channels, applied at every pixel of an image ``(channels, height, width)``.

    With a linear map it is a 1x1 convolution. Log-determinants add up over the pixels.

    Parameters
    ----------
    transform
        Map of a vector of the channels.

    Examples
    --------
    >>> swap = PixelwiseTransform(PermutationTransform(torch.tensor([1, 0])))
    >>> swap(torch.arange(4.0).reshape(2, 1, 2))
    tensor([[[2., 3.]],
    <BLANKLINE>
            [[0., 1.]]])
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = domain

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform
        self.sequential_forward = transform.sequential_forward
        self.sequential_inverse = transform.sequential_inverse

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = call_and_ladj(self.transform, x.movedim(-3, -1))
        return y.movedim(-1, -3), ladj.sum((-2, -1))

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = inverse_and_ladj(self.transform, y.movedim(-3, -1))
        return x.movedim(-1, -3), ladj.sum((-2, -1))
