"""Integrals by Gauss's rule."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


@functools.cache
def _rule(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on the unit interval."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return ((1 + points) / 2).tolist(), (weights / 2).tolist()


def gauss_legendre(
    function: Callable[[Tensor], Tensor], x: Tensor, nodes: int
) -> tuple[Tensor, Tensor]:
    r"""The integral :math:`\int_0^x f(t)\,dt` by the Gauss-Legendre rule, and :math:`f(x)`.

    It is exact for polynomials of degree ``2 * nodes - 1``, and for functions that are analytic
    around the interval the error falls geometrically with the number of nodes.

    Parameters
    ----------
    function
        Elementwise, called once with points of shape ``(nodes + 1, *batch)``.
    x
        Upper limits, shape ``(*batch)``.
    nodes
        Number of points for each integral.

    Examples
    --------
    >>> gauss_legendre(lambda t: 3 * t**2, torch.tensor([1.0, -2.0]), nodes=2)
    (tensor([ 1., -8.]), tensor([ 3., 12.]))
    """
    points, weights = (
        torch.tensor(numbers, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * x.dim())
        for numbers in _rule(nodes)
    )
    values = function(torch.cat([points * x, x.unsqueeze(0)]))
    return x * (weights * values[:-1]).sum(0), values[-1]
