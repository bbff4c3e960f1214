"""What went wrong, in three parts: what was expected, what came, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ShapeError(ValueError):
    """A tensor of the wrong shape."""


class DataError(ValueError):
    """Data that a fit cannot use: not finite, too few rows, not numeric."""


class ContextError(ValueError):
    """A context that is missing, or given to a flow that has none."""


class InversionError(RuntimeError):
    """An inverse without closed form that was not found to the tolerance asked for."""


class IntegrationError(RuntimeError):
    """An ODE that a solver could not follow to its tolerance."""


class FitError(RuntimeError):
    """A fit whose loss stopped being finite."""


class UnregisteredParametersError(RuntimeError):
    """Trainable parameters that Pyro's SVI would silently leave untrained."""


class ParamStoreError(RuntimeError):
    """Stored parameters that do not fit the module of the same name."""


class LocalLatentError(NotImplementedError):
    """Latent variables inside a subsampled plate, which a global guide cannot represent."""


class DependentSupportError(NotImplementedError):
    """A latent whose support depends on another latent, which a guide holds constant."""


class SavedFileError(ValueError):
    """A file that is damaged, or was not written by pyroflows."""


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


def check_event(name: str, value: Tensor, event_shape: Sequence[int]) -> None:
    """Raise `ShapeError` unless the rightmost dimensions of ``value`` are ``event_shape``."""
    event_shape = tuple(event_shape)
    dims = len(event_shape)
    if value.dim() < dims or tuple(value.shape[value.dim() - dims :]) != event_shape:
        expected = ", ".join(["*batch", *map(str, event_shape)])
        raise ShapeError(
            f"{name}: expected shape ({expected}), got {tuple(value.shape)}. "
            f"The last {dims} dimension(s) must be the event; put batch dimensions on the left."
        )


def check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise `TypeError` unless ``value`` has the floating dtype of the module that reads it."""
    if value.dtype != dtype and not torch.is_autocast_enabled(value.device.type):
        or_flow = f" or the flow with .to({value.dtype})" if value.is_floating_point() else ""
        raise TypeError(
            f"{name}: expected {dtype}, the flow's own dtype, got {value.dtype}. "
            f"Convert the value with .to({dtype}){or_flow}."
        )
