"""The kernels of splines against torch's operations: on a GPU, else by Triton's interpreter.

``make test-triton`` runs them on a CPU; see there what it needs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.numerics import analytic, quadratic
from pyroflows.numerics.quadratic import Spline
from pyroflows.numerics.quadratic_gpu import KernelSpline, are_right, by_kernels
from pyroflows.numerics.splines import _knots
from tests.test_spline_gradient import BOUND, BOXES, F64, WAYS, gradients, points, raw

pytest.importorskip("triton", reason="Triton is not there: see make test-triton")
kernels = pytest.importorskip("pyroflows.numerics.quadratic_kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="there is no CUDA device, and TRITON_INTERPRET is not 1",
)


@pytest.fixture(autouse=True)
def arc_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no libdevice: NumPy stands in for the one function that is used."""
    are_right.cache_clear()
    if INTERPRETED:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def atan(x: Any) -> Any:
            return tl.core.tensor(TensorHandle(np.arctan(x.handle.data), x.handle.dtype), x.type)

        monkeypatch.setattr(kernels.libdevice, "atan", atan)


def by_kernel(inverse: bool, periodic: bool = False, bound: float = BOUND) -> Any:
    mapping = KernelSpline(bound, inverse, periodic)
    return lambda x, params: analytic.apply(mapping, x, params)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@WAYS
@BOXES
@pytest.mark.parametrize("bins", [1, 2, 5, 8])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_equals_autodiff_in_float64(bins: int, scale: float, periodic: bool, inverse: bool) -> None:
    """In the box, in the tails, at its ends, and at the knots of raw zeros."""
    x, params = on_device(points(), raw(bins, periodic, 100, scale=scale))
    got = gradients(by_kernel(inverse, periodic), x, params)
    expected = gradients(Spline(BOUND, inverse, periodic).composed, x, params)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@WAYS
@BOXES
def test_float32_is_near_float64(periodic: bool, inverse: bool) -> None:
    x, params = on_device(7.5 * (2 * torch.rand(2000) - 1), raw(8, periodic, 2000).float())
    got = gradients(by_kernel(inverse, periodic, 5.0), x, params)
    exact = Spline(5.0, inverse, periodic).composed
    expected = gradients(exact, x.double(), params.double())
    for single, double in zip(got, expected, strict=True):
        apart = (single - double).abs() / (1 + double.abs())
        assert apart.square().mean().sqrt() < 5e-5
    assert (got[0] - expected[0]).abs().max() < 1e-3


@WAYS
def test_knots_are_met_from_both_sides(inverse: bool) -> None:
    params = raw(8, False, 9)
    ends = _knots(params[:8], BOUND), _knots(params[8:16], BOUND)
    given, expected = reversed(ends) if inverse else ends
    columns = torch.arange(9)
    at, below, above = (given[columns, columns] + step for step in (0.0, -1e-9, 1e-9))
    spline, (params,) = by_kernel(inverse), on_device(params)
    for x in (at, below, above):
        y, ladj = spline(x.to(DEVICE), params)
        torch.testing.assert_close(y.cpu(), expected[columns, columns], rtol=0, atol=1e-6)
        # Its derivative is continuous.
        torch.testing.assert_close(ladj, spline(at.to(DEVICE), params)[1], rtol=0, atol=1e-5)


@WAYS
@BOXES
def test_passes_every_gradient_check(periodic: bool, inverse: bool) -> None:
    """By differences, twice, batched, and with one of the inputs constant."""
    x = (5 * torch.rand(2, 2, dtype=F64, device=DEVICE) - 2.5).requires_grad_()
    params = raw(2, periodic, 2, 2).to(DEVICE).requires_grad_()
    spline = by_kernel(inverse, periodic)
    assert torch.autograd.gradcheck(spline, (x, params), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(spline, (x, params))
    assert torch.autograd.gradcheck(spline, (x, params.detach()))
    assert torch.autograd.gradcheck(spline, (x.detach(), params))


@WAYS
def test_the_layout_in_memory_does_not_matter(inverse: bool) -> None:
    x, params = on_device(3 * torch.randn(2, 5, 3, dtype=F64), raw(4, False, 2, 5, 3))
    expected = gradients(Spline(BOUND, inverse, False).composed, x, params)
    for order in ((0, 1, 2, 3), (1, 2, 3, 0), (0, 3, 2, 1), (1, 0, 2, 3), (3, 0, 1, 2)):
        back = sorted(range(4), key=order.__getitem__)
        stored = params.permute(order).contiguous().permute(back)
        got = gradients(by_kernel(inverse), x, stored)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    shared = params[:, :1, :1].expand_as(params)
    got = gradients(by_kernel(inverse), x, shared)
    expected = gradients(Spline(BOUND, inverse, False).composed, x, shared)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@WAYS
@pytest.mark.parametrize("batch", [(), (0,), (0, 3), (1,), (129,), (3, 1)])
@pytest.mark.parametrize("bins", [3, 40])
def test_any_number_of_points_and_bins(batch: tuple[int, ...], bins: int, inverse: bool) -> None:
    x, params = on_device(3 * torch.randn(batch, dtype=F64), raw(bins, False, *batch))
    got = by_kernel(inverse)(x, params)
    expected = Spline(BOUND, inverse, False).composed(x, params)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@WAYS
@BOXES
def test_nan_and_infinity(periodic: bool, inverse: bool) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, 0.5], dtype=F64, device=DEVICE)
    x.requires_grad_()
    params = raw(4, periodic, 5).to(DEVICE)
    params[3, 4] = torch.nan
    y, ladj = by_kernel(inverse, periodic)(x, params)
    assert y.isnan().tolist() == ladj.isnan().tolist() == [True, False, False, False, True]
    assert y[1:3].tolist() == [torch.inf, -torch.inf]
    assert ladj[1:3].tolist() == [0.0, 0.0]
    (slope,) = torch.autograd.grad(y.sum() + ladj.sum(), x)
    assert slope[1:3].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("autoregressive", [False, True])
def test_flows_use_them(autoregressive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = pf.NSF(3, transforms=2, hidden_features=(8,), bins=4, autoregressive=autoregressive)
    flow, x = flow.double().to(DEVICE), 3 * torch.randn(50, 3, dtype=F64, device=DEVICE)

    def loss_and_gradients() -> list[Tensor]:
        loss = -flow().log_prob(x).mean()
        return [loss, *torch.autograd.grad(loss, list(flow.parameters()))]

    calls = []
    evaluate = KernelSpline.evaluate
    monkeypatch.setattr(KernelSpline, "evaluate", lambda *a: calls.append(1) or evaluate(*a))
    if INTERPRETED:  # where no tensor is a GPU's
        monkeypatch.setattr(quadratic, "Spline", KernelSpline)
    got = [t.cpu() for t in loss_and_gradients()]
    assert len(calls) == 2
    monkeypatch.undo()
    flow, x = flow.cpu(), x.cpu()
    torch.testing.assert_close(got, loss_and_gradients(), rtol=1e-9, atol=1e-12)


@WAYS
def test_recorders_see_an_operation(inverse: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        return gradients(by_kernel(inverse), x, params)

    inputs = on_device(points(), raw(4, False, 100))
    graph = make_fx(function)(*inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert [n for n in names if n.startswith("pyroflows")] == [
        "pyroflows.spline_values.default",
        "pyroflows.spline_gradients.default",
    ]
    others = on_device(points().flip(0), raw(4, False, 100))
    torch.testing.assert_close(graph(*others), function(*others))
    rows, *options = inputs[1].unsqueeze(1), BOUND, inverse, False
    checks = ("test_schema", "test_faketensor")
    values, back = torch.ops.pyroflows.spline_values, torch.ops.pyroflows.spline_gradients
    torch.library.opcheck(values, (inputs[0], rows, *options), test_utils=checks)
    for of_params in (False, True):
        given = (inputs[0], rows, inputs[0], inputs[0], *options, of_params)
        torch.library.opcheck(back, given, test_utils=checks)


@WAYS
@BOXES
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_they_are_used_where_they_are_right(
    dtype: torch.dtype, periodic: bool, inverse: bool, caplog: pytest.LogCaptureFixture
) -> None:
    spline = Spline(BOUND, inverse, periodic)
    params = raw(8, periodic, 5).to(DEVICE, dtype)
    assert type(by_kernels(spline, params)) is KernelSpline
    assert by_kernels(spline, params.half()) is spline
    assert not caplog.records


@pytest.mark.parametrize("wrong", ["off", "broken"])
def test_they_are_not_used_where_they_are_wrong(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gradient(self: Any, params: Tensor, saved: Any, of_y: Tensor, *rest: Any) -> Any:
        if wrong == "broken":
            raise RuntimeError("no compiler\nto be found")
        return right(self, params, saved, 1.01 * of_y, *rest)

    right = KernelSpline.gradient
    monkeypatch.setattr(KernelSpline, "gradient", gradient)
    spline, params = Spline(BOUND, False, False), raw(8, False, 5).to(DEVICE)
    with caplog.at_level(logging.WARNING):
        assert by_kernels(spline, params) is by_kernels(spline, params) is spline
    (message,) = [record.message for record in caplog.records]
    reason = r"no compiler" if wrong == "broken" else "they are off by 0.0"
    assert message.startswith(f"No kernels for splines ({reason}")


class NoGPU:
    """A driver that says what to compile for; nothing is launched."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_to_ptx() -> None:
    """All kernels for an H100, by the very calls that would launch them."""
    from triton.runtime import driver

    driver.set_active(NoGPU())
    for dtype in (torch.float32, F64):
        for inverse in (False, True):
            for rows in (torch.zeros(23, 64, 32), torch.zeros(6, 5, 33).mT, torch.zeros(2, 1, 1)):
                p = rows.to(dtype)
                x, strides = torch.zeros(p[0].numel(), dtype=dtype), (p.shape[2], *p.stride())
                form = kernels.form_of(len(p), 5.0, inverse, len(p) % 3 == 0)
                rest = len(x), strides, form
                values = kernels.values.warmup(x, p, x, x, *rest, grid=(1,))
                back = kernels.gradients.warmup(x, p, x, x, x, p, *rest, True, grid=(1,))
                for kernel in (values, back):
                    assert ".target sm_90" in kernel.asm["ptx"]
                    # No constant has been single precision on its way.
                    assert dtype != F64 or "f32" not in kernel.asm["ttir"]


def test_they_compile_to_ptx(tmp_path: Path) -> None:
    """Where there is no GPU, too; in a process without the interpreter."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    script = "from tests.test_triton import compile_to_ptx; compile_to_ptx()"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.ptx"))) == 2 * 2 * 3 * 2
