"""Orthogonal maps of a vector event: they turn it and leave its volume alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.transforms.base import Transform


class OrthogonalTransform(Transform):
    r"""Orthogonal map by its matrix, :math:`y = Q x` with :math:`Q^{-1} = Q^\top`.

    ``log|det|`` is exactly 0. Each direction costs one matrix product.

    Parameters
    ----------
    matrix
        :math:`Q`, shape ``(features, features)``; its columns are taken to be orthonormal.

    Examples
    --------
    >>> OrthogonalTransform(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))(torch.tensor([1.0, 2.0]))
    tensor([-2.,  1.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.matrix.mT, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y @ self.matrix, y.new_zeros(y.shape[:-1])


class HouseholderTransform(Transform):
    r"""Rotation by a product of Householder reflections, :math:`y = H_1 \cdots H_k F x`.

    .. math:: H_i = I - 2 \frac{v_i v_i^\top}{v_i^\top v_i}, \qquad v_{ii} = 1

    :math:`F` flips the signs of the first :math:`k` features, which is what the reflections do
    where the other entries of all :math:`v_i` are zero: the map is then the identity. The fixed
    entry keeps every :math:`v_i` away from zero, so the map is smooth in its parameters. It is a
    rotation (orthogonal, determinant 1), and ``log|det|`` is exactly 0.

    The reflections are applied at once, :math:`H_1 \cdots H_k = I - U S^{-1} U^\top` with unit
    columns :math:`U` and a triangular :math:`S`: in each direction two products with the ``k``
    vectors and one triangular solve.

    Parameters
    ----------
    vectors
        The :math:`v_i` as rows, shape ``(reflections, features)``, no more rows than columns; the
        diagonal is not read.

    References
    ----------
    Tomczak and Welling, "Improving variational auto-encoders using Householder flow", 2016;
    Joffrain, Low, Quintana-Ortí, van de Geijn and Van Zee, "Accumulating Householder
    transformations, revisited", ACM Transactions on Mathematical Software 2006.

    Examples
    --------
    >>> HouseholderTransform(torch.zeros(2, 3))(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1., 2., 3.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The unit vectors as rows, the triangle S, and the signs of F."""
        raw = self.vectors
        eye = torch.eye(*raw.shape, dtype=raw.dtype, device=raw.device)
        vectors = raw * (1 - eye) + eye
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        halves = torch.ones_like(raw[:, 0]).diag() / 2
        return vectors, (vectors @ vectors.mT).triu(1) + halves, 1 - 2 * eye.sum(0)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vectors, triangle, signs = self._factors()
        # One matrix of right-hand sides: batch dimensions would repeat the solve.
        rows = (x * signs).reshape(-1, x.shape[-1])
        weights = rows @ vectors.mT
        weights = torch.linalg.solve_triangular(triangle.mT, weights, upper=False, left=False)
        return (rows - weights @ vectors).reshape(x.shape), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        vectors, triangle, signs = self._factors()
        rows = y.reshape(-1, y.shape[-1])
        weights = rows @ vectors.mT
        weights = torch.linalg.solve_triangular(triangle, weights, upper=True, left=False)
        return (rows - weights @ vectors).reshape(y.shape) * signs, y.new_zeros(y.shape[:-1])
