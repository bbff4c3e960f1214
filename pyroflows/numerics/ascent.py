"""Many ascents to the modes of a density at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Pairs of differences kept, halvings of a step, and the share of the expected rise that it needs.
MEMORY, HALVINGS, SUFFICIENT = 8, 12, 1e-4
#: A row that rises by less has arrived, in nats for log densities.
LEAST_RISE = 1e-3

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


class _InverseHessian:
    """The product of each row with its own approximate inverse Hessian, from recent steps."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scale: Tensor | None = None

    def update(self, step: Tensor, change: Tensor) -> None:
        """Learn from steps and the changes of the (descending) gradient along them."""
        curvature = _dot(step, change)
        # Rows without positive curvature learn nothing: a weight of zero leaves a pair out.
        useful = curvature > 1e-10 * (_dot(step, step) * _dot(change, change)).sqrt()
        weight = torch.where(useful, 1 / curvature, torch.zeros_like(curvature))
        scale = torch.where(useful, curvature / _dot(change, change), torch.zeros_like(curvature))
        before = torch.ones_like(scale) if self.scale is None else self.scale
        self.scale = torch.where(useful, scale, before)
        self.pairs = [*self.pairs[-MEMORY + 1 :], (step, change, weight)]

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.scale is None:
            # No curvature is known yet: a first step of at most length one.
            return gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1.0)
        shares = []
        for step, change, weight in reversed(self.pairs):
            share = weight * _dot(step, gradient)
            gradient = gradient - share * change
            shares.append(share)
        direction = self.scale * gradient
        for (step, change, weight), share in zip(self.pairs, reversed(shares), strict=True):
            direction = direction + (share - weight * _dot(change, direction)) * step
        return direction


def ascend(function: ValueAndGradient, points: Tensor, steps: int) -> Iterator[Tensor]:
    """Points on the ways from several starts to maxima, by L-BFGS, one batch after the other.

    Every row has its own inverse Hessian and its own halvings of the step; all rows that are still
    going are evaluated together. A row ends where a step makes it rise by less than a thousandth.

    Parameters
    ----------
    function
        From points ``(K, D)`` to values ``(K,)``, minus infinity where undefined, and gradients
        ``(K, D)``.
    points
        Starts, shape ``(K, D)``.
    steps
        Number of steps at most.

    References
    ----------
    Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", Mathematical
    Programming 1989.

    Examples
    --------
    >>> def function(x):
    ...     return -(x**4).sum(-1), -4 * x**3
    >>> *_, last = ascend(function, torch.tensor([[3.0], [-1.0]]), 50)
    >>> bool((last.abs() < 0.2).all())
    True
    """
    inverse_hessian = _InverseHessian()
    values, gradients = function(points)
    going = torch.arange(len(points), device=points.device)
    yield points
    for _ in range(steps):
        direction = inverse_hessian(gradients)
        slope = _dot(direction, gradients).squeeze(-1)
        there, new_values, new_gradients = points.clone(), values.clone(), gradients.clone()
        rows, size = going, 1.0
        for _ in range(HALVINGS):
            tried = points[rows] + size * direction[rows]
            found, slopes = function(tried)
            enough = found >= values[rows] + SUFFICIENT * size * slope[rows]
            rises = (enough | found.isposinf()) & (found > -torch.inf)
            risen = rows[rises]
            there[risen], new_values[risen] = tried[rises], found[rises]
            new_gradients[risen] = slopes[rises]
            rows, size = rows[~rises], size / 2
            if not len(rows):
                break
        going = going[(new_values - values)[going] > LEAST_RISE]
        if not len(going):
            return
        inverse_hessian.update(there - points, gradients - new_gradients)
        points, values, gradients = there, new_values, new_gradients
        yield points
