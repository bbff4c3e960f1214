"""Scalar maps against closed forms, mpmath and Pyro; flows on angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from torch import Tensor

import pyroflows as pf
from pyroflows import distributions as pfd
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from pyroflows.nn import PeriodicMLP
from pyroflows.numerics import bounded_exp, linear_rational_spline, rational_quadratic_spline
from pyroflows.numerics.splines import LOG_SLOPE, _knots
from pyroflows.testing import redraw_

F64 = torch.float64
PI = math.pi


# --- splines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_linear_rational_spline_equals_pyros(inverse: bool) -> None:
    torch.manual_seed(0)
    widths, heights, shares = torch.randn(3, 6, 50, dtype=F64)
    slopes = torch.randn(5, 50, dtype=F64)
    x = 4 * torch.randn(50, dtype=F64)
    value, ladj = linear_rational_spline(x, widths, heights, slopes, shares, 3.0, inverse)
    # Pyro takes sizes after the softmax, shares after the sigmoid, slopes less a minimum.
    expected = _monotonic_rational_spline(
        x,
        widths.softmax(0).mT,
        heights.softmax(0).mT,
        bounded_exp(slopes, LOG_SLOPE).mT - 1e-3,
        shares.sigmoid().mT,
        inverse=inverse,
        bound=3.0,
    )
    # Its slope at the ends of the box is 0.999: the outer bins differ by that.
    first, last = _knots(heights if inverse else widths, 3.0)[[1, -2]]
    inner = (x > first) & (x < last)
    assert 10 < inner.sum() < 50
    for got, wanted in zip((value, ladj), expected, strict=True):
        torch.testing.assert_close(got[inner], wanted[inner], rtol=0, atol=1e-10)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("spline", ["quadratic", "linear"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_splines_round_trip_in_float32(spline: str, scale: float) -> None:
    """Also with slopes at their limits: errors are rounding times the steepest slope."""
    torch.manual_seed(0)
    recipe = pft.LinearRational() if spline == "linear" else pft.RationalQuadratic()
    transform = recipe(scale * torch.randn(recipe.count, 1000))
    x = 6 * (2 * torch.rand(1000) - 1)
    y, ladj = transform.call_and_ladj(x)
    back, inverse_ladj = transform.inverse_and_ladj(y)
    assert all(t.isfinite().all() for t in (y, ladj, back, inverse_ladj))
    steepness = (-ladj).exp().clamp_min(1.0)
    assert ((back - x).abs() <= 1e-4 * steepness).all()


def test_periodic_spline_is_smooth_across_the_ends() -> None:
    torch.manual_seed(0)
    raw = torch.randn(12, 20, dtype=F64)
    ends = torch.tensor([[-PI], [PI]], dtype=F64).expand(2, 20)
    for inverse in (False, True):
        values, ladj = rational_quadratic_spline(ends, raw, PI, inverse, periodic=True)
        torch.testing.assert_close(values, ends)
        torch.testing.assert_close(ladj[0], ladj[1])
        assert (ladj[0].abs() > 1e-3).any()


def test_circular_transform_rotates_by_any_angle() -> None:
    """Zero raw sizes and slopes leave the rotation alone; the values stay in the box."""
    phase = torch.tensor([-100.0, -4.0, 0.5, 9.0], dtype=F64)
    transform = pft.CircularRationalQuadraticTransform(phase, torch.zeros(9, 4, dtype=F64))
    x = torch.linspace(-PI, PI, 50, dtype=F64).unsqueeze(-1).expand(50, 4)
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(torch.polar(ladj.exp(), y), torch.polar(1 + 0 * x, x + phase))
    assert (y.abs() <= PI).all()
    outside = torch.tensor([4.0, -3.2, 1e4, math.nan], dtype=F64)
    for value, ladj in (transform.call_and_ladj(outside), transform.inverse_and_ladj(outside)):
        torch.testing.assert_close(value, outside, equal_nan=True)
        torch.testing.assert_close(ladj, 0 * outside, equal_nan=True)


def test_rotated_angles_stay_in_the_box_in_float32() -> None:
    torch.manual_seed(0)
    recipe = pft.CircularRationalQuadratic(4)
    transform = recipe(torch.randn(13, 1_000_000))
    x = (PI * (2 * torch.rand(1_000_000) - 1)).requires_grad_()
    for y, ladj in (transform.call_and_ladj(x), transform.inverse_and_ladj(x)):
        assert (y.abs() <= PI).all()
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(slope.log(), ladj, rtol=1e-4, atol=1e-3)


# --- fixed maps -------------------------------------------------------------------------------


def log1p_exp(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x)) if x < 1000 else x


# The log-derivative at x, and the points where it is tried; the value must fit float32.
FAR = [0.0, 1e-6, -1e-3, 0.5, -3.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4]
LADJ: list[tuple[pft.Transform, Callable[[Any], Any], list[float]]] = [
    (
        pft.TanhTransform(),
        lambda x: 2 * (mpmath.log(2) - x - log1p_exp(-2 * x)),
        FAR,
    ),
    (pft.SoftplusTransform(), lambda x: -log1p_exp(-x), FAR),
    (pft.LeakyReLUTransform(0.1), lambda x: mpmath.log(0.1) if x < 0 else mpmath.mpf(0), FAR),
    (pft.AsinhTransform(), lambda x: -mpmath.log(mpmath.hypot(1, x)), [*FAR, 1e30, -1e30]),
    (
        pft.InverseTransform(pft.AsinhTransform()),
        lambda x: mpmath.log(mpmath.cosh(x)),
        FAR,
    ),
    (pft.SignedPowerTransform(3.0), lambda x: 2 * mpmath.log1p(abs(x)), FAR),
    (pft.SignedPowerTransform(0.1), lambda x: mpmath.mpf(-0.9) * mpmath.log1p(abs(x)), FAR),
    (pft.LOFTTransform(10.0), lambda x: -mpmath.log1p(max(abs(x) - 10, 0)), FAR),
]


@pytest.mark.parametrize(
    ("transform", "exact", "points"), LADJ, ids=[type(t).__name__ for t, *_ in LADJ]
)
def test_log_derivative_far_out_in_float32(
    transform: pft.Transform, exact: Callable[[Any], Any], points: list[float]
) -> None:
    x = torch.tensor(points, requires_grad=True)
    y, ladj = transform.call_and_ladj(x)
    with mpmath.workdps(60):
        expected = torch.tensor([float(exact(mpmath.mpf(v))) for v in x.tolist()], dtype=F64)
    torch.testing.assert_close(ladj.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad((x + ladj).sum(), x)[0].isfinite().all()
    # The inverse, where a float32 still tells the points apart.
    told = (expected > -8) & y.isfinite().detach()
    back, inverse_ladj = transform.inverse_and_ladj(y.detach())
    torch.testing.assert_close(back[told], x[told].detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(inverse_ladj[told], -ladj[told].detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", [pft.TanhTransform(), pft.SoftplusTransform()])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_saturated_draws_can_be_scored(transform: pft.Transform, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -200.0, 50.0, 1e4], dtype=dtype)
    y = transform(x)
    assert transform.codomain.check(y).all()
    for tensor in transform.inverse_and_ladj(y):
        assert tensor.isfinite().all()
    outside = torch.tensor([-2.0, -1.5], dtype=dtype)
    assert (transform.inverse_and_ladj(outside)[1] == -math.inf).all()


def test_loft_and_signed_power_have_their_closed_forms() -> None:
    x = torch.tensor([-103.0, -100.0, -2.0, 0.0, 5.0, 1e4], dtype=F64)
    size = x.abs()
    loft = x.sign() * ((size - 100).clamp_min(0).log1p() + size.clamp_max(100))
    torch.testing.assert_close(pft.LOFTTransform()(x), loft)
    power = x.sign() * ((1 + size) ** 0.3 - 1) / 0.3
    torch.testing.assert_close(pft.SignedPowerTransform(0.3)(x), power)


@pytest.mark.parametrize(
    "transform", [pft.SignedPowerTransform(2.0), pft.LOFTTransform(1.0), pft.LeakyReLUTransform()]
)
def test_slope_is_one_at_zero(transform: pft.Transform) -> None:
    x = torch.zeros((), requires_grad=True)
    assert torch.autograd.grad(transform(x), x)[0] == 1
    assert torch.autograd.grad(transform.inv(x), x)[0] == 1


# --- heavy tails ------------------------------------------------------------------------------


def test_heavy_tails_have_their_index_on_either_side() -> None:
    r"""Far out the log density falls as :math:`-(1 + 1/\lambda) \log |y|`, as a Student-t's."""
    index = torch.tensor([0.2, 0.5], dtype=F64)
    tails = pft.HeavyTailTransform(*index)
    density = pf.FlowDistribution(dist.Normal(torch.zeros((), dtype=F64), 1.0), [tails])
    y = torch.tensor([[-1e8, -1e9], [1e8, 1e9]], dtype=F64)
    slopes = density.log_prob(y).diff(dim=-1).squeeze(-1) / math.log(10)
    torch.testing.assert_close(slopes, -(1 + 1 / index), rtol=0.03, atol=0)


def test_heavy_tails_are_close_to_student_t() -> None:
    index = torch.tensor(0.1, dtype=F64)
    normal = dist.Normal(torch.zeros((), dtype=F64), 1.0)
    density = pf.FlowDistribution(normal, [pft.HeavyTailTransform(index, index)])
    y = torch.linspace(-6, 6, 50, dtype=F64)
    gap = density.log_prob(y) - dist.StudentT(10.0).log_prob(y)
    assert gap.abs().max() < 0.35


def test_heavy_tails_near_zero_index_are_the_identity() -> None:
    index = torch.tensor(1e-12, dtype=F64)
    x = torch.linspace(-8, 8, 33, dtype=F64)
    y, ladj = pft.HeavyTailTransform(index, index).call_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=1e-9, atol=0)
    torch.testing.assert_close(ladj, 0 * x, rtol=0, atol=1e-9)


def test_heavy_tails_start_where_they_are_told_and_learn() -> None:
    recipe = pft.HeavyTails(index=0.3, max_index=2.0)
    transform = recipe(torch.zeros(2, 1))
    torch.testing.assert_close(transform.left, torch.tensor([0.3]))
    torch.manual_seed(0)
    y = dist.StudentT(3.0).sample((4000, 1))
    flow = pf.Flow([pfl.ElementwiseLayer(1, univariate=recipe), pfl.ActNorm(1)], 1)
    pf.fit_mle(flow, y, steps=400, lr=0.02, standardize=False, seed=0)
    learned = flow.transform.layers[0]().univariate(flow.transform.layers[0].params)
    assert 0.15 < learned.left.item() < 0.6
    assert 0.15 < learned.right.item() < 0.6


# --- the layer --------------------------------------------------------------------------------


def test_elementwise_layer_without_a_context_has_plain_parameters() -> None:
    layer = pfl.ElementwiseLayer(3, univariate=pft.RationalQuadratic(4))
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {"params": (11, 3)}


def test_elementwise_layer_maps_each_feature_given_the_context() -> None:
    layer = pfl.ElementwiseLayer(2, 3, hidden_features=(8,)).double()
    redraw_(layer, 1.0)
    context = torch.randn(3, dtype=F64)
    jacobian = torch.func.jacrev(layer(context))(torch.randn(2, dtype=F64))
    assert jacobian[0, 1] == jacobian[1, 0] == 0
    x = torch.randn(2, dtype=F64)
    assert not torch.allclose(layer(context)(x), layer(-context)(x))


@pytest.mark.parametrize("kept", [False, True])
def test_elementwise_layer_as_a_constant_keeps_the_context_if_asked(kept: bool) -> None:
    layer = pfl.ElementwiseLayer(2, 3, hidden_features=(8,))
    redraw_(layer, 1.0)
    context = torch.randn(3, requires_grad=True)
    y = layer(context).detach_params(keep_context=kept)(torch.randn(2))
    assert y.requires_grad == kept


def test_elementwise_layer_of_angles_has_their_support() -> None:
    layer = pfl.ElementwiseLayer(2, univariate=pft.CircularRationalQuadratic())
    inside = torch.tensor([[3.0, -3.0], [3.0, 3.5]])
    assert layer().codomain.check(inside).tolist() == [True, False]


# --- angles -----------------------------------------------------------------------------------


def any_ncsf(features: int, context: int = 0) -> pf.NCSF:
    torch.manual_seed(0)
    flow = pf.NCSF(features, context, transforms=4, hidden_features=(16,)).double()
    redraw_(flow, 1.0)
    return flow


def test_density_of_angles_is_periodic_in_each() -> None:
    flow = any_ncsf(3)
    x = PI * (2 * torch.rand(20, 3, dtype=F64) - 1)
    for column in range(3):
        low, high = x.clone(), x.clone()
        low[:, column], high[:, column] = -PI, PI
        torch.testing.assert_close(flow().log_prob(low), flow().log_prob(high))
        near = high.clone()
        near[:, column] -= 1e-7
        torch.testing.assert_close(flow().log_prob(near), flow().log_prob(high), rtol=0, atol=1e-4)


def test_support_of_angles_is_the_box() -> None:
    flow = any_ncsf(2, context=1)
    made = flow(torch.zeros(1, dtype=F64))
    x = torch.tensor([[3.0, -3.0], [3.0, 3.5], [-PI, PI]], dtype=F64)
    assert made.support.check(x).tolist() == [True, False, True]
    assert made.log_prob(x).isfinite().tolist() == [True, False, True]
    assert made.support.check(made.sample((1000,))).all()


def test_von_mises_is_fitted_across_the_cut() -> None:
    """To 0.02 nats, with the fit's defaults: angles are not standardised."""
    truth = dist.VonMises(torch.tensor(3.0), torch.tensor(2.0))
    torch.manual_seed(0)
    x = truth.sample((4000, 1))
    flow = pf.NCSF(1, transforms=2)
    pf.fit_mle(flow, x, steps=600, lr=0.01, seed=0)
    assert flow.transform.standardization.is_identity()
    grid = torch.linspace(-PI, PI, 2001).unsqueeze(-1)
    p = truth.log_prob(grid).squeeze(-1)
    with torch.no_grad():
        gap = torch.trapezoid(p.exp() * (p - flow().log_prob(grid)), grid.squeeze(-1))
    assert 0 <= gap < 0.02


def test_a_base_on_a_box_is_not_standardised() -> None:
    box = pfd.UniformBox(2, -1.0, 1.0)
    assert not pf.Flow([], 2, base=box).standardizes
    assert pf.NSF(2).standardizes
    assert pf.NSF(2, 3, base=pfd.Mixture(2, 3)).standardizes


def test_periodic_network_is_a_function_on_the_circle() -> None:
    network = PeriodicMLP(2, 3, 4, (8,)).double()
    redraw_(network, 1.0)
    x, context = torch.randn(5, 2, dtype=F64), torch.randn(3, dtype=F64)
    for turns in ([1, 0], [0, -2]):
        moved = x + 2 * PI * torch.tensor(turns, dtype=F64)
        torch.testing.assert_close(network(moved, context), network(x, context))
    assert not torch.allclose(network(x + PI, context), network(x, context))


# --- files and errors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.NCSF(2, 1, transforms=2, bins=4),
        lambda: pf.NSF(2, transforms=2, spline="linear"),
        lambda: pf.Flow(
            [
                pfl.ElementwiseLayer(2, univariate=pft.LinearRational(4)),
                pft.LOFTTransform(50.0),
                pfl.Inverse(pft.AsinhTransform()),
                pft.SignedPowerTransform(1.5),
                pft.LeakyReLUTransform(0.5),
                pfl.ElementwiseLayer(2, univariate=pft.HeavyTails(0.2)),
                pft.TanhTransform(),
            ],
            2,
        ),
        lambda: pf.Flow([pft.SoftplusTransform()], 2),
    ],
    ids=["NCSF", "NSF", "stack", "softplus"],
)
def test_saved_and_loaded(make: Callable[[], pf.Flow], tmp_path: Path) -> None:
    flow = make()
    redraw_(flow, 0.3)
    pf.save(flow, tmp_path / "flow")
    loaded = pf.load(tmp_path / "flow")
    context = torch.zeros(flow.context_size) if flow.context_size else None
    x = torch.tensor([0.5, 0.2])
    assert torch.equal(flow(context).log_prob(x), loaded(context).log_prob(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.NSF(2, spline="cubic"), "'quadratic' or 'linear', got 'cubic'"),
        (lambda: pft.LinearRational(0), "at least one bin .* bins=0"),
        (lambda: pft.LinearRational(4, -1.0), "positive bound, got bins=4, bound=-1.0"),
        (lambda: pft.CircularRationalQuadratic(0), "at least one bin, got bins=0"),
        (lambda: pft.LeakyReLUTransform(0.0), "slope: expected a positive number, got 0.0"),
        (lambda: pft.SignedPowerTransform(-1.0), "exponent: expected a positive number"),
        (lambda: pft.LOFTTransform(0.0), "threshold: expected a positive number, got 0.0"),
        (lambda: pft.HeavyTails(2.0), "0 < index < max_index, got index=2.0, max_index=1.0"),
        (lambda: pfl.ElementwiseLayer(0), "features >= 1"),
        (lambda: pf.NCSF(0), "features >= 1"),
    ],
)
def test_impossible_numbers_are_refused(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
