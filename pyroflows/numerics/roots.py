"""Roots of increasing functions, elementwise, with gradients by implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from pyroflows.errors import InversionError
from pyroflows.numerics.concrete import has_values

#: An elementwise increasing function: its value and the logarithm of its slope.
Increasing = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Most steps of each phase, and how many there are where values cannot be looked at.
WIDENINGS, FIXED_WIDENINGS = 60, 12
STEPS, FIXED_STEPS = 200, 60
#: Accepted error, in units in the last place of value and point.
ROUNDINGS = 1024


# Compiled code calls it as it is: unrolled, its loop would be thousands of operations. The public
# `torch.compiler.disable` does the same, and takes a second of every import.
@_disable_dynamo
def increasing_root(
    function: Increasing, y: Tensor, tolerance: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`f(x) = y` elementwise for an increasing function of the real line.

    A bracket is widened until it holds the root; inside it Newton's method is used where it
    converges, and bisection elsewhere. The first and second derivatives of the root, with respect
    to ``y`` and to whatever ``function`` depends on, are those of the implicit function: two
    differentiable Newton steps from the root carry them.

    Parameters
    ----------
    function
        From points to values and logarithms of slopes, elementwise. It has to be onto the reals.
    y
        Values, any shape that broadcasts with what ``function`` holds.
    tolerance
        Largest residual, relative to the size of value and point; by default 1024 units in the
        last place of the dtype.

    Returns
    -------
    tuple of Tensor
        The root, and the logarithm of the slope of the inverse function there. NaN where ``y`` is.

    Raises
    ------
    InversionError
        Where the tolerance is not met; not inside ``torch.func`` transforms, while tracing or on
        the meta device, where the number of steps is fixed; a root that was not bracketed is NaN.

    References
    ----------
    Press, Teukolsky, Vetterling and Flannery, "Numerical recipes", section 9.4 (safe Newton).

    Examples
    --------
    >>> cubic = lambda x: (x**3 + x, (3 * x**2 + 1).log())
    >>> x, log_slope = increasing_root(cubic, torch.tensor(10.0))
    >>> x
    tensor(2.)
    """
    with torch.no_grad():
        x = _solve(function, y)
        if has_values(x):
            _check(function, x, y, tolerance)
    if torch.is_grad_enabled():
        for _ in range(2):
            value, log_slope = function(x)
            x = x - (value - y) * (-log_slope).exp()
    return x, -function(x)[1]


def _solve(function: Increasing, y: Tensor) -> Tensor:
    """The root, without gradients."""
    value, log_slope = function(y)
    start = y.expand(value.shape)
    low, high, found = _bracket(function, start, y, 1 + (value - y).abs())
    previous = high - low
    x = start - (value - y) * (-log_slope).exp()
    x = torch.where((x > low) & (x < high), x, (low + high) / 2)
    known = has_values(x)
    accuracy = 2 * torch.finfo(x.dtype).eps
    rounding = 8 * accuracy * (1 + y.abs())
    for _ in range(STEPS if known else FIXED_STEPS):
        value, log_slope = function(x)
        residual = value - y
        low, high = torch.where(residual < 0, x, low), torch.where(residual < 0, high, x)
        step = -residual * (-log_slope).exp()
        # Within the rounding of value or point, none is better than another.
        settled = (residual.abs() <= rounding) | (step.abs() <= 4 * accuracy * (1 + x.abs()))
        # Newton's step counts where it stays inside and is at most half of the one before.
        fast = (x + step > low) & (x + step < high) & (2 * step.abs() <= previous)
        step = torch.where(fast, step, (low + high) / 2 - x)
        step = torch.where(settled, torch.zeros_like(step), step)
        x, previous = x + step, step.abs()
        # Not "step > ...": a NaN has nowhere to go.
        if known and not (previous > accuracy * (1 + x.abs())).any():
            break
    return torch.where(found & ~value.isnan(), x, torch.full_like(x, torch.nan))


def _bracket(
    function: Increasing, start: Tensor, y: Tensor, width: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points below and above the root, from steps that grow fourfold, and whether they are."""
    low, high = start - width, start + width
    known = has_values(width)
    for _ in range(WIDENINGS if known else FIXED_WIDENINGS):
        too_high, too_low = function(low)[0] > y, function(high)[0] < y
        if known and not (too_high | too_low).any():
            break
        width = 4 * width
        # What proved to lie on the other side of the root is a bound there.
        low, high = (
            torch.where(too_high, low - width, torch.where(too_low, high, low)),
            torch.where(too_low, high + width, torch.where(too_high, low, high)),
        )
    return low, high, (function(low)[0] <= y) & (function(high)[0] >= y)


def _check(function: Increasing, x: Tensor, y: Tensor, tolerance: float | None) -> None:
    if tolerance is None:
        tolerance = ROUNDINGS * torch.finfo(x.dtype).eps
    value, log_slope = function(x)
    residual = (value - y).abs()
    # What a rounding of the point, and one of the value, change.
    allowed = tolerance * (1 + y.abs() + log_slope.exp() * (1 + x.abs()))
    # What the function holds may be NaN itself: then so is its root.
    wrong = (residual > allowed) | (x.isnan() & ~function(y)[0].isnan())
    if wrong.any():
        worst = torch.where(wrong, residual / allowed, torch.zeros_like(residual))
        worst = worst.nan_to_num(torch.inf).flatten().argmax()
        raise InversionError(
            f"inverse: {int(wrong.sum())} of {wrong.numel()} root(s) were not found to a relative "
            f"tolerance of {tolerance:.1e}; the worst residual is "
            f"{residual.flatten()[worst].item():.3g} at y = "
            f"{y.expand(x.shape).flatten()[worst].item():.6g}. The map may not reach it, or "
            "rounding hides it: use float64, or smaller parameters."
        )
