"""What the checks share: comparison, autodiff Jacobians, densities, parameters drawn afresh."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import Transform as TorchTransform

Made = TorchTransform | Distribution


class CheckError(AssertionError):
    """A property that does not hold."""


@torch.no_grad()
def redraw_(module: nn.Module, scale: float, generator: torch.Generator | None = None) -> None:
    """Draw every parameter afresh from ``N(0, scale**2 / fan-in)``, in place.

    A bias has the fan-in of its own linear layer, any other tensor its last dimension, so that
    networks keep unit gain at scale 1. All dtypes and devices get the same numbers.

    Parameters
    ----------
    module
        Any module.
    scale
        Standard deviation for a fan-in of one.
    generator
        On the CPU; by default torch's own.

    Examples
    --------
    >>> linear = torch.nn.Linear(100, 100)
    >>> redraw_(linear, 0.3)
    >>> round(linear.weight.std().item(), 2)
    0.03
    """
    for owner in module.modules():
        own = dict(owner.named_parameters(recurse=False))
        for name, parameter in own.items():
            sized = own.get("weight", parameter) if name == "bias" else parameter
            fan_in = sized[0].numel() if name in ("weight", "bias") else sized.shape[-1:].numel()
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * scale / max(fan_in, 1) ** 0.5)


def check_close(what: str, got: Tensor, expected: Tensor, tolerance: Tensor | float = 0.0) -> None:
    """Raise `CheckError` unless both tensors agree; equal infinities and NaNs do.

    Parameters
    ----------
    what
        Begins the message.
    got, expected
        Tensors of one shape and dtype.
    tolerance
        Largest absolute difference, broadcast to the tensors.

    Examples
    --------
    >>> check_close("sum", torch.ones(2).sum(), torch.tensor(2.5))
    Traceback (most recent call last):
    ...
    pyroflows.testing.tools.CheckError: sum: 1 of 1 entries differ, shape (), torch.float32; ...
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise CheckError(
            f"{what}: expected {tuple(expected.shape)} of {expected.dtype}, "
            f"got {tuple(got.shape)} of {got.dtype}"
        )
    got, expected = got.detach(), expected.detach()
    same = (got == expected) | (got.isnan() & expected.isnan())
    gap = (got - expected).abs().masked_fill(same, 0.0)
    excess = (gap - tolerance).nan_to_num(torch.inf, torch.inf)
    wrong = excess > 0
    if wrong.any():
        worst = int(excess.argmax())
        raise CheckError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} entries differ, shape "
            f"{tuple(got.shape)}, {got.dtype}; largest error {gap.max().item():.3g}; worst at flat "
            f"index {worst}: got {got.flatten()[worst].item():.9g}, expected "
            f"{expected.flatten()[worst].item():.9g}, tolerance "
            f"{torch.as_tensor(tolerance).expand(gap.shape).flatten()[worst].item():.3g}; "
            f"NaNs: got {int(got.isnan().sum())}, expected {int(expected.isnan().sum())}"
        )


def event_dim(made: Made) -> int:
    """Dimensions of an event of a distribution, or of what a transform maps."""
    return made.domain.event_dim if isinstance(made, TorchTransform) else len(made.event_shape)


def forward(transform: TorchTransform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward value and log-determinant of any torch transform, fused where it can be."""
    fused = getattr(transform, "call_and_ladj", None)
    if fused is not None:
        return fused(x)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inverse(transform: TorchTransform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse value and its log-determinant of any torch transform, fused where it can be."""
    fused = getattr(transform, "inverse_and_ladj", None)
    if fused is not None:
        return fused(y)
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)


def log_density(made: Made, value: Tensor) -> Tensor:
    """Log density of ``value``: of a distribution, or of a standard normal through a transform.

    The normal is taken without its constant, so that one number per event tells of the inverse
    value and of its log-determinant.
    """
    if isinstance(made, Distribution):
        return made.log_prob(value)
    z, ladj = inverse(made, value)
    dims = tuple(range(z.dim() - event_dim(made), z.dim()))
    return ladj - (z.square().sum(dims) if dims else z.square()) / 2


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Jacobian by autodiff, ``(*batch, outputs, inputs)`` with the event flattened.

    Examples
    --------
    >>> jacobian(torch.sin, torch.zeros(3, 2), event_dim=1)[0]
    tensor([[1., 0.],
            [0., 1.]])
    """
    x = x.detach().requires_grad_()
    y = function(x)
    y = y.reshape(*y.shape[: y.dim() - event_dim], -1)
    rows = [
        torch.autograd.grad(y[..., i].sum(), x, retain_graph=True, materialize_grads=True)[0]
        for i in range(y.shape[-1])
    ]
    return torch.stack([row.reshape(*x.shape[: x.dim() - event_dim], -1) for row in rows], -2)


def per_event(tensor: Tensor, event_dim: int) -> Tensor:
    """One number per event, shaped to broadcast against values."""
    return tensor.reshape(*tensor.shape, *(1,) * event_dim)


def relative(tolerance: float, expected: Tensor) -> Tensor:
    """A tolerance that grows with what is expected."""
    return tolerance * (1 + expected.detach().abs())
