"""Elementwise maps whose gradient is known in closed form."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyroflows.numerics.concrete import is_plain, without_gradients


class ElementwiseMap(Protocol):
    """A map of points that have parameters of their own, with its gradient.

    Points have the shape ``(...)``, parameters ``(count, ...)``; nothing is broadcast.
    """

    def composed(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Values and log-derivatives by operations that torch differentiates."""
        ...

    def evaluate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The same, and what the gradient needs; nothing is recorded."""
        ...

    def gradient(
        self,
        params: Tensor,
        saved: tuple[Tensor, ...],
        of_y: Tensor,
        of_ladj: Tensor,
        of_params: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the points and, if asked for, of the parameters."""
        ...


def apply(mapping: ElementwiseMap, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Values and log-derivatives, of the broadcast shape of points and parameters.

    The gradient is analytic where nothing but a backward pass looks at the operations, and where
    every point has parameters of its own; else, and for gradients of gradients, torch finds it.
    """
    shape = params.shape[1:]
    if x.shape != shape:
        # The function of torch is slow.
        x = x.expand(torch.broadcast_shapes(x.shape, shape))
    plain = is_plain(params) and forward_ad._current_level < 0
    # The compiler differentiates what is composed, and fuses what is evaluated.
    plain = plain or (torch.compiler.is_compiling() and without_gradients(x, params))
    if x.shape != shape or x.dtype != params.dtype or not plain:
        return mapping.composed(x, params)
    if torch.is_grad_enabled() and (x.requires_grad or params.requires_grad):
        y, ladj = _Analytic.apply(x, params, mapping)
        return y, ladj
    y, ladj, _ = mapping.evaluate(x, params)
    return y, ladj


class _Analytic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, params: Tensor, mapping: ElementwiseMap
    ) -> tuple[Tensor, Tensor]:
        y, ladj, saved = mapping.evaluate(x, params)
        ctx.mapping = mapping
        ctx.save_for_backward(x, params, *saved)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, params, *saved = ctx.saved_tensors
        of_x, of_params = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled() and all(map(is_plain, grads)):
            return *ctx.mapping.gradient(params, tuple(saved), *grads, of_params), None
        # Gradients that are differentiated again, or batched.
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, as the parameters may be made of the points' own kin: the way back ends here.
            x, params = x.view_as(x), params.view_as(params)
            values = ctx.mapping.composed(x, params)
        inputs = [t for t, wanted in ((x, of_x), (params, of_params)) if wanted]
        found = iter(torch.autograd.grad(values, inputs, grads, create_graph=again))
        return next(found) if of_x else None, next(found) if of_params else None, None
