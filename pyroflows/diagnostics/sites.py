"""The sample statements of a model, and the plates along the axes of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Values = Mapping[str, Tensor]
Kind = Literal["drawn", "undrawn", "observed", "deterministic"]

# The name of an axis that only pads a value up to a plate further left.
PADDING = ""


@dataclass(frozen=True)
class Site:
    """A sample statement of the model, as one draw sees it.

    ``shape`` is the shape of a value, batch and event; ``axes`` names the plate of each of its
    axes, None where there is none, `PADDING` where Pyro only fills up to a plate further left.
    """

    name: str
    kind: Kind
    value: Tensor
    shape: torch.Size
    batch_dim: int
    axes: tuple[str | None, ...]
    auxiliary: bool


def dim_of(plate: str) -> str:
    """Name the dimension of a plate; ArviZ keeps two names for itself."""
    return f"{plate}_plate" if plate in ("chain", "draw") else plate


def describe(name: str, node: Mapping[str, Any], draw: Values) -> Site:
    """Read a site off a node of a trace that was run at ``draw``."""
    fn, value = node["fn"], torch.as_tensor(node["value"])
    innermost = fn
    while hasattr(innermost, "base_dist"):
        innermost = innermost.base_dist
    frames = {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}
    event_dim, shape = fn.event_dim, value.shape
    kind: Kind
    if name in draw:
        kind = "drawn"
    elif type(innermost).__name__ == "Delta":
        kind = "deterministic"
        event_dim = _deterministic_event_dim(shape, fn.event_dim, frames)
    else:
        kind = "observed" if node["is_observed"] else "undrawn"
    if kind != "deterministic":
        shape = torch.broadcast_shapes(shape, fn.batch_shape + fn.event_shape)
    return Site(
        name=name,
        kind=kind,
        value=value.expand(shape),
        shape=shape,
        batch_dim=len(shape) - event_dim,
        axes=_axes(shape, event_dim, frames),
        auxiliary=bool(node["infer"].get("is_auxiliary")),
    )


def _deterministic_event_dim(shape: torch.Size, event_dim: int, frames: Mapping[int, Any]) -> int:
    """Read off the plates which axes of a deterministic value are event dimensions.

    `pyro.deterministic` calls every axis an event dimension unless it is told otherwise.
    """
    for candidate in range(event_dim if event_dim < len(shape) else 0, len(shape)):
        axes = {dim: len(shape) - candidate + dim for dim in frames}
        if all(axis >= 0 and frames[dim].size in (shape[axis], -1) for dim, axis in axes.items()):
            return candidate if frames else len(shape)
    return len(shape)


def _axes(shape: torch.Size, event_dim: int, frames: Mapping[int, Any]) -> tuple[str | None, ...]:
    batch_dim = len(shape) - event_dim
    axes: list[str | None] = []
    for dim, size in zip(range(-batch_dim, 0), shape[:batch_dim], strict=True):
        if dim in frames and frames[dim].size in (size, -1):
            axes.append(dim_of(frames[dim].name))
        else:
            pads = size == 1 and any(other < dim for other in frames)
            axes.append(PADDING if pads else None)
    return (*axes, *[None] * event_dim)
