"""Smooth bounds: their gradients are the gradients of the bounded function."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_clamp(x: Tensor, bound: float) -> Tensor:
    r"""Map the real line smoothly onto an open interval, as the identity near zero.

    .. math:: f(x) = \frac{2 c}{\pi} \arctan\!\left(\frac{\pi x}{2 c}\right) \in (-c, c)

    Infinitely differentiable, with :math:`f'(0) = 1` and :math:`f''(0) = 0`. Its derivative falls
    as :math:`1 / x^2` only, so that gradients survive far out.

    Parameters
    ----------
    x
        Any shape.
    bound
        The half-width :math:`c > 0`.

    References
    ----------
    Andrade, "Stable training of normalizing flows for high-dimensional variational inference",
    2024.

    Examples
    --------
    >>> soft_clamp(torch.tensor([0.0, 0.1, 1e30]), 2.0)
    tensor([0.0000, 0.0998, 2.0000])
    """
    stretch = math.pi / (2 * bound)
    return torch.atan(x * stretch) / stretch


def bounded_exp(x: Tensor, bound: float) -> Tensor:
    """Exponential of a soft-clamped exponent: positive, between ``exp(-bound)`` and ``exp(bound)``.

    Examples
    --------
    >>> bounded_exp(torch.zeros(2), 3.0)
    tensor([1., 1.])
    """
    return soft_clamp(x, bound).exp()
