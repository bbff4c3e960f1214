"""Checks of a transform at points: round trips, log-determinants, fused passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import ComposeTransform
from torch.distributions import Transform as TorchTransform

from pyroflows.testing.tools import (
    CheckError,
    check_close,
    event_dim,
    forward,
    inverse,
    jacobian,
    per_event,
    relative,
)

# Rounding errors add up over the operations of a stack: so many units in the last place.
ROUNDINGS = 1000.0


Direction = Callable[[TorchTransform, Tensor], tuple[Tensor, Tensor]]


def _derivative(direction: Direction, transform: TorchTransform, x: Tensor) -> Tensor:
    return jacobian(lambda v: direction(transform, v)[0], x, event_dim(transform))


def _allowed(matrix: Tensor, tolerance: float) -> Tensor:
    """The Jacobian's condition number times rounding, at least ``tolerance``; one per event.

    Infinite where that exceeds one: there is no digit left to check.
    """
    singular = torch.linalg.svdvals(matrix)
    rounding = ROUNDINGS * torch.finfo(matrix.dtype).eps
    allowed = singular[..., 0] / singular[..., -1] * rounding
    return allowed.masked_fill(~(allowed < 1), torch.inf).clamp_min(tolerance)


def _lost_between(there: Direction, transform: TorchTransform, start: Tensor) -> Tensor:
    """Rounding of the values between a stack's parts, as the way back magnifies it; one per event.

    A part may narrow what the next one spreads: the condition number of the whole is small then,
    and the digits are lost all the same.
    """
    rounding = ROUNDINGS * torch.finfo(start.dtype).eps
    dims = event_dim(transform)
    lost = torch.zeros(start.shape[: start.dim() - dims], dtype=start.dtype, device=start.device)
    parts = list(getattr(transform, "parts", []))
    for count in range(1, len(parts)):
        some = parts[:count] if there is forward else parts[-count:]
        stack = ComposeTransform(some)
        singular = torch.linalg.svdvals(_derivative(there, stack, start))
        size = _largest(there(stack, start)[0].detach(), dims).clamp_min(1.0)
        lost = torch.maximum(lost, rounding * size / singular[..., -1])
    return lost.masked_fill(~(lost < 1), torch.inf)


def _largest(value: Tensor, dims: int) -> Tensor:
    """The largest coordinate of each event."""
    return value.abs().reshape(*value.shape[: value.dim() - dims], -1).amax(-1)


def check_round_trip(
    transform: TorchTransform, x: Tensor, tolerance: float = 1e-8, y: Tensor | None = None
) -> None:
    """Forward then inverse, and inverse then forward, give back where they started.

    Parameters
    ----------
    transform
        Any torch transform.
    x
        Points of the base; data too, unless ``y`` is given.
    tolerance
        Smallest error allowed, relative to the largest coordinate where that exceeds one; beyond
        it rounding times the Jacobian's condition number, or times what the way back makes of it
        between the parts of a stack.
    y
        Data, where they live on a support of their own.

    Examples
    --------
    >>> from torch.distributions import AffineTransform
    >>> check_round_trip(AffineTransform(1.0, 2.0), torch.randn(5, dtype=torch.float64))
    """
    dims = event_dim(transform)
    for what, there, back, start in (
        ("forward then inverse", forward, inverse, x),
        ("inverse then forward", inverse, forward, x if y is None else y),
    ):
        matrix = _derivative(there, transform, start)
        between = there(transform, start)[0].detach()
        size = torch.maximum(_largest(start, dims), _largest(between, dims))
        start = start.expand(*size.shape, *start.shape[start.dim() - dims :])
        allowed = _allowed(matrix, tolerance) * size.clamp_min(1.0)
        got = back(transform, between)[0]
        if not ((got - start).abs() <= per_event(allowed, dims)).all():
            # Rarely needed, and dearer: what the stack's parts lose on the way.
            allowed = torch.maximum(allowed, _lost_between(there, transform, start))
        check_close(what, got, start, per_event(allowed, dims))


def check_jacobian(
    transform: TorchTransform, x: Tensor, tolerance: float = 1e-8, y: Tensor | None = None
) -> None:
    """The log-determinants of both directions are those of the autodiff Jacobian.

    Parameters
    ----------
    transform
        Any torch transform.
    x
        Points of the base; data too, unless ``y`` is given.
    tolerance
        Smallest error allowed, in nats; beyond it the condition number times rounding.
    y
        Data, where they live on a support of their own.

    Examples
    --------
    >>> from torch.distributions import ExpTransform
    >>> check_jacobian(ExpTransform(), torch.rand(5, dtype=torch.float64))
    """
    data = x if y is None else y
    for what, direction, start in (("forward", forward, x), ("inverse", inverse, data)):
        matrix = _derivative(direction, transform, start)
        got = direction(transform, start)[1]
        check_close(f"{what} log|det J|", got, matrix.slogdet()[1], _allowed(matrix, tolerance))


def check_fused(
    transform: Any, x: Tensor, tolerance: float = 1e-8, data: Tensor | None = None
) -> None:
    """The fused passes equal the separate calls, on the transform and on its ``.inv``.

    Parameters
    ----------
    transform
        A transform with ``call_and_ladj`` and ``inverse_and_ladj``.
    x
        Points of the base; data too, unless they are given.
    tolerance
        Relative; a log-determinant may come from the other direction and carry its rounding.
    data
        Data, where they live on a support of their own.
    """
    data = x if data is None else data
    y, forward_ladj = transform.call_and_ladj(x)
    z, inverse_ladj = transform.inverse_and_ladj(data)
    separate = transform.log_abs_det_jacobian
    for what, got, expected in (
        ("call", transform(x), y),
        ("inverse", transform.inv(data), z),
        ("log_abs_det_jacobian at x", separate(x, y), forward_ladj),
        ("log_abs_det_jacobian at z", separate(z, data), -inverse_ladj),
        ("inv.call_and_ladj, value", transform.inv.call_and_ladj(data)[0], z),
        ("inv.call_and_ladj, ladj", transform.inv.call_and_ladj(data)[1], inverse_ladj),
        ("inv.inverse_and_ladj, value", transform.inv.inverse_and_ladj(x)[0], y),
        ("inv.inverse_and_ladj, ladj", transform.inv.inverse_and_ladj(x)[1], forward_ladj),
    ):
        check_close(what, got, expected, relative(tolerance, expected))
    for shape in (x.shape, (0, *x.shape[1:])):
        if transform.inverse_shape(transform.forward_shape(shape)) != torch.Size(shape):
            raise CheckError(f"forward_shape and inverse_shape disagree on {tuple(shape)}")
