"""Affine maps with a bounded log-scale, with analytic gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.numerics import analytic
from pyroflows.numerics.bounded import soft_clamp


def bounded_affine(
    x: Tensor, params: Tensor, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Affine map :math:`y = x\,e^{s} + t` with a smoothly bounded log-scale :math:`s`.

    Parameters
    ----------
    x
        Points, shape ``(...)``.
    params
        Shift :math:`t` and raw log-scale, ``(2, ...)``; see `pyroflows.numerics.soft_clamp`.
    bound
        Bound of the log-scale.
    inverse
        Whether to evaluate the inverse map.

    Returns
    -------
    tuple of Tensor
        Values and log-derivatives (of the inverse map where ``inverse``), each of the broadcast
        shape.

    Examples
    --------
    >>> bounded_affine(torch.ones(2), torch.zeros(2, 2), bound=2.0)
    (tensor([1., 1.]), tensor([0., 0.]))
    """
    return analytic.apply(_Affine(bound, inverse), x, params)


class _Affine(NamedTuple):
    bound: float
    inverse: bool

    def composed(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(0)
        log_scale = soft_clamp(raw, self.bound)
        if self.inverse:
            value, log_scale = (x - shift) * (-log_scale).exp(), -log_scale
        else:
            value = x * log_scale.exp() + shift
        return value, log_scale.expand(value.shape)

    def evaluate(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        shift, raw = params.unbind(0)
        stretch = math.pi / (2 * self.bound)
        stretched = raw * stretch
        ladj = stretched.atan().mul_((-1 if self.inverse else 1) / stretch)
        scale = ladj.exp()
        value = (x - shift).mul_(scale) if self.inverse else torch.addcmul(shift, x, scale)
        return value, ladj, (stretched, scale, value if self.inverse else x)

    def gradient(
        self,
        params: Tensor,
        saved: tuple[Tensor, ...],
        of_y: Tensor,
        of_ladj: Tensor,
        of_params: bool,
    ) -> tuple[Tensor, Tensor | None]:
        stretched, scale, point = saved
        of_x = of_y * scale
        if not of_params:
            return of_x, None
        # Where scale grows, the value grows with the point, or that of the inverse shrinks.
        of_log_scale = torch.addcmul(of_ladj, of_y if self.inverse else of_x, point)
        of_log_scale.div_(stretched.square().add_(1))
        gradient = torch.empty_like(params)
        if self.inverse:
            torch.neg(of_x, out=gradient[0])
            torch.neg(of_log_scale, out=gradient[1])
        else:
            gradient[0], gradient[1] = of_y, of_log_scale
        return of_x, gradient
