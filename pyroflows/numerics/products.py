"""Products of matrices, by the faster of the libraries that torch brings."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from pyroflows.numerics.concrete import is_plain, without_gradients

#: Multiplications and results from which on oneDNN repays its start of ten microseconds.
MULTIPLICATIONS, RESULTS = 2**21, 2**12


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""The affine map :math:`x W^\top + b`, as `torch.nn.functional.linear`.

    On a CPU torch leaves products in float32 to its BLAS, which is MKL in the wheels for x86. On
    processors of other makers MKL keeps to narrow vector instructions, where oneDNN, which torch
    brings too, uses all there are and is twice as fast. Small products, other dtypes and devices,
    and whatever looks at the operations beside autograd are left to torch.

    Parameters
    ----------
    x
        Points, ``(*batch, inputs)``.
    weight
        Shape ``(outputs, inputs)``.
    bias
        Shape ``(outputs,)``.

    Returns
    -------
    Tensor
        Shape ``(*batch, outputs)``.

    Examples
    --------
    >>> linear(torch.ones(3, 2), torch.ones(4, 2)).shape
    torch.Size([3, 4])
    """
    # Pyro's tensors with a provenance have a plain tuple for a shape.
    batch = torch.Size(x.shape[:-1])
    if not (_pays(batch.numel(), weight) and _is_for_onednn(x, weight)):
        return functional.linear(x, weight, bias)
    rows = x.reshape(batch.numel(), -1)
    if torch.compiler.is_compiling():  # where the operator is what knows the faster library
        out = _onednn(rows, weight, bias)
    elif onednn_is_faster():
        out = _Linear.apply(rows, weight, bias)
    else:
        return functional.linear(x, weight, bias)
    return cast("Tensor", out).unflatten(0, batch)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can take them, and nobody would notice."""
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (x, weight)):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return without_gradients(x, weight)
    return is_plain(x) and is_plain(weight) and forward_ad._current_level < 0


def _pays(rows: int, columns: Tensor) -> bool:
    count, inner = columns.shape
    return rows * count >= RESULTS and rows * count * inner >= MULTIPLICATIONS


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    # A recorded step may be evaluated in double precision, a compiled one on another machine.
    if a.dtype != torch.float32 or not onednn_is_faster():
        return functional.linear(a, b, bias)
    return _multiply(a, b, bias)


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], ""))


# An operator of our own, since torch's compiler takes that of oneDNN for fixed weights alone.
_LIBRARY = torch.library.Library("pyroflows", "DEF")
_LIBRARY.define("linear(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")
_LIBRARY.impl("linear", _by_onednn, "CPU")
_LIBRARY.impl("linear", lambda a, b, bias=None: a.new_empty(len(a), len(b)), "Meta")
_onednn = torch.ops.pyroflows.linear.default


@register_flop_formula(torch.ops.pyroflows.linear)
def _operations(a: Sequence[int], b: Sequence[int], *rest: Any, **options: Any) -> int:
    return 2 * a[0] * a[1] * b[0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``."""
    return cast("Tensor", _onednn(a, b)) if _pays(len(a), b) else a @ b.mT


class _Linear(torch.autograd.Function):
    """oneDNN's product, which has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return cast("Tensor", _onednn(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        # Gradients that are differentiated again, or batched, are torch's.
        plain = not torch.is_grad_enabled() and is_plain(grad)
        product = _product if plain else lambda a, b: a @ b.mT
        of_x, of_weight, of_bias = ctx.needs_input_grad
        gradient = None
        if of_weight:
            # Of a long sum for a small matrix, the library likes the longer side second.
            swapped = len(x) > grad.shape[1] > x.shape[1]
            gradient = product(x.mT, grad.mT).mT if swapped else product(grad.mT, x.mT)
        return (
            product(grad, weight.mT) if of_x else None,
            gradient,
            grad.sum(0) if of_bias else None,
        )


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether oneDNN has wider vectors here than MKL, which keeps the widest to Intel's processors.

    Of a machine, not of a trial, so that results do not differ between processes.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _processor()
    )


def _processor() -> str:
    """What the system tells of the processor, its maker too."""
    told = Path("/proc/cpuinfo")
    return told.read_text() if told.exists() else platform.processor()
