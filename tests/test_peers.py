"""Densities of the peers with our parameters in them: equal to rounding, in float64.

`make test-peers` installs the peers and runs this file. Each package bounds raw parameters in its
own way, so that ours are brought to the others' form by the inverse of their bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from torch import Tensor, nn

from pyroflows.layers import AutoregressiveLayer, CouplingLayer, LULinear
from pyroflows.numerics import bounded_exp, rational_quadratic_spline, soft_clamp
from pyroflows.numerics.splines import LOG_SLOPE, MIN_BIN_SIZE
from pyroflows.testing import check_close, redraw_
from pyroflows.transforms import Affine, RationalQuadratic

pytestmark = pytest.mark.peers
FEATURES, BINS, BOUND = 5, 6, 3.0
SMALL = {"hidden_features": (16, 16)}
SPLINE = RationalQuadratic(BINS, BOUND)


@pytest.fixture(autouse=True)
def double() -> Any:
    """The peers allocate on the default dtype; importing zuko switches validation off."""
    validation = torch.distributions.Distribution._validate_args
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.distributions.Distribution.set_default_validate_args(validation)


def points() -> Tensor:
    """Within and beyond the box."""
    return 2 * torch.randn(200, FEATURES)


def sizes(raw: Tensor) -> Tensor:
    """Our bins, as shares of the box, from raw parameters ``(bins, ...)``."""
    return MIN_BIN_SIZE + (1 - MIN_BIN_SIZE * BINS) * raw.softmax(0)


def split(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    widths, heights, slopes = params.split([BINS, BINS, BINS - 1])
    return widths, heights, slopes


def zuko_raw(params: Tensor) -> list[Tensor]:
    """What zuko's softclip and softmax turn into our bins and slopes; parameters last."""
    limit = abs(math.log(1e-3))
    widths, heights, slopes = split(params)
    shares = [sizes(widths).log(), sizes(heights).log()]
    shares = [s - s.mean(0) for s in shares]
    logs = soft_clamp(slopes, LOG_SLOPE)
    unclipped = [s / (1 - (2 * s / limit).abs()) for s in shares]
    # Its slopes have our bound, ln(1000).
    return [t.movedim(0, -1) for t in (*unclipped, logs / (1 - (logs / limit).abs()))]


def nflows_raw(params: Tensor) -> Tensor:
    """Bins are bounded as ours; a slope is 0.001 + softplus."""
    widths, heights, slopes = split(params)
    positive = bounded_exp(slopes, LOG_SLOPE) - 1e-3
    return torch.cat([widths, heights, positive + (-(-positive).expm1()).log()]).movedim(0, -1)


# --- scalar splines -------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("package", ["zuko", "nflows", "pyro"])
def test_rational_quadratic_spline(package: str, inverse: bool) -> None:
    # Zuko's bound on the bins allows no more.
    params, x = 0.5 * torch.randn(SPLINE.count, FEATURES), points()
    expected = rational_quadratic_spline(x, params, BOUND, inverse)
    if package == "zuko":
        from zuko.transforms import MonotonicRQSTransform

        theirs = MonotonicRQSTransform(*zuko_raw(params), bound=BOUND)
        theirs = theirs.inv if inverse else theirs
        got = theirs.call_and_ladj(x)
    elif package == "nflows":
        from nflows.transforms.splines import unconstrained_rational_quadratic_spline

        raw = nflows_raw(params).expand(200, -1, -1).split([BINS, BINS, BINS - 1], -1)
        got = unconstrained_rational_quadratic_spline(x, *raw, inverse=inverse, tail_bound=BOUND)
    else:
        widths, heights, slopes = split(params)
        shares = [raw.softmax(0).movedim(0, -1).expand(200, -1, -1) for raw in (widths, heights)]
        slopes = (bounded_exp(slopes, LOG_SLOPE) - 1e-3).movedim(0, -1).expand(200, -1, -1)
        got = _monotonic_rational_spline(x, *shares, slopes, inverse=inverse, bound=BOUND)
    inside = torch.ones_like(x, dtype=torch.bool)
    if package == "pyro":
        # Its slope at the two ends is 0.999, which bends the first and the last bin.
        first, *_, last = sizes(split(params)[1 if inverse else 0])
        inside = (x > BOUND * (2 * first - 1)) & (x < BOUND * (1 - 2 * last)) | (x.abs() > BOUND)
    assert inside.sum() > 500
    check_close("value", got[0][inside], expected[0][inside], 1e-11)
    check_close("log slope", got[1][inside], expected[1][inside], 1e-11)


# --- layers: their transforms around our networks -----------------------------------------------


class Hyper(nn.Module):
    """Our conditioner in a peer's place, with a function that brings its outputs to their form."""

    def __init__(self, network: nn.Module, count: int, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.count, self.form = network, count, form

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.form(self.network(x).unflatten(-1, (self.count, -1)).movedim(-2, 0))


def affine(max_log_scale: float = 2.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda params: (params[0], soft_clamp(params[1], max_log_scale))


def drawn(layer: nn.Module) -> Any:
    redraw_(layer, 0.7)
    return layer


def test_autoregressive_affine_of_pyro() -> None:
    layer = drawn(AutoregressiveLayer(FEATURES, one_pass="forward", **SMALL))
    arn: Any = Hyper(layer.network, 2, affine())
    arn.permutation = layer.network.order
    theirs, x = pyro_transforms.AffineAutoregressive(arn), points()
    y, ladj = layer().call_and_ladj(x)
    check_close("value", theirs(x), y, 1e-12)
    check_close("ladj", theirs.log_abs_det_jacobian(x, theirs(x)), ladj, 1e-12)
    check_close("inverse", layer().inv(y), theirs._inverse(y), 1e-10)


def test_masked_autoregressive_affine_of_zuko() -> None:
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.transforms import MonotonicAffineTransform

    layer = drawn(AutoregressiveLayer(FEATURES, **SMALL))
    theirs = MaskedAutoregressiveTransform(
        FEATURES,
        # A slope of zero takes its own bound away.
        univariate=lambda shift, scale: MonotonicAffineTransform(shift, scale, slope=1e-300),
    )
    unbound = 300 * math.log(10)

    def form(params: Tensor) -> Tensor:
        shift, log_scale = affine()(params)
        return torch.stack([shift, log_scale / (1 - (log_scale / unbound).abs())], -1).flatten(-2)

    theirs.hyper = Hyper(layer.network, 2, form)
    y = points()
    # Its forward direction leads from data to base.
    x, ladj = layer().inverse_and_ladj(y)
    got, got_ladj = theirs().call_and_ladj(y)
    check_close("value", got, x, 1e-11)
    check_close("ladj", got_ladj, ladj, 1e-11)
    check_close("draws", theirs().inv(x), layer()(x), 1e-9)


def test_masked_autoregressive_affine_of_nflows() -> None:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    layer = drawn(AutoregressiveLayer(FEATURES, **SMALL))

    def form(params: Tensor) -> Tensor:
        shift, log_scale = affine()(params)
        scale = log_scale.exp() - 1e-3
        return torch.stack([scale + (-(-scale).expm1()).log(), shift], -1).flatten(-2)

    theirs = MaskedAffineAutoregressiveTransform(FEATURES, 8)
    theirs.autoregressive_net = Hyper(layer.network, 2, form)
    y = points()
    x, ladj = layer().inverse_and_ladj(y)
    got, got_ladj = theirs(y)
    check_close("value", got, x, 1e-11)
    check_close("ladj", got_ladj, ladj, 1e-11)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_spline_coupling_of_nflows(direction: str) -> None:
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    mask = torch.tensor([0, 1, 0, 1, 1])
    layer = drawn(CouplingLayer(FEATURES, mask=mask, univariate=SPLINE, **SMALL))
    theirs = PiecewiseRationalQuadraticCouplingTransform(
        mask,
        lambda inputs, outputs: Hyper(
            layer.network, SPLINE.count, lambda p: nflows_raw(p).flatten(-2)
        ),
        num_bins=BINS,
        tails="linear",
        tail_bound=BOUND,
    )
    x = points()
    with pytest.warns(UserWarning, match="not scaled down"):
        got = theirs(x) if direction == "forward" else theirs.inverse(x)
    ours = layer()
    expected = ours.call_and_ladj(x) if direction == "forward" else ours.inverse_and_ladj(x)
    check_close("value", got[0], expected[0], 1e-11)
    check_close("ladj", got[1], expected[1], 1e-11)


def test_affine_coupling_of_pyro() -> None:
    layer = drawn(CouplingLayer(4, mask=[False, False, True, True], **SMALL))
    theirs = pyro_transforms.AffineCoupling(2, Hyper(layer.network, 2, affine()))
    x = 2 * torch.randn(100, 4)
    y, ladj = layer().call_and_ladj(x)
    check_close("value", theirs(x), y, 1e-12)
    check_close("ladj", theirs.log_abs_det_jacobian(x, theirs(x)), ladj, 1e-12)


def test_lu_of_nflows() -> None:
    from nflows import transforms

    layer = drawn(LULinear(FEATURES))
    theirs = transforms.LULinear(FEATURES)
    with torch.no_grad():
        theirs.lower_entries.copy_(layer.factors[theirs.lower_indices[0], theirs.lower_indices[1]])
        theirs.upper_entries.copy_(layer.factors[theirs.upper_indices[0], theirs.upper_indices[1]])
        positive = layer.log_diagonal.exp() - theirs.eps
        theirs.unconstrained_upper_diag.copy_(positive.expm1().log())
        theirs.bias.copy_(layer.bias)
    x = points()
    y, ladj = layer().call_and_ladj(x)
    got, got_ladj = theirs(x)
    check_close("value", got, y, 1e-12)
    check_close("ladj", got_ladj, ladj, 1e-12)


def test_affine_recipe_is_what_the_others_call_affine() -> None:
    """A sign or a swap of shift and scale would cancel in the comparisons above."""
    params = torch.tensor([[1.0], [0.3]])
    y, ladj = Affine()(params).call_and_ladj(torch.tensor([2.0]))
    scale = soft_clamp(torch.tensor(0.3), 2.0).exp()
    check_close("value", y, 1 + 2 * scale.unsqueeze(0), 1e-12)
    check_close("ladj", ladj, scale.log().unsqueeze(0), 1e-12)
