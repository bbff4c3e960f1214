"""Whether a tensor's values can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def has_values(value: Tensor) -> bool:
    """Whether Python may branch on the values of a tensor.

    Not on the meta device, while compiling or tracing, nor inside ``torch.func`` transforms: there,
    iterations run a fixed number of times and checks of values are left out.

    Examples
    --------
    >>> has_values(torch.zeros(2)), has_values(torch.zeros(2, device="meta"))
    (True, False)
    """
    return not (
        value.is_meta
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        # In a batched backward pass no interpreter is left on the stack.
        or torch._C._functorch.is_legacy_batchedtensor(value)
    )
