"""Straight lines beyond a box."""

from __future__ import annotations

from torch import Tensor

from pyroflows.numerics.roots import Increasing


def straight_tails(function: Increasing, x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Evaluate an increasing function on a box, and beyond it the tangents at its edges.

    The result is continuously differentiable and onto the reals, and never evaluates the function
    outside of the box.

    Parameters
    ----------
    function
        From points to values and logarithms of slopes, elementwise.
    x
        Points, any shape.
    bound
        Half-width of the box.

    Examples
    --------
    >>> straight_tails(lambda x: (x**3, (3 * x**2).log()), torch.tensor([0.5, 3.0]), bound=1.0)
    (tensor([0.1250, 7.0000]), tensor([-0.2877,  1.0986]))
    """
    inner = x.clamp(-bound, bound)
    value, log_slope = function(inner)
    return value + log_slope.exp() * (x - inner), log_slope
