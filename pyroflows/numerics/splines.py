"""Monotone splines with identity tails, their inverses and log-derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroflows.numerics.bounded import bounded_exp

# Bins narrower than this share of the box, and slopes beyond exp(+-LOG_SLOPE), lose float32
# accuracy without buying expressiveness.
MIN_BIN_SIZE = 1e-3
LOG_SLOPE = math.log(1e3)


def _knots(raw: Tensor, bound: float) -> Tensor:
    """Increasing knots from ``-bound`` to ``bound``: (bins, ...) -> (bins + 1, ...)."""
    bins = raw.shape[0]
    sizes = torch.softmax(raw, dim=0)
    # The count meets the tensor first: a trace would compute with counts in the default dtype.
    sizes = sizes + MIN_BIN_SIZE * (1 - bins * sizes)
    inner = bound * (2 * sizes[:-1].cumsum(0) - 1)
    edge = torch.full_like(raw[:1], bound)
    # The edges are exact, whatever the rounding of the sum.
    return torch.cat([-edge, inner, edge])


def _to_batch(raw: Tensor, shape: torch.Size) -> Tensor:
    """Parameters of each point: ``(bins, ...)`` to ``(bins, *shape)``, bins staying in front."""
    if raw.shape[1:] == shape:
        return raw
    missing = (1,) * (len(shape) + 1 - raw.dim())
    return raw.reshape(raw.shape[0], *missing, *raw.shape[1:]).expand(-1, *shape)


def _at_bin(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(0, index).squeeze(0)


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    slopes: Tensor,
    bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Monotone rational-quadratic spline on a box, the identity outside of it.

    With :math:`\xi = (x - x_k) / w_k` inside bin :math:`k` of width :math:`w_k`, height
    :math:`h_k`, mean slope :math:`s_k = h_k / w_k` and knot slopes :math:`\delta`,

    .. math::

        y = y_k + \frac{h_k\,[s_k \xi^2 + \delta_k \xi (1 - \xi)]}
                       {s_k + (\delta_{k+1} + \delta_k - 2 s_k)\, \xi (1 - \xi)}.

    Slopes at the two ends are one, so that the map is continuously differentiable everywhere.
    Raw parameters of zero give the identity.

    Parameters
    ----------
    x
        Points, shape ``(...)``.
    widths, heights
        Raw bin sizes (before a softmax), shape ``(bins, ...)``: bins lead.
    slopes
        Raw logarithms of the inner knot slopes, shape ``(bins - 1, ...)``.
    bound
        Half-width of the box, in units of ``x``.
    inverse
        Whether to evaluate the inverse map.

    Returns
    -------
    tuple of Tensor
        Values and logarithms of the derivative (of the inverse map where ``inverse``), each of the
        broadcast shape of ``x`` and the parameters.

    References
    ----------
    Durkan, Bekasov, Murray and Papamakarios, "Neural spline flows", NeurIPS 2019.

    Examples
    --------
    >>> raw = torch.zeros(4, 3)
    >>> rational_quadratic_spline(torch.tensor([-9.0, 0.75, 2.25]), raw, raw, raw[1:], bound=3.0)
    (tensor([-9.0000,  0.7500,  2.2500]), tensor([0., 0., 0.]))
    """
    shape = torch.broadcast_shapes(x.shape, widths.shape[1:])
    x = x.expand(shape)
    widths, heights, slopes = (_to_batch(p, shape) for p in (widths, heights, slopes))
    knots_x, knots_y = _knots(widths, bound), _knots(heights, bound)
    one = torch.ones_like(slopes[:1]) if len(slopes) else torch.ones_like(widths[:1])
    knot_slopes = torch.cat([one, bounded_exp(slopes, LOG_SLOPE), one])

    # Points outside are evaluated at the edge and replaced at the end: their gradients stay finite.
    inside = x.abs() < bound
    point = x.clamp(-bound, bound)
    inner_knots = (knots_y if inverse else knots_x)[1:-1]
    index = (point >= inner_knots).sum(0, keepdim=True)

    left, bottom = _at_bin(knots_x, index), _at_bin(knots_y, index)
    width = _at_bin(knots_x, index + 1) - left
    height = _at_bin(knots_y, index + 1) - bottom
    slope_left, slope_right = _at_bin(knot_slopes, index), _at_bin(knot_slopes, index + 1)
    mean_slope = height / width
    bend = slope_left + slope_right - 2 * mean_slope

    if inverse:
        xi = _solve_bin((point - bottom) / height, slope_left, mean_slope, bend)
        value = left + width * xi
    else:
        xi = (point - left) / width
    both = xi * (1 - xi)
    denominator = mean_slope + bend * both
    if not inverse:
        value = bottom + height * (mean_slope * xi**2 + slope_left * both) / denominator
    # Every summand is positive, so the logarithm is finite.
    numerator = slope_right * xi**2 + 2 * mean_slope * both + slope_left * (1 - xi) ** 2
    log_slope = 2 * (mean_slope / denominator).log() + numerator.log()
    if inverse:
        log_slope = -log_slope
    # A NaN is not inside: it comes back as the value itself, and as the log-derivative.
    outside = torch.where(x.isnan(), x, torch.zeros_like(x))
    return torch.where(inside, value, x), torch.where(inside, log_slope, outside)


def _solve_bin(eta: Tensor, slope_left: Tensor, mean_slope: Tensor, bend: Tensor) -> Tensor:
    r"""The root :math:`\xi \in [0, 1]` of the bin's quadratic, for relative height ``eta``."""
    b = slope_left - eta * bend
    a = mean_slope - b
    c = mean_slope * eta
    # Two forms of the one root, each free of cancellation for its sign of b.
    rising = b >= 0
    q = b.abs() + (b**2 + 4 * a * c).clamp_min(0).sqrt()
    return torch.where(rising, 2 * c / q, q / (2 * torch.where(rising, torch.ones_like(a), a)))
