"""Rational-quadratic splines on a GPU, by kernels of their own where these can be had."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyroflows.errors import first_line
from pyroflows.numerics.quadratic import Flat, Spline

logger = logging.getLogger(__name__)

#: Points at which kernels are compared with torch's operations.
POINTS = 1000
#: How far a kernel may be from float64, relative and in units of the root of the dtype's rounding.
TOLERANCE = 10.0


def by_kernels(spline: Spline, params: Tensor) -> Spline:
    """The same spline by kernels, where Triton compiles them and they are right on this device."""
    takes = params.dtype in (torch.float32, torch.float64) and params[0].numel() < 2**31
    if takes and are_right(spline, params.device, params.dtype, len(params)):
        return KernelSpline(*spline)
    return spline


class KernelSpline(Spline):
    """`Spline` by one kernel for its values and one for its gradients."""

    def evaluate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        flat = Flat(params)
        points = flat.points(x).contiguous()
        y, ladj = torch.ops.pyroflows.spline_values(points, flat.rows(params), *self)
        return flat.unpoints(y), flat.unpoints(ladj), (points,)

    def gradient(
        self,
        params: Tensor,
        saved: tuple[Tensor, ...],
        of_y: Tensor,
        of_ladj: Tensor,
        of_params: bool,
    ) -> tuple[Tensor, Tensor | None]:
        flat = Flat(params)
        grads = [flat.points(grad).contiguous() for grad in (of_y, of_ladj)]
        point, rows = torch.ops.pyroflows.spline_gradients(
            *saved, flat.rows(params), *grads, *self, of_params
        )
        return flat.unpoints(point), flat.unparams(rows) if of_params else None


@cache
def are_right(spline: Spline, device: torch.device, dtype: torch.dtype, count: int) -> bool:
    """Whether kernels for so many raw parameters run on a device, and agree with float64."""
    if find_spec("triton") is None:
        return False
    try:
        with torch.no_grad(), _disable_current_modes():
            gap = _gap(spline, device, dtype, count)
    except Exception as error:  # of Triton, of a compiler, of the driver
        reason = first_line(error)
    else:
        if gap <= TOLERANCE * torch.finfo(dtype).eps ** 0.5:
            return True
        reason = f"they are off by {gap:.2g}"
    logger.warning("No kernels for splines (%s): they are evaluated by torch's operations.", reason)
    return False


def _gap(spline: Spline, device: torch.device, dtype: torch.dtype, count: int) -> float:
    """How far values and gradients of kernels are from those of torch's operations in float64."""
    generator = torch.Generator(device).manual_seed(0)
    params = torch.randn(count, POINTS, dtype=dtype, device=device, generator=generator)
    # In the box and beyond it.
    x = torch.linspace(-1.5, 1.5, POINTS, dtype=dtype, device=device) * spline.bound

    def results(kind: type[Spline], x: Tensor, params: Tensor) -> list[Tensor]:
        y, ladj, saved = kind(*spline).evaluate(x, params)
        of_x, of_params = kind(*spline).gradient(params, saved, params[0], params[1], True)
        return [y, ladj, of_x, torch.zeros_like(params) if of_params is None else of_params]

    got = results(KernelSpline, x, params)
    exact = results(Spline, x.double(), params.double())
    gaps = [(a - b).norm() / (1 + b.norm()) for a, b in zip(got, exact, strict=True)]
    return max(gap.item() for gap in gaps)


# --- operators ------------------------------------------------------------------------------------


def _values(
    x: Tensor, raw: Tensor, bound: float, inverse: bool, periodic: bool
) -> tuple[Tensor, Tensor]:
    from pyroflows.numerics import quadratic_kernels as kernels

    y, ladj = torch.empty_like(x), torch.empty_like(x)
    form = kernels.form_of(len(raw), bound, inverse, periodic)
    _launch(kernels.values, (x, raw, y, ladj), form)
    return y, ladj


def _gradients(
    x: Tensor,
    raw: Tensor,
    of_y: Tensor,
    of_ladj: Tensor,
    bound: float,
    inverse: bool,
    periodic: bool,
    of_params: bool,
) -> tuple[Tensor, Tensor]:
    from pyroflows.numerics import quadratic_kernels as kernels

    of_x, of_raw = torch.empty_like(x), torch.empty_like(raw if of_params else raw[:0])
    if of_params and raw.stride() != of_raw.stride():
        raw = raw.contiguous()  # numbers that points share: their gradients are not shared
    form = kernels.form_of(len(raw), bound, inverse, periodic)
    _launch(kernels.gradients, (x, raw, of_y, of_ladj, of_x, of_raw), form, of_params)
    return of_x, of_raw


def _launch(kernel: Any, tensors: tuple[Tensor, ...], form: Any, *constants: bool) -> None:
    """Run a kernel for tensors of which the first are points and their raw parameters."""
    x, raw, *_ = tensors
    if len(x):
        strides = raw.shape[-1], *raw.stride()
        with torch.cuda.device_of(raw):
            kernel[(-(-len(x) // form.block),)](*tensors, len(x), strides, form, *constants)


# For all who look at a tensor's operations, as recorders do, a kernel is an operation.
_LIBRARY = torch.library.Library("pyroflows", "FRAGMENT")
_LIBRARY.define(
    "spline_values(Tensor x, Tensor raw, float bound, bool inverse, bool periodic)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "spline_gradients(Tensor x, Tensor raw, Tensor of_y, Tensor of_ladj, float bound, bool inverse,"
    " bool periodic, bool of_params) -> (Tensor, Tensor)"
)
_LIBRARY.impl("spline_values", _values, "CompositeExplicitAutograd")
_LIBRARY.impl("spline_gradients", _gradients, "CompositeExplicitAutograd")
_LIBRARY.impl("spline_values", lambda x, *_: (torch.empty_like(x), torch.empty_like(x)), "Meta")
_LIBRARY.impl(
    "spline_gradients",
    lambda x, raw, *rest: (torch.empty_like(x), torch.empty_like(raw if rest[-1] else raw[:0])),
    "Meta",
)
