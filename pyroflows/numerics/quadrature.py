"""Integrals by Gauss's rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Compiled code can look a rule up, and cannot compute it: it reads through `functools.cache`.
_RULES: dict[int, tuple[list[float], list[float]]] = {}


def legendre_rule(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss's rule on the unit interval.

    What is to be compiled asks for its rule once before.

    Examples
    --------
    >>> legendre_rule(1)
    ([0.5], [1.0])
    """
    if nodes not in _RULES:
        points, weights = np.polynomial.legendre.leggauss(nodes)
        _RULES[nodes] = ((1 + points) / 2).tolist(), (weights / 2).tolist()
    return _RULES[nodes]


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
        for numbers in legendre_rule(nodes)
    )
    values = function(torch.cat([points * x, x.unsqueeze(0)]))
    return x * (weights * values[:-1]).sum(0), values[-1]
