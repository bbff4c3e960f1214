"""Exact samples of two-dimensional densities that flows are tried on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sampler = Callable[[int, torch.Generator], Tensor]


def _noise(count: int, generator: torch.Generator, scale: float) -> Tensor:
    return scale * torch.randn(count, 2, generator=generator)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _moons(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], -1) + _noise(count, generator, 0.07)


def _rings(count: int, generator: torch.Generator) -> Tensor:
    radius = 1.0 + torch.randint(3, (count,), generator=generator)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return _polar(radius, angle) + _noise(count, generator, 0.12)


def _eight_gaussians(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi / 4 * torch.randint(8, (count,), generator=generator)
    return _polar(torch.full((count,), 2.0), angle) + _noise(count, generator, 0.2)


def _checkerboard(count: int, generator: torch.Generator) -> Tensor:
    x = 4 * torch.rand(count, generator=generator) - 2
    row = 2 * torch.randint(2, (count,), generator=generator) + x.floor().remainder(2)
    return torch.stack([x, row - 2 + torch.rand(count, generator=generator)], -1)


def _spirals(count: int, generator: torch.Generator) -> Tensor:
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    arm = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    return arm.unsqueeze(-1) * _polar(angle / 3, angle) + _noise(count, generator, 0.1)


def _pinwheel(count: int, generator: torch.Generator) -> Tensor:
    radius = 1 + 0.3 * torch.randn(count, generator=generator)
    across = 0.1 * torch.randn(count, generator=generator)
    arm = 2 * math.pi / 5 * torch.randint(5, (count,), generator=generator)
    turn = arm + 0.25 * radius.exp()
    rotated = torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()], -1).view(-1, 2, 2)
    return 2 * torch.einsum("ni,nij->nj", torch.stack([radius, across], -1), rotated)


def _banana(count: int, generator: torch.Generator) -> Tensor:
    x, y = torch.randn(2, count, generator=generator)
    return torch.stack([1.5 * x, 0.4 * y + 0.8 * x**2 - 1], -1)


def _funnel(count: int, generator: torch.Generator) -> Tensor:
    x, y = torch.randn(2, count, generator=generator)
    return torch.stack([x, y * (0.8 * x).exp()], -1)


#: Name to sampler ``(count, generator)``: rows of shape (count, 2).
SAMPLERS: dict[str, Sampler] = {
    "moons": _moons,
    "rings": _rings,
    "eight gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "spirals": _spirals,
    "pinwheel": _pinwheel,
    "banana": _banana,
    "funnel": _funnel,
}


def two_dimensional(name: str, count: int, seed: int = 0) -> Tensor:
    """Independent rows ``(count, 2)`` of a density by name, one of `SAMPLERS`.

    Examples
    --------
    >>> two_dimensional("moons", 5).shape
    torch.Size([5, 2])
    """
    if name not in SAMPLERS:
        raise ValueError(f"name: expected one of {', '.join(SAMPLERS)}, got {name!r}")
    return SAMPLERS[name](count, torch.Generator().manual_seed(seed))
