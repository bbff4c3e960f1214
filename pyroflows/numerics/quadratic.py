"""Monotone rational-quadratic splines, with analytic gradients."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyroflows.numerics import analytic
from pyroflows.numerics.concrete import has_values, is_recording
from pyroflows.numerics.splines import LOG_SLOPE, MIN_BIN_SIZE, Bins, knot_slopes

#: Of the raw logarithms of slopes, see `soft_clamp`.
STRETCH = math.pi / (2 * LOG_SLOPE)


class _Piece:
    r"""One bin: a relative width :math:`\xi` to a relative height :math:`\eta`.

    With the mean slope :math:`s`, the slopes :math:`\delta` at the two ends, :math:`\rho = 1 - \xi`
    and the numbers :math:`p = s\xi + \delta_0\rho` and :math:`q = s\rho + \delta_1\xi`

    .. math::

        \eta = \frac{\xi p}{\xi p + \rho q}, \qquad
        f' = \frac{s^2 (\xi q + \rho p)}{(\xi p + \rho q)^2}.

    Every summand is positive, so that nothing cancels.
    """

    def __init__(self, slope_left: Tensor, slope_right: Tensor, mean_slope: Tensor) -> None:
        self.slope_left, self.slope_right, self.mean_slope = slope_left, slope_right, mean_slope

    def at(self, xi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Relative height, slope, and the two denominators of its logarithm's derivatives."""
        rest = 1 - xi
        p = torch.addcmul(self.mean_slope * xi, self.slope_left, rest)
        q = torch.addcmul(self.mean_slope * rest, self.slope_right, xi)
        below = xi * p
        whole = torch.addcmul(below, rest, q)
        across = torch.addcmul(xi * q, rest, p)
        slope = (self.mean_slope / whole) ** 2 * across
        return below / whole, slope, whole, across

    def rise(self, xi: Tensor) -> Tensor:
        return self.at(xi)[0]

    def log_slope(self, xi: Tensor) -> Tensor:
        return self.at(xi)[1].log()

    def run(self, eta: Tensor) -> Tensor:
        # The positive root z = xi / (1 - xi) of  rest s z^2 + middle z - eta s = 0.
        rest = 1 - eta
        middle = torch.addcmul(self.slope_left * rest, self.slope_right, eta, value=-1)
        root = torch.addcmul(middle**2, eta * rest, self.mean_slope**2, value=4).sqrt()
        # Two forms of it, each free of cancellation for its sign of the middle.
        rising = middle >= 0
        part = 2 * self.mean_slope * torch.where(rising, eta, rest)
        # No absolute value, whose gradient at zero is lost.
        part = part / (part + root + torch.where(rising, middle, -middle))
        return torch.where(rising, part, 1 - part)


def rational_quadratic_spline(
    x: Tensor,
    params: Tensor,
    bound: float,
    inverse: bool = False,
    periodic: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Monotone rational-quadratic spline on a box, the identity outside of it.

    With :math:`\xi = (x - x_k) / w_k` inside bin :math:`k` of width :math:`w_k`, height
    :math:`h_k`, mean slope :math:`s_k = h_k / w_k` and knot slopes :math:`\delta`,

    .. math::

        y = y_k + \frac{h_k\,[s_k \xi^2 + \delta_k \xi (1 - \xi)]}
                       {s_k + (\delta_{k+1} + \delta_k - 2 s_k)\, \xi (1 - \xi)}.

    Slopes at the two ends are one, so that the map is continuously differentiable everywhere.
    Raw parameters of zero give the identity. Where every point has parameters of its own, the
    gradient is analytic.

    Parameters
    ----------
    x
        Points, shape ``(...)``.
    params
        One after the other raw widths, raw heights (before a softmax) and raw logarithms of the
        inner knot slopes, shape ``(3 bins - 1, ...)``: bins lead. Where ``periodic``, the slopes
        are those at the left ends of all bins, ``(3 bins, ...)``.
    bound
        Half-width of the box, in units of ``x``.
    inverse
        Whether to evaluate the inverse map.
    periodic
        Whether the box is a circle, whose ends meet with one slope. Outside it is still the
        identity.

    Returns
    -------
    tuple of Tensor
        Values and logarithms of the derivative (of the inverse map where ``inverse``), each of the
        broadcast shape of ``x`` and the parameters.

    Raises
    ------
    ValueError
        For another number of parameters.

    References
    ----------
    Durkan, Bekasov, Murray and Papamakarios, "Neural spline flows", NeurIPS 2019; Rezende et al.,
    "Normalizing flows on tori and spheres", ICML 2020 (periodic).

    Examples
    --------
    >>> rational_quadratic_spline(torch.tensor([-9.0, 0.75, 2.25]), torch.zeros(11, 3), bound=3.0)
    (tensor([-9.0000,  0.7500,  2.2500]), tensor([0., 0., 0.]))
    """
    if len(params) < 2 or (len(params) + (not periodic)) % 3:
        kind = "3 bins" if periodic else "3 bins - 1"
        raise ValueError(f"params: expected a first dimension of {kind}, got {tuple(params.shape)}")
    spline = Spline(bound, inverse, periodic)
    if params.is_cuda and has_values(params):
        from pyroflows.numerics.quadratic_gpu import by_kernels

        spline = by_kernels(spline, params)
    return analytic.apply(spline, x, params)


class Spline(NamedTuple):
    """The map by torch's operations, which are few and go over all bins at once."""

    bound: float
    inverse: bool
    periodic: bool

    def composed(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        count = (len(params) + 1) // 3
        widths, heights, slopes = params.tensor_split([count, 2 * count])
        bins = Bins(x, widths, heights, self.bound, self.inverse, closed=self.periodic)
        ends = bins.ends(knot_slopes(slopes, widths, self.periodic))
        return bins.map(_Piece(*ends, bins.mean_slope))

    def evaluate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        flat = Flat(params)
        y, ladj, own, found = _evaluate(flat.points(x), flat.params(params), self)
        return flat.unpoints(y), flat.unpoints(ladj), (*own, *found)

    def gradient(
        self,
        params: Tensor,
        saved: tuple[Tensor, ...],
        of_y: Tensor,
        of_ladj: Tensor,
        of_params: bool,
    ) -> tuple[Tensor, Tensor | None]:
        flat, of_bin = Flat(params), len(_Bin._fields)
        own, found = _Bin(*saved[:of_bin]), _Found(*saved[of_bin:])
        grads = flat.points(of_y), flat.points(of_ladj)
        point, rows = _gradient(own, found, self, *grads, of_params)
        return flat.unpoints(point), None if rows is None else flat.unparams(rows)


class Flat:
    """Batch dimensions as one, in the order in which the parameters lie in memory."""

    def __init__(self, params: Tensor) -> None:
        strides = params.stride()[1:]
        self.order = sorted(range(len(strides)), key=lambda d: -strides[d])
        self.shape = [params.shape[1 + d] for d in self.order]
        self.back = sorted(range(len(strides)), key=self.order.__getitem__)

    def points(self, x: Tensor) -> Tensor:
        return x.permute(self.order).reshape(-1)

    def params(self, params: Tensor) -> Tensor:
        return params.permute(0, *(1 + d for d in self.order)).reshape(len(params), -1)

    def rows(self, params: Tensor) -> Tensor:
        """Two batch dimensions rather than one, for which memory need not be copied."""
        *outer, last = self.shape or (1,)
        lead = params.permute(0, *(1 + d for d in self.order))
        return lead.reshape(len(params), math.prod(outer), last)

    def unpoints(self, x: Tensor) -> Tensor:
        return x.view(self.shape).permute(self.back)

    def unparams(self, params: Tensor) -> Tensor:
        lead = params.view(len(params), *self.shape)
        return lead.permute(0, *(1 + d for d in self.back))


class _Bin(NamedTuple):
    """Each point's own bin, and the shares of all widths and heights, ``(2, bins, N)``.

    ``number`` is the bin's and ``before`` the shares before its two ends, ``(2, 2, N)``;
    ``slopes`` are those at its ends and ``stretched`` their raw logarithms, ``(2, N)``.
    """

    shares: Tensor
    number: Tensor
    before: Tensor
    left: Tensor
    bottom: Tensor
    width: Tensor
    height: Tensor
    slopes: Tensor
    stretched: Tensor


class _Found(NamedTuple):
    """What an evaluation leaves for its gradient beside the bins, ``(N,)`` each."""

    outside: Tensor
    xi: Tensor
    eta: Tensor
    slope: Tensor
    whole: Tensor
    across: Tensor


def _evaluate(point: Tensor, raw: Tensor, spline: Spline) -> tuple[Tensor, Tensor, _Bin, _Found]:
    """Values, log-derivatives and what the gradient needs, of points ``(N,)``."""
    unit = units((len(raw) + 1) // 3, spline.bound)[1]
    given = point / unit
    own = _own_bin(given, raw, spline)
    piece = _Piece(own.slopes[0], own.slopes[1], own.height / own.width)
    # Rounding may lead out of the bin, where slopes can be negative; so may points outside.
    if spline.inverse:
        xi = piece.run(((given - own.bottom) / own.height).clamp_(0, 1))
    else:
        xi = ((given - own.left) / own.width).clamp_(0, 1)
    eta, slope, whole, across = piece.at(xi)
    ladj = slope.log()
    if spline.inverse:
        value, ladj = torch.addcmul(own.left, own.width, xi), ladj.neg_()
    else:
        value = torch.addcmul(own.bottom, own.height, eta)
    # By ones and zeros, which are faster than a choice. A NaN is not outside, so that it stays one.
    outside = point.abs()
    outside = outside.gt_(spline.bound) if spline.periodic else outside.ge_(spline.bound)
    inside = 1 - outside
    value = value.mul_(unit).mul_(inside).addcmul_(point, outside)
    found = _Found(outside, xi, eta, slope, whole, across)
    return value, ladj.mul_(inside), own, found


def _own_bin(given: Tensor, raw: Tensor, spline: Spline) -> _Bin:
    """The bins of points ``(N,)``, in units in which a bin is its share and a floor."""
    bins = (len(raw) + 1) // 3
    shares = raw[: 2 * bins].view(2, bins, -1).softmax(1)
    floor = units(bins, spline.bound)[0]
    half = (1 + bins * floor) / 2
    locate = _locate_fused if is_recording() else _locate
    number, before, stretched = locate(given + half, shares, raw[2 * bins :], floor, spline)
    # A knot is rounded in one way from both sides, so that pieces meet.
    ends = torch.stack([number, number + 1])
    knots = torch.add(before, ends, alpha=floor).sub_(half)
    stretched = stretched.mul_(STRETCH)
    slopes = (stretched.atan() / STRETCH).exp_()
    left, bottom = knots[:, 0]
    width, height = knots[:, 1] - knots[:, 0]
    return _Bin(shares, number, before, left, bottom, width, height, slopes, stretched)


def _locate(
    above: Tensor, shares: Tensor, slopes: Tensor, floor: float, spline: Spline
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the bins of points ``above`` the box's start: number, shares before, raw slopes at ends.

    Few passes over memory: sums of all shares, and picks by index.
    """
    bins = shares.shape[1]
    sums = pad(shares[:, :-1].cumsum(1), (0, 0, 1, 1))
    sums[:, -1] = 1
    numbers = torch.arange(1, bins, dtype=above.dtype, device=above.device).unsqueeze(-1)
    inner = torch.add(sums[int(spline.inverse), 1:-1], numbers, alpha=floor)
    # A sum of ones of the points' dtype: sums of booleans are several times slower.
    number = inner.le_(above).sum(0)
    index = torch.stack([number, number + 1]).long()
    before = sums.gather(1, index.expand(2, 2, -1))
    at_knots = torch.cat([slopes, slopes[:1]]) if spline.periodic else pad(slopes, (0, 0, 1, 1))
    return number, before, at_knots.gather(0, index)


def _locate_fused(
    above: Tensor, shares: Tensor, slopes: Tensor, floor: float, spline: Spline
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_locate`, for a compiler that fuses: sums over masks, which need no memory.

    Picks by index become scalar code there, and so do cumulative sums, of which Inductor has
    compiled wrong gradients.
    """
    bins = shares.shape[1]
    counts = torch.arange(bins, dtype=above.dtype, device=above.device).unsqueeze(-1)
    sums = torch.stack(list(accumulate(shares[int(spline.inverse)])))[:-1]
    passed = torch.add(sums, counts[1:], alpha=floor) <= above
    number = passed.to(above.dtype).sum(0)
    own = counts == number
    start = torch.where(passed, shares[:, :-1], 0.0).sum(1)
    stop = start + torch.where(own, shares, 0.0).sum(1)
    if spline.periodic:
        at_ends = (own, slopes), (own, slopes.roll(-1, 0))
    else:
        at_ends = (own[1:], slopes), (own[:-1], slopes)
    stretched = [torch.where(here, values, 0.0).sum(0) for here, values in at_ends]
    return number, torch.stack([start, stop], 1), torch.stack(stretched)


def units(bins: int, bound: float) -> tuple[float, float]:
    """The floor under the bins' shares, and the unit of length in which they add up to the box."""
    share = 1 - bins * MIN_BIN_SIZE
    return MIN_BIN_SIZE / share, 2 * bound * share


def _gradient(
    own: _Bin, found: _Found, spline: Spline, of_y: Tensor, of_ladj: Tensor, of_params: bool
) -> tuple[Tensor, Tensor | None]:
    r"""Gradients of the points ``(N,)`` and, if asked for, of the raw parameters, in closed form.

    The inverse map :math:`x = f^{-1}(y)` has those of :math:`f`, with :math:`-1 / f'` times the
    gradient of its value in place of it, and a log-derivative of the other sign.
    """
    xi, width, height, (first, last) = found.xi, own.width, own.height, own.slopes
    rest, mean = 1 - xi, height / width
    turn = rest - xi
    # Of the logarithm of the slope, by xi, half of it.
    climb = torch.addcmul(torch.addcmul(mean * turn, last, xi), first, rest, value=-1)
    bend = (first + last).sub_(mean, alpha=2).mul_(turn)
    log_by_xi = (climb / found.across).sub_(bend / found.whole)
    # Outside, the map is the identity. The value is in units of its own.
    inside, unit = 1 - found.outside, units(own.shares.shape[1], spline.bound)[1]
    of_value, of_log = of_y * inside * unit, of_ladj * inside
    if spline.inverse:
        of_log.neg_()
    log_by_given = of_log * log_by_xi / width
    if spline.inverse:
        along = -of_value
        of_given = of_value.add(log_by_given, alpha=2).div_(found.slope)
        of_value = -of_given
    else:
        of_given = along = (of_value * found.slope).add_(log_by_given, alpha=2)
    of_point = torch.addcmul(of_given / unit, of_y, found.outside)
    if not of_params:
        return of_point, None

    # By the logarithms of the slopes at the ends. That of the mean slope follows: were all of them
    # larger, the relative height would stay, and the logarithm of the slope grow alike.
    per_whole = (xi * rest).div_(found.whole)
    of_eta = (of_value * height).mul_(per_whole)
    below = of_eta * found.eta
    bent, crossed = per_whole.mul_(of_log), of_log / found.across
    of_first = torch.addcmul(of_eta - below, rest * rest, crossed).sub_(bent, alpha=2).mul_(first)
    of_last = torch.addcmul(below.neg_(), xi * xi, crossed).sub_(bent, alpha=2).mul_(last)
    of_mean = of_log - of_first - of_last
    of_height = torch.addcdiv(of_value * found.eta, of_mean, height)
    of_width = torch.addcmul(of_mean / width, along, xi).neg_()
    of_starts, of_sizes = torch.stack([-along, of_value]), torch.stack([of_width, of_height])
    of_slopes = torch.stack([of_first, of_last])
    return of_point, _gradient_of_params(own, spline, of_starts, of_sizes, of_slopes)


def _gradient_of_params(
    own: _Bin, spline: Spline, of_starts: Tensor, of_sizes: Tensor, of_slopes: Tensor
) -> Tensor:
    """From the own bin's place, size and log-slopes, each ``(2, N)``, to the raw numbers of all."""
    shares, index = own.shares, own.number
    bins = shares.shape[1]
    numbers = torch.arange(bins, dtype=index.dtype, device=index.device).unsqueeze(-1)
    like = shares[0]
    before = torch.lt(numbers, index, out=torch.empty_like(like))
    here = torch.eq(numbers, index, out=torch.empty_like(like))
    gradient = like.new_empty(3 * bins - (not spline.periodic), like.shape[1])
    # Shares before the bin move it, its own one stretches it; all of them add up to one.
    starts, stops = own.before.unbind(1)
    mean = torch.addcmul(of_starts * starts, of_sizes, stops - starts).neg_().unsqueeze(1)
    of_raw = gradient[: 2 * bins].view_as(shares)
    torch.addcmul(mean, here, of_sizes.unsqueeze(1), out=of_raw)
    of_raw.addcmul_(before, of_starts.unsqueeze(1)).mul_(shares)

    of_left, of_right = of_slopes / own.stretched.square().add_(1)
    left, right = (here, here.roll(1, 0)) if spline.periodic else (here[1:], here[:-1])
    torch.mul(left, of_left, out=gradient[2 * bins :]).addcmul_(right, of_right)
    return gradient
