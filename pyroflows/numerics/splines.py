"""What splines with identity tails have in common: knots, bins, the map of a piece."""

from __future__ import annotations

import math
from typing import Protocol

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


def knot_slopes(slopes: Tensor, like: Tensor, periodic: bool = False) -> Tensor:
    """Slopes at all knots from raw logarithms; at the two ends one, or where periodic the first."""
    inner = bounded_exp(slopes, LOG_SLOPE)
    edge = inner[:1] if periodic else torch.ones_like(like[:1])
    return torch.cat([inner, edge]) if periodic else torch.cat([edge, inner, edge])


class Piece(Protocol):
    """A monotone curve through the unit square: one bin of a spline, for each point its own."""

    def rise(self, xi: Tensor) -> Tensor:
        """The relative height at a relative width."""
        ...

    def run(self, eta: Tensor) -> Tensor:
        """The relative width at a relative height."""
        ...

    def log_slope(self, xi: Tensor) -> Tensor:
        """Logarithm of the slope at a relative width, in units of the plane."""
        ...


class Bins:
    """The bin that each point falls into, of a spline on ``[-bound, bound]``.

    Parameters
    ----------
    x
        Points, shape ``(...)``; heights where ``inverse``.
    widths, heights
        Raw bin sizes, ``(bins, ...)``.
    bound
        Half-width of the box.
    inverse
        Whether the points are heights.
    closed
        Whether the two ends belong to the box.
    """

    def __init__(
        self,
        x: Tensor,
        widths: Tensor,
        heights: Tensor,
        bound: float,
        inverse: bool,
        closed: bool = False,
    ) -> None:
        self.shape = torch.broadcast_shapes(x.shape, widths.shape[1:])
        self.x = x = x.expand(self.shape)
        self.inverse = inverse
        # Points outside are evaluated at the edge and replaced at the end, with finite gradients.
        self.inside = x.abs() <= bound if closed else x.abs() < bound
        point = x.clamp(-bound, bound)
        knots_x, knots_y = _knots(widths, bound), _knots(heights, bound)
        inner_knots = self._to_batch((knots_y if inverse else knots_x)[1:-1])
        self.index = (point >= inner_knots).sum(0, keepdim=True)
        self.left, right = self.ends(knots_x)
        self.bottom, top = self.ends(knots_y)
        self.width, self.height = right - self.left, top - self.bottom
        self.mean_slope = self.height / self.width
        start, size = (self.bottom, self.height) if inverse else (self.left, self.width)
        self.relative = (point - start) / size

    def _to_batch(self, raw: Tensor) -> Tensor:
        """``(count, ...)`` to ``(count, *shape)``, the count staying in front."""
        if raw.shape[1:] == self.shape:
            return raw
        missing = (1,) * (len(self.shape) + 1 - raw.dim())
        return raw.reshape(raw.shape[0], *missing, *raw.shape[1:]).expand(-1, *self.shape)

    def own(self, values: Tensor) -> Tensor:
        """Of numbers ``(bins, ...)``, one a bin, those of each point's bin."""
        return self._to_batch(values).gather(0, self.index).squeeze(0)

    def ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of numbers ``(bins + 1, ...)``, one a knot, those at both ends of each point's bin."""
        values = self._to_batch(values)
        start, stop = (values.gather(0, self.index + i).squeeze(0) for i in (0, 1))
        return start, stop

    def map(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Values and log-derivatives (of the inverse where the points are heights)."""
        xi = piece.run(self.relative) if self.inverse else self.relative
        log_slope = piece.log_slope(xi)
        if self.inverse:
            value, log_slope = self.left + self.width * xi, -log_slope
        else:
            value = self.bottom + self.height * piece.rise(xi)
        # A NaN is not inside: it comes back as the value itself, and as the log-derivative.
        outside = torch.where(self.x.isnan(), self.x, torch.zeros_like(self.x))
        return (
            torch.where(self.inside, value, self.x),
            torch.where(self.inside, log_slope, outside),
        )
