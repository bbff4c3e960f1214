"""Functions on tensors against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pyroflows.numerics import (
    autoregressive_mask,
    binary_code,
    bounded_exp,
    forked_rng,
    hidden_degrees,
    log_abs_det,
    products,
    rational_quadratic_spline,
    soft_clamp,
    sum_rightmost,
)

F64 = torch.float64


# --- bounds -----------------------------------------------------------------------------------


def test_soft_clamp_is_bounded_and_starts_as_the_identity() -> None:
    x = torch.tensor([-1e300, -1e4, -1.0, 0.0, 1e-3, 1.0, 1e4, 1e300], dtype=F64)
    y = soft_clamp(x, 2.0)
    assert (y.abs() <= 2.0).all()
    assert (y.diff() >= 0).all()
    assert torch.equal(y, -soft_clamp(-x, 2.0))
    torch.testing.assert_close(y[4], x[4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", [soft_clamp, bounded_exp])
def test_gradient_of_a_bounded_function_is_its_own(function) -> None:  # type: ignore[no-untyped-def]
    """Not that of what went in: finite differences agree, also where the bound is active."""
    x = torch.tensor([-50.0, -3.0, 0.0, 0.5, 3.0, 50.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: function(v, 2.0), (x,))
    assert torch.autograd.gradgradcheck(lambda v: function(v, 2.0), (x,))


def test_bounded_exp_keeps_between_its_limits() -> None:
    y = bounded_exp(torch.tensor([-1e30, 0.0, 1e30]), 3.0)
    torch.testing.assert_close(y, torch.tensor([math.exp(-3), 1.0, math.exp(3)]))


# --- masks ------------------------------------------------------------------------------------


@given(width=st.integers(1, 40), features=st.integers(1, 12), lowest=st.integers(0, 1))
def test_hidden_degrees_are_sorted_and_spread(width: int, features: int, lowest: int) -> None:
    degrees = hidden_degrees(width, features, lowest)
    lowest = min(lowest, features - 1)
    assert degrees.shape == (width,)
    assert degrees.tolist() == sorted(degrees.tolist())
    assert degrees[0] == lowest
    assert degrees[-1] <= features - 1
    if width >= features - lowest:
        assert set(degrees.tolist()) == set(range(lowest, features))


def test_autoregressive_mask_is_an_order() -> None:
    out, seen = torch.tensor([0, 1, 2]), torch.tensor([1, 2])
    expected = [[False, False], [True, False], [True, True]]
    assert autoregressive_mask(out, seen).tolist() == expected


@given(features=st.integers(2, 70))
def test_binary_code_separates_every_pair(features: int) -> None:
    digits = (features - 1).bit_length()
    codes = torch.stack([binary_code(features, i) for i in range(2 * digits)])
    for i in range(features):
        apart = (codes != codes[:, i : i + 1]).any(0)
        assert apart.sum() == features - 1
    assert torch.equal(codes[0::2], ~codes[1::2])
    assert (codes.sum(1) > 0).all()


def test_binary_code_of_one_feature_maps_it() -> None:
    assert all(binary_code(1, i).tolist() == [True] for i in range(4))


@given(shape=st.lists(st.integers(0, 3), max_size=4), data=st.data())
def test_sum_rightmost(shape: list[int], data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, len(shape)))
    value = torch.ones(shape)
    total = sum_rightmost(value, dims)
    assert total.shape == tuple(shape[: len(shape) - dims])
    assert torch.equal(total, torch.full_like(total, math.prod(shape[len(shape) - dims :])))


# --- splines ----------------------------------------------------------------------------------


def raw_parameters(bins: int, *batch: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(3 * bins - 1, *batch, dtype=F64, generator=generator)


def test_log_abs_det_is_that_of_torch_with_two_gradients() -> None:
    matrix = torch.randn(4, 3, 3, dtype=F64, requires_grad=True)
    assert torch.allclose(log_abs_det(matrix), torch.linalg.slogdet(matrix).logabsdet)
    assert torch.autograd.gradcheck(log_abs_det, matrix)
    assert torch.autograd.gradgradcheck(log_abs_det, matrix)


@pytest.mark.parametrize("bins", [1, 2, 8])
@pytest.mark.parametrize("inverse", [False, True])
def test_spline_of_zeros_is_the_identity(bins: int, inverse: bool) -> None:
    x = torch.linspace(-7, 7, 57, dtype=F64)
    y, ladj = rational_quadratic_spline(x, raw_parameters(bins, scale=0.0), 5.0, inverse)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(ladj, torch.zeros_like(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("inverse", [False, True])
def test_spline_is_smooth_monotone_and_hits_its_corners(scale: float, inverse: bool) -> None:
    parameters = raw_parameters(6, scale=scale)
    edges = torch.tensor([-3.0, 3.0], dtype=F64)
    y, ladj = rational_quadratic_spline(edges, parameters, 3.0, inverse)
    assert torch.equal(y, edges)
    assert torch.equal(ladj, torch.zeros_like(edges))
    near = edges * (1 - 1e-12)
    y, ladj = rational_quadratic_spline(near, parameters, 3.0, inverse)
    torch.testing.assert_close(y, edges, rtol=0, atol=1e-8)
    torch.testing.assert_close(ladj, torch.zeros_like(edges), rtol=0, atol=1e-5)
    x = torch.linspace(-4, 4, 4001, dtype=F64)
    y, ladj = rational_quadratic_spline(x, parameters, 3.0, inverse)
    assert (y.diff() > 0).all()
    # Trapezoidal sum of the slope: the derivative is that of the value, knots included.
    if scale < 10:
        torch.testing.assert_close(torch.trapezoid(ladj.exp(), x), y[-1] - y[0], rtol=1e-3, atol=0)


def test_spline_agrees_with_a_knot_by_knot_evaluation() -> None:
    """The formula of the paper, written for one point at a time."""
    parameters = raw_parameters(5)
    widths, heights, slopes = parameters.split([5, 5, 4])
    bound, smallest = 3.0, 1e-3

    def knots(raw: torch.Tensor) -> list[float]:
        sizes = smallest + (1 - smallest * len(raw)) * raw.softmax(0)
        return [-bound + 2 * bound * float(sizes[:i].sum()) for i in range(len(raw) + 1)]

    kx, ky = knots(widths), knots(heights)
    limit = math.log(1e3)
    stretch = math.pi / (2 * limit)
    inner = [math.exp(math.atan(s * stretch) / stretch) for s in slopes.tolist()]
    d = [1.0, *inner, 1.0]
    for x in (-2.9, -1.0, 0.0, 0.7, 2.9):
        k = max(i for i in range(5) if kx[i] <= x)
        w, h = kx[k + 1] - kx[k], ky[k + 1] - ky[k]
        s, xi = h / w, (x - kx[k]) / w
        bottom = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
        expected = ky[k] + h * (s * xi**2 + d[k] * xi * (1 - xi)) / bottom
        top = d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2
        point = torch.tensor(x, dtype=F64)
        y, ladj = rational_quadratic_spline(point, parameters, bound)
        assert y.item() == pytest.approx(expected, abs=1e-12)
        assert ladj.item() == pytest.approx(math.log(s**2 * top / bottom**2), abs=1e-11)


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    of_x=st.integers(0, 3),
    bins=st.integers(1, 4),
    inverse=st.booleans(),
)
def test_spline_broadcasts_points_and_parameters(
    shape: list[int], of_x: int, bins: int, inverse: bool
) -> None:
    """Bins lead, whatever dimensions follow; either side may lack some on the left."""
    x = torch.linspace(-4, 4, math.prod(shape[of_x:]), dtype=F64).reshape(shape[of_x:])
    for batch in (shape, shape[1:], []):
        parameters = raw_parameters(bins, *batch)
        full = torch.broadcast_shapes(x.shape, batch)
        y, ladj = rational_quadratic_spline(x, parameters, 3.0, inverse)
        assert y.shape == ladj.shape == full
        missing = (1,) * (len(full) - len(batch))
        whole = parameters.reshape(len(parameters), *missing, *batch).expand(-1, *full)
        expected = rational_quadratic_spline(x.expand(full), whole, 3.0, inverse)
        # The bins are laid out once for all points that share them, and may round otherwise.
        torch.testing.assert_close((y, ladj), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_spline_inverts_and_has_finite_gradients_for_any_parameters(
    dtype: torch.dtype, scale: float
) -> None:
    """Bins at their least width and slopes at their limits, at edges and far out."""
    parameters = raw_parameters(8, 64, scale=scale).to(dtype).requires_grad_()
    x = torch.cat([torch.linspace(-5, 5, 61), torch.tensor([-1e4, 1e4, 5.5])]).to(dtype)
    x.requires_grad_()
    for inverse in (False, True):
        y, ladj = rational_quadratic_spline(x, parameters, 5.0, inverse)
        gradients = torch.autograd.grad(y.sum() + ladj.sum(), [x, parameters])
        assert all(g.isfinite().all() for g in (y, ladj, *gradients))
    if dtype == F64:
        y, ladj = rational_quadratic_spline(x, parameters, 5.0)
        back = rational_quadratic_spline(y, parameters, 5.0, inverse=True)[0]
        # The error of a value, seen through the inverse map's slope.
        allowed = 1e-13 * (1 + (-ladj).exp()) * (1 + x.abs())
        assert ((back - x).abs() <= allowed).all()


def test_spline_returns_nan_for_nan() -> None:
    x = torch.tensor([torch.nan, 0.0], dtype=F64)
    for inverse in (False, True):
        y, ladj = rational_quadratic_spline(x, raw_parameters(4), 3.0, inverse)
        assert y.isnan().tolist() == ladj.isnan().tolist() == [True, False]


def test_forked_rng_leaves_no_trace() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with forked_rng(0):
        first = torch.rand(2)
    with forked_rng():
        torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with forked_rng(0):
        assert torch.equal(torch.rand(2), first)


# --- products ---------------------------------------------------------------------------------


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by oneDNN, whether or not it is the faster one here."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("outputs", [96, 160])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_torch(outputs: int, bias: bool) -> None:
    x = torch.randn(3, 100, 128, requires_grad=True)
    weight = torch.randn(outputs, 128, requires_grad=True)
    inputs = [x, weight, *([torch.randn(outputs, requires_grad=True)] if bias else [])]
    ours, theirs = products.linear(*inputs), functional.linear(*inputs)
    assert "_Linear" in str(ours.grad_fn.next_functions)
    # Sums of 128 and of 300 products, in another order.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    gradients = [
        torch.autograd.grad(out, inputs, torch.cos(theirs), retain_graph=True)
        for out in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)

    def curvature(out: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    torch.testing.assert_close(curvature(ours), curvature(theirs), atol=0.1, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.usefixtures("onednn")
def test_products_under_transforms_are_left_to_torch() -> None:
    x, weight = torch.randn(2, 300, 128), torch.randn(128, 128)
    expected = x @ weight.mT
    batched = torch.func.vmap(products.linear, (0, None))(x, weight)
    _, tangent = torch.func.jvp(lambda x: products.linear(x, weight), (x,), (x,))
    torch.testing.assert_close(batched, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tangent, expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert products.linear(x.double(), weight.double()).dtype == torch.float64
    assert products.linear(x.to("meta"), weight.to("meta")).is_meta


@pytest.mark.usefixtures("onednn")
def test_products_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        products.linear(torch.zeros(300, 128), torch.zeros(64, 128))
    assert counter.get_total_flops() == 2 * 300 * 128 * 64


@pytest.mark.parametrize(
    ("capability", "processor", "faster"),
    [
        ("AVX512", "vendor_id: AuthenticAMD", True),
        ("AVX512", "vendor_id: GenuineIntel", False),
        ("AVX2", "vendor_id: AuthenticAMD", False),
    ],
)
def test_the_machine_decides_between_the_libraries(
    capability: str, processor: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_processor", lambda: processor)
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert products.onednn_is_faster.__wrapped__() is (faster and has_operator)
