"""Random numbers that leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Run with a copy of torch's random state, from ``seed`` where it is given.

    The state of the CPU, and of the GPUs where CUDA is in use, is put back at the end.

    Examples
    --------
    >>> with forked_rng(0):
    ...     first = torch.rand(2)
    >>> with forked_rng(0):
    ...     second = torch.rand(2)
    >>> torch.equal(first, second)
    True
    """
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(gpus):
        if seed is not None:
            torch.manual_seed(seed)
        yield
