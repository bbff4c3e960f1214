"""Interleaved times: A B C A B C ..., so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from tests.benchmarks.speed.architecture import Run

#: Call so often; seconds of CPU and wall time a call.
Clock = Callable[[int], tuple[float, float]]
#: One timing takes about so long; a shorter one is below the clock's noise.
SLICE = 0.03


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: quartiles of CPU time, median of wall time, and the ratio to others'.

    ``ratio`` holds the quartiles of the round-by-round ratios of CPU time to the reference's, and
    ``wall_ratio`` the median of those of wall time. On a GPU, wall time stands where CPU time
    would. ``compiling`` is what compiling took before, in seconds; ``memory`` what a call needs of
    the GPU's, in MiB.
    """

    cpu: tuple[float, float, float]
    wall: float
    ratio: tuple[float, float, float]
    wall_ratio: float
    compiling: float | None = None
    memory: float | None = None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def clock_of(run: Run, device: str = "cpu") -> Clock:
    """Times calls in this process; on a GPU until it is done."""

    def on_cpu(repeats: int) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats

    def on_gpu(repeats: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        wall = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        taken = (time.perf_counter() - wall) / repeats
        return taken, taken

    return on_gpu if device == "cuda" else on_cpu


class PeakMemory:
    """MiB of the GPU that calls need, with all that is built for them after this object.

    Counted is what torch reserves: where a CUDA graph computes is allocated to nobody.
    """

    def __init__(self) -> None:
        # Its workspace, which all products of matrices share, is not on the first one's account.
        torch.cuda.current_blas_handle()
        self.before = self._start()

    def of(self, run: Run) -> float:
        """The most that is held during a call; not the first, which has more to do."""
        run()
        self._start()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_reserved() - self.before) / 2**20

    def _start(self) -> int:
        """Give back what nobody holds, and count from here."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleaved(
    clocks: dict[str, Clock], reference: str, budget: float, rounds: int = 41
) -> dict[str, Timing]:
    """Time all in turn, in a new order every round, until the rounds or the seconds are up."""
    repeats = {}
    for name, clock in clocks.items():
        clock(1)
        repeats[name] = max(1, round(SLICE / max(clock(2)[0], 1e-6)))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in clocks}
    order, spent = list(clocks), 0.0
    while len(taken[reference]) < rounds:
        if len(taken[reference]) >= 5 and spent > budget:
            break
        random.shuffle(order)
        for name in order:
            cpu, wall = clocks[name](repeats[name])
            taken[name].append((cpu, wall))
            spent += cpu * repeats[name]
    result = {}
    for name, times in taken.items():
        pairs = list(zip(times, taken[reference], strict=True))
        result[name] = Timing(
            cpu=quartiles([1e3 * cpu for cpu, _ in times]),
            wall=1e3 * statistics.median(wall for _, wall in times),
            ratio=quartiles([mine[0] / other[0] for mine, other in pairs]),
            wall_ratio=statistics.median(mine[1] / other[1] for mine, other in pairs),
        )
    return result
