"""Whether a tensor's values can be looked at, and who looks at its operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


def has_values(value: Tensor) -> bool:
    """Whether Python may branch on the values of a tensor.

    Not on the meta device, while compiling or tracing, nor inside ``torch.func`` transforms: there,
    iterations run a fixed number of times and checks of values are left out.

    Examples
    --------
    >>> has_values(torch.zeros(2)), has_values(torch.zeros(2, device="meta"))
    (True, False)
    """
    return not is_recording() and is_plain(value)


def is_plain(value: Tensor) -> bool:
    """Whether nothing but autograd, and perhaps a recorder, looks at a tensor's operations."""
    return not (
        value.is_meta
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        # In a batched backward pass no interpreter is left on the stack.
        or torch._C._functorch.is_legacy_batchedtensor(value)
    )


def without_gradients(*values: Tensor) -> bool:
    """Whether nobody will ask for derivatives, or batches, of what is computed of tensors."""
    needed = torch.is_grad_enabled() and any(value.requires_grad for value in values)
    # While compiling, "is None" is never true.
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return not needed and isinstance(interpreter, type(None))


def is_recording() -> bool:
    """Whether operations, those of backward passes too, are being recorded for a compiler."""
    return torch.compiler.is_compiling() or _RECORDING.get()


@contextmanager
def recording() -> Iterator[None]:
    """Announce that operations are recorded, to be fused: their number costs, not their memory."""
    token = _RECORDING.set(True)
    try:
        yield
    finally:
        _RECORDING.reset(token)
