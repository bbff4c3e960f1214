"""The analytic gradient of rational-quadratic splines, beside what autodiff finds."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyroflows.numerics import quadratic_gpu, rational_quadratic_spline
from pyroflows.numerics.concrete import recording
from pyroflows.numerics.quadratic import Spline

F64 = torch.float64
BOUND = 3.0
WAYS = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
BOXES = pytest.mark.parametrize("periodic", [False, True], ids=["tails", "circle"])


def points() -> Tensor:
    """Inside, at knots of zeros, at the ends, in the tails."""
    inside = torch.linspace(-2.9, 2.9, 88, dtype=F64)
    special = [-BOUND, BOUND, 0.0, 1.5, -10.0, 10.0, 1e2, -1e2, 1e4, -1e4, 3.1, -3.1]
    return torch.cat([inside, torch.tensor(special, dtype=F64)])


def raw(bins: int, periodic: bool, *batch: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(3 * bins - (not periodic), *batch, dtype=F64)


def gradients(spline: Any, x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    y, ladj = spline(x, params)
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    found = torch.autograd.grad((y, ladj), (x, params), (weights, weights.flip(0)))
    return y.detach(), ladj.detach(), *found


@WAYS
@BOXES
@pytest.mark.parametrize("bins", [1, 2, 8])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_equals_autodiff_in_float64(bins: int, scale: float, periodic: bool, inverse: bool) -> None:
    x, params = points(), raw(bins, periodic, 100, scale=scale)
    spline = Spline(BOUND, inverse, periodic)
    got = gradients(
        lambda x, p: rational_quadratic_spline(x, p, BOUND, inverse, periodic), x, params
    )
    expected = gradients(spline.composed, x, params)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@WAYS
@BOXES
def test_passes_every_gradient_check(periodic: bool, inverse: bool) -> None:
    """By differences, twice, batched, and with one of the inputs constant."""
    x = (5 * torch.rand(3, 2, dtype=F64) - 2.5).requires_grad_()
    params = raw(3, periodic, 3, 2).requires_grad_()

    def spline(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(x, params, BOUND, inverse, periodic)

    assert torch.autograd.gradcheck(spline, (x, params), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(spline, (x, params))
    assert torch.autograd.gradcheck(spline, (x, params.detach()))
    assert torch.autograd.gradcheck(spline, (x.detach(), params))


@WAYS
# Torch's forward mode scripts its own decompositions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_works_inside_function_transforms(inverse: bool) -> None:
    x, params = 2 * torch.randn(5, 3, dtype=F64), raw(4, False, 5, 3)

    def spline(x: Tensor, params: Tensor) -> Tensor:
        return torch.stack(rational_quadratic_spline(x, params, BOUND, inverse))

    whole = spline(x, params)
    torch.testing.assert_close(torch.func.vmap(spline, (0, 1), 1)(x, params), whole)
    by_params = torch.func.grad(lambda p: spline(x, p).sum())(params)
    given = params.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(spline(x, given).sum(), given)[0], by_params)
    with forward_ad.dual_level():
        y, ladj = spline(forward_ad.make_dual(x, torch.ones_like(x)), params)
        tangent = forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(tangent, ladj.detach().exp())


@WAYS
def test_the_layout_in_memory_does_not_matter(inverse: bool) -> None:
    x, params = 3 * torch.randn(2, 5, 3, dtype=F64), raw(4, False, 2, 5, 3)

    def spline(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(x, params, BOUND, inverse)

    expected = gradients(spline, x, params)
    for order in ((1, 2, 3, 0), (0, 3, 2, 1), (0, 2, 3, 1)):
        back = sorted(range(4), key=order.__getitem__)
        stored = params.permute(order).contiguous().permute(back)
        assert stored.stride() != params.stride()
        got = gradients(spline, x, stored)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@WAYS
@BOXES
def test_nan_and_infinity(periodic: bool, inverse: bool) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5], dtype=F64).requires_grad_()
    y, ladj = rational_quadratic_spline(x, raw(4, periodic, 4), BOUND, inverse, periodic)
    assert y.isnan().tolist() == ladj.isnan().tolist() == [True, False, False, False]
    assert y[1:3].tolist() == [torch.inf, -torch.inf]
    assert ladj[1:3].tolist() == [0.0, 0.0]
    (slope,) = torch.autograd.grad(y.sum() + ladj.sum(), x)
    assert slope[1:3].tolist() == [1.0, 1.0]


@WAYS
def test_float32_is_near_float64(inverse: bool) -> None:
    x, params = 6 * (2 * torch.rand(2000) - 1), raw(8, False, 2000).float()

    def spline(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(x, params, 5.0, inverse)

    got = gradients(spline, x, params)
    expected = gradients(spline, x.double(), params.double())
    for single, double in zip(got, expected, strict=True):
        apart = (single - double).abs() / (1 + double.abs())
        assert apart.square().mean().sqrt() < 5e-5
    assert (got[0] - expected[0]).abs().max() < 1e-3


def test_no_number_of_bins_fits() -> None:
    with pytest.raises(ValueError, match=r"params: expected a first dimension of 3 bins - 1, got"):
        rational_quadratic_spline(torch.zeros(3), torch.zeros(12, 3), 1.0)
    with pytest.raises(ValueError, match=r"params: expected a first dimension of 3 bins, got"):
        rational_quadratic_spline(torch.zeros(3), torch.zeros(11, 3), 1.0, periodic=True)


@WAYS
@BOXES
@pytest.mark.parametrize("bins", [1, 2, 8])
def test_what_is_recorded_for_a_compiler_is_the_same(
    bins: int, periodic: bool, inverse: bool
) -> None:
    x, params = points(), raw(bins, periodic, 100)

    def spline(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(x, params, BOUND, inverse, periodic)

    expected = gradients(spline, x, params)
    with recording():
        got = gradients(spline, x, params)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("found", [False, True])
def test_without_triton_there_are_no_kernels(
    found: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is not installed; and where it is, but cannot be imported."""
    quadratic_gpu.are_right.cache_clear()
    monkeypatch.setattr(quadratic_gpu, "find_spec", lambda name: found or None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pyroflows.numerics.quadratic_kernels", raising=False)
    spline = Spline(BOUND, False, False)
    assert quadratic_gpu.by_kernels(spline, raw(8, False, 5)) is spline
    assert [r.message.split(" (")[0] for r in caplog.records] == ["No kernels for splines"] * found
