"""Roots of increasing functions: known roots, gradients of the implicit function, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyroflows.errors import InversionError
from pyroflows.numerics import has_values, increasing_root, straight_tails
from pyroflows.testing import check_close

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def cubic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nearly flat at zero, steep beyond: hard for Newton's method alone."""
    return x**3 + 1e-3 * x, (3 * x**2 + 1e-3).log()


def kinked(x: Tensor) -> tuple[Tensor, Tensor]:
    """Slope 0.01 below and 100 above."""
    slope = torch.where(x < 3, 0.01, 100.0).to(x.dtype)
    return slope * (x - 3), slope.log()


def parametric(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    slope = 1 + 3 * a[0] ** 2 * x**2 + a[1] * (1 - x.tanh() ** 2)
    return x + a[0] ** 2 * x**3 + a[1] * x.tanh(), slope.log()


@PRECISIONS
@pytest.mark.parametrize("function", [cubic, kinked])
def test_finds_roots_near_and_far(function: object, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(500) * 3, torch.tensor([0.0, 3.0, 1e4, -1e4, 1e-20])]).to(dtype)
    y, log_slope = function(x)  # type: ignore[operator]
    found, inverse_log_slope = increasing_root(function, y)  # type: ignore[arg-type]
    rounding = 100 * torch.finfo(dtype).eps
    # The value's own rounding is worth this much of the point.
    check_close("root", found, x, rounding * (1 + x.abs() + y.abs() * (-log_slope).exp()))
    value = function(found)[0]  # type: ignore[operator]
    check_close("value", value, y, rounding * (1 + y.abs() + log_slope.exp() * x.abs()))
    assert inverse_log_slope.isfinite().all()


def test_gradients_are_those_of_the_implicit_function() -> None:
    a = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def root(y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return increasing_root(lambda x: parametric(x, a), y)

    assert torch.autograd.gradcheck(root, (y, a))
    assert torch.autograd.gradgradcheck(root, (y, a))


def test_vmap_and_grad_go_through() -> None:
    a = torch.tensor([0.3, 0.5], dtype=torch.float64)
    y = torch.linspace(-50, 50, 7, dtype=torch.float64)

    def root(y: Tensor) -> Tensor:
        return increasing_root(lambda x: parametric(x, a), y)[0]

    check_close("vmap", torch.func.vmap(root)(y), root(y), 1e-12)
    slopes = torch.func.vmap(torch.func.grad(root))(y)
    expected = increasing_root(lambda x: parametric(x, a), y)[1].exp()
    check_close("vmap of grad", slopes, expected, 1e-12)


def test_a_nan_stays_alone() -> None:
    x = increasing_root(cubic, torch.tensor([1.0, torch.nan, 8.0]))[0]
    assert x.isnan().tolist() == [False, True, False]


def test_a_nan_in_the_function_stays_alone() -> None:
    shift = torch.tensor([0.0, torch.nan])
    x = increasing_root(lambda x: (x + shift, torch.zeros_like(x)), torch.ones(2))[0]
    assert x.isnan().tolist() == [False, True]


def test_the_batch_of_the_function_counts() -> None:
    shift = torch.randn(5, 1)
    x, log_slope = increasing_root(
        lambda x: (x + shift, torch.zeros_like(x + shift)), torch.ones(3)
    )
    check_close("root", x, 1 - shift.expand(5, 3), 1e-6)
    assert log_slope.shape == (5, 3)


@pytest.mark.parametrize("far", [torch.tensor(2.0), torch.tensor(-1.0)])
def test_a_value_out_of_reach_is_an_error(far: Tensor) -> None:
    y = torch.stack([torch.tensor(0.5), far])
    with pytest.raises(InversionError, match=r"1 of 2 root\(s\).*at y = " + f"{far:g}"):
        increasing_root(lambda x: (x.tanh().abs(), -x.abs()), y)


def test_a_wrong_slope_cannot_hide() -> None:
    """The function jumps over the value: the residual is reported."""

    def jump(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 2 * (x > 1), torch.zeros_like(x)

    with pytest.raises(InversionError, match="worst residual is 1 "):
        increasing_root(jump, torch.tensor([2.0], dtype=torch.float64))


def test_has_values() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(has_values(x))
        return x

    torch.func.vmap(look)(torch.zeros(2))
    look(torch.zeros(2, device="meta"))
    look(torch.zeros(2))
    assert seen == [False, False, True]


def test_straight_tails_are_tangents() -> None:
    x = torch.tensor([-4.0, -1.0, 0.5, 1.0, 1e4], dtype=torch.float64, requires_grad=True)
    value, log_slope = straight_tails(lambda x: (x.sinh(), x.cosh().log()), x, bound=1.0)
    (slope,) = torch.autograd.grad(value.sum(), x)
    check_close("slope", log_slope.exp(), slope, 1e-12)
    edge = torch.tensor(1.0, dtype=torch.float64)
    check_close("far", value[-1], edge.sinh() + edge.cosh() * (x[-1] - 1), 1e-10)
