"""Determinants."""

from __future__ import annotations

import torch
from torch import Tensor


def log_abs_det(matrix: Tensor) -> Tensor:
    r""":math:`\log|\det A|` of square matrices, by the diagonal of their LU factorisation.

    The gradient of torch's ``slogdet`` is wrong once Inductor of torch 2.13 has compiled it for a
    CPU; that of the factorisation is right.

    Parameters
    ----------
    matrix
        Shape ``(*batch, n, n)``, not singular.

    Returns
    -------
    Tensor
        Shape ``(*batch,)``, in nats.

    Examples
    --------
    >>> log_abs_det(torch.tensor([[0.0, 2.0], [-3.0, 0.0]]))
    tensor(1.7918)
    """
    factors, _ = torch.linalg.lu_factor(matrix)
    return factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
