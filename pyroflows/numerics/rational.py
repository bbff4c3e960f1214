"""Monotone linear rational splines."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.numerics.splines import Bins, knot_slopes

# A middle knot closer to an end of its bin than this share loses float32 accuracy.
MIN_SHARE = 0.025


class _Linear:
    """Two rational pieces of degree one, which meet at ``share`` of the width with one slope.

    With the roots of the slopes at both ends, and their mean ``middle`` weighed by the share, the
    pieces mirror each other: each is written with distances from its own end of the bin.
    """

    def __init__(
        self, slope_left: Tensor, slope_right: Tensor, mean_slope: Tensor, share: Tensor
    ) -> None:
        self.root_left, self.root_right = slope_left.sqrt(), slope_right.sqrt()
        self.mean_slope = mean_slope
        self.share = share
        self.middle = share * self.root_left + (1 - share) * self.root_right

    def _side(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Width of the piece and root of the slope at its own end."""
        return (
            torch.where(left, self.share, 1 - self.share),
            torch.where(left, self.root_left, self.root_right),
        )

    def _denominator(self, distance: Tensor, width: Tensor, root: Tensor) -> Tensor:
        return self.mean_slope * (width - distance) + self.middle * root * distance

    def rise(self, xi: Tensor) -> Tensor:
        left = xi < self.share
        width, root = self._side(left)
        distance = torch.where(left, xi, 1 - xi)
        rise = width * root**2 * distance / self._denominator(distance, width, root)
        return torch.where(left, rise, 1 - rise)

    def log_slope(self, xi: Tensor) -> Tensor:
        left = xi < self.share
        width, root = self._side(left)
        distance = torch.where(left, xi, 1 - xi)
        ratio = width * root * self.mean_slope / self._denominator(distance, width, root)
        return 2 * ratio.log()

    def run(self, eta: Tensor) -> Tensor:
        left = eta < self.share * self.root_left / self.middle
        width, root = self._side(left)
        height = torch.where(left, eta, 1 - eta)
        # Both summands are positive, so nothing cancels.
        rest = root * (width * root - self.middle * height)
        run = self.mean_slope * width * height / (rest + self.mean_slope * height)
        return torch.where(left, run, 1 - run)


def linear_rational_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    slopes: Tensor,
    shares: Tensor,
    bound: float,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Monotone linear rational spline on a box, the identity outside of it.

    Inside a bin of mean slope :math:`s`, with slopes :math:`\delta_0, \delta_1` at its ends, two
    pieces meet at the share :math:`\lambda` of its width. In units of the bin the left one is

    .. math::

        \eta = \frac{\lambda \delta_0\, \xi}{s (\lambda - \xi) + m \sqrt{\delta_0}\, \xi},
        \qquad m = \lambda \sqrt{\delta_0} + (1 - \lambda) \sqrt{\delta_1},

    and the right one is its mirror image. The inverse is of the same form. Slopes at the two ends
    of the box are one, so that the map is continuously differentiable everywhere. Raw parameters of
    zero give the identity.

    Parameters
    ----------
    x
        Points, shape ``(...)``.
    widths, heights
        Raw bin sizes (before a softmax), shape ``(bins, ...)``: bins lead.
    slopes
        Raw logarithms of the inner knot slopes, shape ``(bins - 1, ...)``.
    shares
        Raw shares :math:`\lambda` (before a sigmoid), shape ``(bins, ...)``.
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
    Dolatabadi, Erfani and Leckie, "Invertible generative modeling using linear rational splines",
    AISTATS 2020.

    Examples
    --------
    >>> raw = torch.zeros(4, 3)
    >>> x = torch.tensor([-9.0, 0.75, 2.25])
    >>> linear_rational_spline(x, raw, raw, raw[1:], raw, bound=3.0)
    (tensor([-9.0000,  0.7500,  2.2500]), tensor([0., 0., 0.]))
    """
    bins = Bins(x, widths, heights, bound, inverse)
    ends = bins.ends(knot_slopes(slopes, widths))
    share = MIN_SHARE + (1 - 2 * MIN_SHARE) * bins.own(shares).sigmoid()
    return bins.map(_Linear(*ends, bins.mean_slope, share))
