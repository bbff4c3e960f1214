"""Univariate maps whose inverse is a root: closed forms, limits, starts, errors, files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from pyroflows.numerics import gauss_legendre, legendre_rule
from pyroflows.testing import check_close, redraw_
from tests.cases.numeric import RECIPES

MAPS = [
    pft.MixtureLogistic(8),
    pft.DeepSigmoidal(8, 2),
    pft.SumOfSquares(6),
    pft.Bernstein(16),
    pft.UnconstrainedMonotonic(8),
]
every_map = pytest.mark.parametrize("recipe", MAPS, ids=lambda r: type(r).__name__)
every_recipe = pytest.mark.parametrize("recipe", [r for r, _ in RECIPES])


def drawn(recipe: Any, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(recipe.count, 50, generator=generator, dtype=torch.float64) * scale
    return raw.to(dtype)


# --- quadrature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_gauss_is_exact_for_polynomials(nodes: int) -> None:
    x = torch.tensor([-3.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    degree = 2 * nodes - 1
    integral, value = gauss_legendre(lambda t: t**degree, x, nodes)
    check_close("integral", integral, x ** (degree + 1) / (degree + 1), 1e-12)
    check_close("value", value, x**degree)
    beyond = gauss_legendre(lambda t: t ** (degree + 1), x, nodes)[0]
    assert (beyond - x ** (degree + 2) / (degree + 2)).abs().max() > 1e-3


def test_a_rule_is_made_once() -> None:
    assert legendre_rule(3) is legendre_rule(3)
    points, weights = legendre_rule(3)
    assert points == pytest.approx([0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5])
    assert weights == pytest.approx([5 / 18, 8 / 18, 5 / 18])


# --- the maps -----------------------------------------------------------------------------------


def test_a_mixture_is_the_logit_of_its_distribution_function() -> None:
    logits, means, log_scales = torch.randn(3, 4, 1, dtype=torch.float64)
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    cdf = (logits.softmax(0) * torch.sigmoid((x - means) * (-log_scales).exp())).sum(0)
    y = pft.MixtureLogisticTransform(logits, means, log_scales)(x)
    check_close("value", y, cdf.logit(), 1e-9)


def test_the_tails_of_a_mixture_have_the_slope_of_its_widest_component() -> None:
    raw = torch.randn(3, 4, 1)
    transform = pft.MixtureLogisticTransform(*raw)
    for x in (torch.tensor([1e4, 1e6]), torch.tensor([-1e4, -1e6])):
        y, ladj = transform.call_and_ladj(x)
        check_close("log-slope", ladj, -raw[2].max().expand(2), 1e-6)
        check_close("line", (y[1] - y[0]) / (x[1] - x[0]), ladj[0].exp(), 1e-6)


def test_separate_components_leave_a_gap_without_underflow() -> None:
    """The slope between them is exp(-100), far below float32's smallest number squared."""
    means, log_scales = torch.tensor([[-2.0], [2.0]]), torch.full((2, 1), math.log(0.02))
    transform = pft.MixtureLogisticTransform(torch.zeros(2, 1), means, log_scales)
    y, ladj = transform.call_and_ladj(torch.tensor([0.0]))
    assert y.abs() < 1e-5
    check_close("log-slope", ladj, torch.tensor([-100 + math.log(4 / 0.02)]), 1e-3)


def test_a_sum_of_squares_is_its_polynomial() -> None:
    recipe = pft.SumOfSquares(degree=4, bound=2.0)
    transform = recipe(drawn(recipe, 1.0))
    u = torch.linspace(-1, 1, 9, dtype=torch.float64).unsqueeze(-1)
    chebyshev = np.polynomial.chebyshev.chebval
    p = chebyshev(u.numpy(), transform.first.numpy(), tensor=False)
    # U_{j-1} = T_j' / j.
    degrees = np.arange(1, 5)[:, None]
    of_t = np.concatenate([np.zeros((1, 50)), transform.second.numpy() / degrees])
    q = np.stack(
        [chebyshev(u.numpy()[:, 0], np.polynomial.chebyshev.chebder(c)) for c in of_t.T], 1
    )
    expected = 1e-3 + (1 - 1e-3) * torch.as_tensor(p**2 + (1 - u.numpy() ** 2) * q**2)
    check_close("slope", transform.slope(u.expand(9, 50)), expected, 1e-10)


def test_every_slope_near_one_is_a_small_step_away() -> None:
    """No saddle: the slope's derivatives by its parameters span all polynomials of its degree."""
    recipe = pft.SumOfSquares(degree=4, bound=1.0)
    u = torch.linspace(-1, 1, 30, dtype=torch.float64)

    def slope(raw: Tensor) -> Tensor:
        return recipe(raw.unsqueeze(-1)).call_and_ladj(u)[1]

    raw = torch.zeros(recipe.count, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(slope, raw)
    assert torch.linalg.matrix_rank(matrix, rtol=1e-6) == 2 * recipe.degree + 1


def test_bernstein_is_its_polynomial_and_the_identity_beyond() -> None:
    recipe = pft.Bernstein(degree=6, bound=2.0)
    raw = drawn(recipe, 1.0)
    transform = recipe(raw)
    u = torch.linspace(0, 1, 11, dtype=torch.float64).unsqueeze(-1)
    shares = 1e-3 / 4 + (1 - 1e-3) * raw.softmax(0)
    edge = torch.full_like(raw[:1], 1 / 6)
    heights = torch.cat([torch.zeros_like(edge), edge, 4 / 6 * shares, edge]).cumsum(0)
    basis = torch.stack([math.comb(6, k) * u**k * (1 - u) ** (6 - k) for k in range(7)])
    check_close("value", transform(4 * u - 2), 4 * (basis * heights.unsqueeze(1)).sum(0) - 2, 1e-12)
    far = torch.tensor([[-1e4], [-2.0], [2.0], [50.0]], dtype=torch.float64).expand(4, 50)
    y, ladj = transform.call_and_ladj(far)
    check_close("far", y, far, 1e-10)
    check_close("log-slope", ladj, torch.zeros_like(ladj), 1e-12)


def test_the_quadrature_resolves_the_steepest_network() -> None:
    """Parameters at their bounds: the derivative of the value is still the slope."""
    recipe = pft.UnconstrainedMonotonic(units=8)
    raw = drawn(recipe, 1.0)
    raw[2:10] *= 1e6
    raw[-8:] = 1e6
    x = torch.linspace(-3, 3, 41, dtype=torch.float64).unsqueeze(-1).expand(41, 50)
    x = x.clone().requires_grad_()
    y, ladj = recipe(raw).call_and_ladj(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    check_close("log-slope", ladj, slope.log(), 1e-6)


@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_inverse_meets_large_parameters(recipe: Any, dtype: torch.dtype) -> None:
    """Also far out: roots are found, up to what the rounding of the value leaves of a point."""
    transform = recipe(drawn(recipe, 5.0, dtype))
    x = torch.tensor([-1e4, -100.0, -3.0, -0.5, 0.1, 2.9, 3.1, 1e4], dtype=dtype)
    x = x.unsqueeze(-1).expand(8, 50)
    y, ladj = transform.call_and_ladj(x)
    assert y.isfinite().all()
    assert ladj.isfinite().all()
    back, back_ladj = transform.inverse_and_ladj(y)
    assert back_ladj.isfinite().all()
    again = transform(back)
    rounding = 200 * torch.finfo(dtype).eps
    check_close("value", again, y, rounding * (1 + y.abs() + ladj.exp() * x.abs()))
    allowed = rounding * (1 + x.abs() + (1 + y.abs()) * (-torch.minimum(ladj, -back_ladj)).exp())
    # Where a whole gap has one value, no point in it is better than another.
    check_close("point", back, x, torch.where(allowed < 1, allowed, torch.inf))


@every_map
def test_no_parameter_is_dead_at_the_start(recipe: Any) -> None:
    """Equal components would have equal gradients and stay equal for ever."""
    raw = torch.zeros(recipe.count, 1, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[-2.1], [-0.3], [0.4], [1.7]], dtype=torch.float64)
    y, ladj = recipe(raw).call_and_ladj(x)
    rows = [torch.autograd.grad(v, raw, retain_graph=True)[0] for v in [*y.sin(), *ladj]]
    slopes = torch.cat(rows, -1)
    names = dict.fromkeys(tuple(row.tolist()) for row in slopes.round(decimals=9))
    # Centres and steepness of a network wait for their weight, which moves at once.
    waiting = 2 * recipe.units - 1 if isinstance(recipe, pft.UnconstrainedMonotonic) else 0
    # The second of two maps sees what the first one gives: no two rows agree there either.
    assert len(names) == recipe.count - waiting


@every_map
def test_zeros_are_near_the_identity(recipe: Any) -> None:
    x = torch.linspace(-6, 6, 49).unsqueeze(-1)
    y, ladj = recipe(torch.zeros(recipe.count, 1)).call_and_ladj(x)
    assert (y - x).abs().max() < 0.4
    assert ladj.abs().max() < 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pft.MixtureLogistic(0), "components: expected at least one, got 0"),
        (lambda: pft.DeepSigmoidal(0), "got units=0, depth=1"),
        (lambda: pft.DeepSigmoidal(2, 0), "got units=2, depth=0"),
        (lambda: pft.SumOfSquares(0), "got degree=0, bound=3.0"),
        (lambda: pft.SumOfSquares(2, -1.0), "got degree=2, bound=-1.0"),
        (lambda: pft.Bernstein(2), "at least 3 .* got degree=2"),
        (lambda: pft.Bernstein(4, 0.0), "got degree=4, bound=0.0"),
        (lambda: pft.UnconstrainedMonotonic(0), "got units=0"),
        (lambda: pft.UnconstrainedMonotonic(2, 0.0), "got units=2, bound=0.0"),
    ],
)
def test_impossible_sizes_are_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_integral_without_a_function_says_so() -> None:
    from pyroflows.transforms.monotonic import IntegralTransform

    with pytest.raises(NotImplementedError, match=r"IntegralTransform does not implement slope\(u"):
        IntegralTransform(torch.zeros(3), 1.0, 2)(torch.zeros(3))


# --- the flows ----------------------------------------------------------------------------------


@every_recipe
def test_density_needs_no_root(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring evaluates the maps; drawing looks for roots."""
    searches = []
    root = pft.increasing.increasing_root  # type: ignore[attr-defined]

    def counted(*args: Any) -> Any:
        searches.append(args)
        return root(*args)

    monkeypatch.setattr("pyroflows.transforms.increasing.increasing_root", counted)
    flow = recipe(2, transforms=1)
    flow().log_prob(torch.zeros(3, 2))
    assert searches == []
    flow().sample((3,))
    assert searches


@every_recipe
def test_files_describe_it(recipe: Any, tmp_path: Path) -> None:
    flow, x = recipe(2, 3, transforms=1, hidden_features=(8,)), torch.randn(4, 2)
    pf.save(flow, tmp_path / "flow")
    context = torch.randn(4, 3)
    loaded = pf.load(tmp_path / "flow")
    check_close("density", loaded(context).log_prob(x), flow(context).log_prob(x))


@every_recipe
def test_samples_follow_the_density(recipe: Any) -> None:
    """E_q[g / q] is the integral of g, here a narrow normal density."""
    torch.manual_seed(0)
    flow = recipe(2, transforms=2, hidden_features=(8,)).double()
    redraw_(flow, 0.2)
    with torch.no_grad():
        x = flow().sample((4_000,))
        centre, scale = x.mean(0), 0.5 * x.std(0)
        g = torch.distributions.Normal(centre, scale).log_prob(x).sum(-1)
        ratio = (g - flow().log_prob(x)).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert (ratio.mean() - 1).abs() < 4 * error < 0.3


def test_data_initialise_a_gaussianization() -> None:
    torch.manual_seed(0)
    y = torch.cat([torch.randn(500, 2) - 4, 0.1 * torch.randn(500, 2) + 9])
    for context in (0, 2):
        layer = pfl.MarginalGaussianization(2, context)
        layer.initialize_(y)
        x = layer(torch.zeros(2) if context else None).inv(y)
        check_close("mean", x.mean(0), torch.zeros(2), 0.2)
        # A kernel's bandwidth widens each mode, which narrows what comes out.
        check_close("deviation", x.std(0), torch.ones(2), 0.3)
        # Once only.
        before = layer(torch.zeros(2) if context else None).inv(y)
        layer.initialize_(10 * y)
        check_close("again", layer(torch.zeros(2) if context else None).inv(y), before)


def test_rows_beyond_those_of_the_start_stay_near() -> None:
    """Six layers from a hundred rows: new rows from the same normal are not thrown far out."""
    torch.manual_seed(0)
    flow = pf.GF(10)
    flow.transform.initialize_(torch.randn(100, 10))
    with torch.no_grad():
        z = flow.transform.inv(torch.randn(1000, 10))
    assert z.abs().max() < 20  # a hundred with the tails of the outermost components


def test_constant_columns_and_few_rows_initialise_too() -> None:
    for y in (torch.ones(100, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [5.0]])):
        layer = pfl.MarginalGaussianization(y.shape[-1])
        layer.initialize_(y)
        assert all(p.isfinite().all() for p in layer.parameters())


def test_a_gaussianization_starts_with_rotations() -> None:
    turned = pf.GF(3, transforms=1)
    layer = turned.transform.layers[-1]
    assert isinstance(layer, pfl.OrthogonalLinear)
    assert layer.weight.abs().min() > 0
