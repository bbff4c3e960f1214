"""Whether the steps to come repay what compiling them takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: Seconds that compiling takes: at least, and for each operation of a step. Measured, in an empty
#: cache, of steps of 360 to 2,300 operations: 17 to 40 s of one core, for a guide 44 to 53 s
#: (`python -m tests.benchmarks.speed.options`).
START, PER_OPERATION = 15.0, 0.015
#: What a compiled step saves: seconds for each of its operations, or a share of it where batches
#: are large. Measured of the same flows: 2.7 microseconds or more, and a third to nine tenths.
SAVED, SHARE = 3e-6, 0.25
#: Steps that are timed before the decision.
TIMED = 10


class Repay:
    """Decides, after a few steps, whether to compile the others.

    The steps to come are to save more seconds than compiling takes. Both follow from the number of
    operations of a step, but for what the step itself takes, which is timed.

    Parameters
    ----------
    sure
        Whether all planned steps will be taken. Where a fit may end at any, as many are expected as
        have been taken: at worst, all that is lost is about as much as was of use.

    Attributes
    ----------
    reason
        Why not to compile, in words.
    """

    def __init__(self, sure: bool) -> None:
        self.sure = sure
        self.reason = "the fit ended before it was known whether that pays"
        self._settled = False
        self._starts: list[float] = []
        self._operations = 0

    def due(self, left: int, operations: Callable[[], int]) -> bool:
        """Whether to compile now; asked before every step, with which ``left`` are to come."""
        if self._settled:
            return False
        self._starts.append(time.perf_counter())
        taken = len(self._starts) - 1
        if taken < TIMED:
            return False
        # Checks fall between some of the starts, which a median passes over.
        seconds = median(b - a for a, b in pairwise(self._starts[-TIMED - 1 :]))
        if not self._operations and left * seconds > START:
            self._operations = operations()
        cost = START + PER_OPERATION * self._operations
        saved = seconds
        if self._operations:
            saved = min(seconds, max(SAVED * self._operations, SHARE * seconds))
        expected = left if self.sure else min(left, taken)
        pays = expected * saved > cost
        self._settled = self.sure or left * saved <= cost
        if self._settled and not pays:
            self.reason = (
                f"{left} steps would save about {left * saved:.2g} s, and that takes {cost:.0f} s"
            )
        return pays


def count_operations(function: Callable[[], Any]) -> int:
    """How many tensor operations a function takes."""
    with _Counter() as counter:
        function()
    return counter.count


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
