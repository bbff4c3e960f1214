"""Rational-quadratic splines in two kernels of Triton: for the values and for all gradients.

Without Triton this module does not import. Formulas and names are those of
`pyroflows.numerics.quadratic`. A program takes a block of points with all bins of each, as numbers
``(bins, block)``, padded to a power of two. Beside its inputs nothing is kept for the gradient: to
find the bin of a point again takes less time than to read it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from pyroflows.numerics.quadratic import STRETCH, units

_STRETCH = tl.constexpr(STRETCH)


class Form(NamedTuple):
    """What a kernel is compiled for.

    ``padded`` is the power of two that holds the bins, ``block`` the points of a program, ``half``
    half the box in the units of `units`.
    """

    bins: int
    padded: int
    block: int
    half: float
    floor: float
    unit: float
    bound: float
    inverse: bool
    periodic: bool


def form_of(count: int, bound: float, inverse: bool, periodic: bool) -> Form:
    """Of splines with so many raw parameters."""
    bins = (count + 1) // 3
    floor, unit = units(bins, bound)
    padded, half = triton.next_power_of_2(bins), (1 + bins * floor) / 2
    # A thread holds all bins of a point, as long as its registers suffice.
    block = 128 if padded <= 32 else 32
    return Form(bins, padded, block, half, floor, unit, bound, inverse, periodic)


class _Axis(NamedTuple):
    """Widths or heights: shares of all bins, those before both ends of the own one, its place."""

    shares: Any
    before: Any
    upto: Any
    place: Any
    size: Any


class _Own(NamedTuple):
    """The bin of a point, raw slopes at its ends and slopes, and the relative width in it."""

    number: Any
    across: _Axis
    along: _Axis
    first_raw: Any
    last_raw: Any
    first: Any
    last: Any
    xi: Any


class _Curve(NamedTuple):
    """Relative height, slope, and the two denominators of its logarithm's derivatives."""

    eta: Any
    slope: Any
    whole: Any
    across: Any


# --- parts ----------------------------------------------------------------------------------------


@triton.jit
def _places(size: tl.tensor, strides: tl.tuple, FORM: tl.constexpr) -> Any:
    """Numbers of a program's points, which of them there are, where their parameters begin."""
    columns, _, of_row, of_column = strides
    n = tl.program_id(0) * FORM.block + tl.arange(0, FORM.block)
    own = tl.minimum(n, size - 1)
    offset = (own // columns).to(tl.int64) * of_row + (own % columns).to(tl.int64) * of_column
    return own, n < size, offset


@triton.jit
def _shares(at: tl.tensor, k: tl.tensor, of_bin: tl.tensor, FORM: tl.constexpr) -> Any:
    """Shares of the bins, and of all bins up to the end of each."""
    raw = tl.load(at[None, :] + k * of_bin, mask=k < FORM.bins, other=-float("inf"))
    up = tl.exp(raw - tl.max(raw, 0)[None, :])
    shares = up / tl.sum(up, 0)[None, :]
    # The last knot is exact, whatever the rounding of the sum.
    return shares, tl.where(k == FORM.bins - 1, 1.0, tl.cumsum(shares, 0))


@triton.jit
def _axis(
    shares: tl.tensor, sums: tl.tensor, k: tl.tensor, number: tl.tensor, FORM: tl.constexpr
) -> Any:
    # Both ends are read from the same sums, so that pieces meet.
    before = tl.sum(tl.where(k == number[None, :] - 1, sums, 0.0), 0)
    upto = tl.sum(tl.where(k == number[None, :], sums, 0.0), 0)
    # With a constant, whole numbers would be of single precision.
    count = number.to(sums.dtype)
    place = before + count * FORM.floor - FORM.half
    return _Axis(shares, before, upto, place, upto + (count + 1) * FORM.floor - FORM.half - place)


@triton.jit
def _slope(at: tl.tensor, wanted: tl.tensor) -> Any:
    """A stretched raw logarithm, zero where none is wanted, and the slope."""
    stretched = tl.load(at, mask=wanted, other=0.0) * _STRETCH
    return stretched, tl.exp(libdevice.atan(stretched) / _STRETCH)


@triton.jit
def _run(eta: tl.tensor, mean: tl.tensor, first: tl.tensor, last: tl.tensor) -> Any:
    """The relative width at a relative height."""
    rest = 1 - eta
    middle = first * rest - last * eta
    root = tl.sqrt(middle * middle + 4 * eta * rest * mean * mean)
    rising = middle >= 0
    part = 2 * mean * tl.where(rising, eta, rest)
    part = part / (part + root + tl.abs(middle))
    return tl.where(rising, part, 1 - part)


@triton.jit
def _find(x: tl.tensor, at: tl.tensor, k: tl.tensor, of_bin: tl.tensor, FORM: tl.constexpr) -> Any:
    """The bins of points, in units in which a bin is its share and a floor."""
    w_shares, w_sums = _shares(at, k, of_bin, FORM)
    h_shares, h_sums = _shares(at + FORM.bins * of_bin, k, of_bin, FORM)
    knots = (h_sums if FORM.inverse else w_sums) + (k + 1).to(x.dtype) * FORM.floor
    passed = (knots <= (x + FORM.half)[None, :]) & (k < FORM.bins - 1)
    number = tl.sum(passed.to(tl.int64), 0)
    across = _axis(w_shares, w_sums, k, number, FORM)
    along = _axis(h_shares, h_sums, k, number, FORM)

    at += 2 * FORM.bins * of_bin
    if FORM.periodic:
        first_raw, first = _slope(at + number * of_bin, number >= 0)
        last_raw, last = _slope(at + (number + 1) % FORM.bins * of_bin, number >= 0)
    else:
        first_raw, first = _slope(at + (number - 1) * of_bin, number > 0)
        last_raw, last = _slope(at + number * of_bin, number < FORM.bins - 1)

    sought = along if FORM.inverse else across
    xi = (x - sought.place) / sought.size
    # Rounding may lead out of the bin. A NaN stays one.
    xi = tl.where(xi < 0, 0.0, tl.where(xi > 1, 1.0, xi))
    if FORM.inverse:
        xi = _run(xi, along.size / across.size, first, last)
    return _Own(number, across, along, first_raw, last_raw, first, last, xi)


@triton.jit
def _at(own: _Own) -> Any:
    xi, mean = own.xi, own.along.size / own.across.size
    rest = 1 - xi
    p, q = mean * xi + own.first * rest, mean * rest + own.last * xi
    below = xi * p
    whole, across = below + rest * q, xi * q + rest * p
    scale = mean / whole
    return _Curve(below / whole, scale * scale * across, whole, across)


@triton.jit
def _is_outside(x: tl.tensor, FORM: tl.constexpr) -> Any:
    # A NaN is not outside, so that it stays one.
    return tl.abs(x) > FORM.bound if FORM.periodic else tl.abs(x) >= FORM.bound


@triton.jit
def _of_slopes(own: _Own, curve: _Curve, of_value: tl.tensor, of_log: tl.tensor) -> Any:
    """Gradients of the logarithms of both slopes."""
    xi, rest = own.xi, 1 - own.xi
    per_whole = xi * rest / curve.whole
    of_eta = of_value * own.along.size * per_whole
    below, bent, crossed = of_eta * curve.eta, per_whole * of_log, of_log / curve.across
    of_first = (of_eta - below + rest * rest * crossed - 2 * bent) * own.first
    return of_first, (xi * xi * crossed - below - 2 * bent) * own.last


@triton.jit
def _log_by_xi(own: _Own, curve: _Curve) -> Any:
    """Half the derivative of the logarithm of the slope."""
    xi, rest, mean = own.xi, 1 - own.xi, own.along.size / own.across.size
    turn = rest - xi
    climb = mean * turn + own.last * xi - own.first * rest
    return climb / curve.across - (own.first + own.last - 2 * mean) * turn / curve.whole


@triton.jit
def _of_sizes(
    axis: _Axis, k: tl.tensor, number: tl.tensor, of_place: tl.tensor, of_size: tl.tensor
) -> Any:
    """Gradients of all raw sizes along an axis, from those of the own bin."""
    # Shares before the bin move it, its own one stretches it; all of them add up to one.
    mean = of_place * axis.before + of_size * (axis.upto - axis.before)
    moved = tl.where(k < number[None, :], of_place[None, :], 0.0)
    stretched = tl.where(k == number[None, :], of_size[None, :], 0.0)
    return axis.shares * (moved + stretched - mean[None, :])


@triton.jit
def _of_raw_slopes(
    own: _Own, k: tl.tensor, of_first: tl.tensor, of_last: tl.tensor, FORM: tl.constexpr
) -> Any:
    of_first /= 1 + own.first_raw * own.first_raw
    of_last /= 1 + own.last_raw * own.last_raw
    before = own.number if FORM.periodic else own.number - 1
    after = (own.number + 1) % FORM.bins if FORM.periodic else own.number
    of_first = tl.where(k == before[None, :], of_first[None, :], 0.0)
    return of_first + tl.where(k == after[None, :], of_last[None, :], 0.0)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def values(
    x_at: tl.tensor,
    raw_at: tl.tensor,
    y_at: tl.tensor,
    ladj_at: tl.tensor,
    size: tl.tensor,
    strides: tl.tuple,
    FORM: tl.constexpr,
) -> None:
    """Values and log-derivatives; ``strides`` are the columns, and raw parameters' strides."""
    n, valid, offset = _places(size, strides, FORM)
    k = tl.arange(0, FORM.padded)[:, None].to(tl.int64)
    x = tl.load(x_at + n)
    own = _find(x / FORM.unit, raw_at + offset, k, strides[1], FORM)
    curve = _at(own)
    ladj = tl.log(curve.slope)
    if FORM.inverse:
        value, ladj = own.across.place + own.across.size * own.xi, -ladj
    else:
        value = own.along.place + own.along.size * curve.eta
    outside = _is_outside(x, FORM)
    tl.store(y_at + n, tl.where(outside, x, value * FORM.unit), mask=valid)
    tl.store(ladj_at + n, tl.where(outside, 0.0, ladj), mask=valid)


@triton.jit
def gradients(
    x_at: tl.tensor,
    raw_at: tl.tensor,
    of_y_at: tl.tensor,
    of_ladj_at: tl.tensor,
    of_x_at: tl.tensor,
    of_raw_at: tl.tensor,
    size: tl.tensor,
    strides: tl.tuple,
    FORM: tl.constexpr,
    OF_RAW: tl.constexpr,
) -> None:
    """Gradients of points and, where ``OF_RAW``, of raw parameters, which have their strides."""
    n, valid, offset = _places(size, strides, FORM)
    k, of_bin = tl.arange(0, FORM.padded)[:, None].to(tl.int64), strides[1]
    x, of_y, of_ladj = tl.load(x_at + n), tl.load(of_y_at + n), tl.load(of_ladj_at + n)
    own = _find(x / FORM.unit, raw_at + offset, k, of_bin, FORM)
    curve = _at(own)

    outside = _is_outside(x, FORM)
    of_value = tl.where(outside, 0.0, of_y) * FORM.unit
    of_log = tl.where(outside, 0.0, -of_ladj if FORM.inverse else of_ladj)
    log_by_given = of_log * _log_by_xi(own, curve) / own.across.size
    if FORM.inverse:
        along = -of_value
        of_given = (of_value + 2 * log_by_given) / curve.slope
        of_value = -of_given
    else:
        of_given = of_value * curve.slope + 2 * log_by_given
        along = of_given
    tl.store(of_x_at + n, of_given / FORM.unit + tl.where(outside, of_y, 0.0), mask=valid)

    if OF_RAW:
        of_first, of_last = _of_slopes(own, curve, of_value, of_log)
        of_mean = of_log - of_first - of_last
        of_height = of_value * curve.eta + of_mean / own.along.size
        of_width = -(of_mean / own.across.size + along * own.xi)
        at, bins = (of_raw_at + offset)[None, :] + k * of_bin, FORM.bins * of_bin
        mask = valid[None, :] & (k < FORM.bins)
        tl.store(at, _of_sizes(own.across, k, own.number, -along, of_width), mask=mask)
        tl.store(at + bins, _of_sizes(own.along, k, own.number, of_value, of_height), mask=mask)
        of_slopes = _of_raw_slopes(own, k, of_first, of_last, FORM)
        mask = mask if FORM.periodic else mask & (k < FORM.bins - 1)
        tl.store(at + 2 * bins, of_slopes, mask=mask)
