"""Where a fit runs, and in which floating dtype."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

Device = torch.device | str | None


def place_(
    module: nn.Module, device: Device, dtype: torch.dtype | None = None
) -> torch.device | None:
    """Move a module before it is fitted; the device it is on then, or None where it stays.

    ``"auto"`` is this process's GPU, else Apple's, else the CPU.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    where = _automatic(dtype) if device == "auto" else None if device is None else _named(device)
    module.to(where, dtype)
    return where


def _named(device: torch.device | str) -> torch.device:
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device: expected 'auto', 'cpu', 'cuda', 'mps' or a torch device, got {device!r}"
        ) from error
    if named.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: got 'cuda', but torch sees no GPU. Install a torch build for CUDA, or use "
            "device='auto'."
        )
    # Under torchrun every process has a GPU of its own.
    return torch.device("cuda", _local_rank()) if named == torch.device("cuda") else named


def _automatic(dtype: torch.dtype | None) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", _local_rank())
    # Apple's GPUs know no float64.
    if torch.backends.mps.is_available() and dtype != torch.float64:
        return torch.device("mps")
    return torch.device("cpu")


def _local_rank() -> int:
    """Number of the GPU: torchrun says it, else the current one."""
    return int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in nested containers on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
