"""Where conditioner networks may round to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_EVALUATIONS: ContextVar[list[Tensor] | None] = ContextVar("evaluations", default=None)


@contextmanager
def reduced_precision() -> Iterator[list[Tensor]]:
    """Evaluate the networks that give the parameters of univariate maps in bfloat16.

    What they give is again of the dtype of their input, so that maps and densities are as always.
    The list collects it.
    """
    evaluations: list[Tensor] = []
    token = _EVALUATIONS.set(evaluations)
    try:
        yield evaluations
    finally:
        _EVALUATIONS.reset(token)


@contextmanager
def full_precision() -> Iterator[None]:
    """Take `reduced_precision` back, where a network is iterated."""
    token = _EVALUATIONS.set(None)
    try:
        yield
    finally:
        _EVALUATIONS.reset(token)


def reduced_evaluations() -> list[Tensor] | None:
    """What collects the evaluations in bfloat16; None where there are to be none."""
    # Dynamo cannot read context variables, and nothing that it compiles is reduced.
    return None if torch.compiler.is_compiling() else _EVALUATIONS.get()
