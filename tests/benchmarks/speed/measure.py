"""Interleaved CPU times: A B C A B C ..., so that a busy machine slows all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import asdict, dataclass

from tests.benchmarks.speed.workloads import Run

#: One timing takes about so long; a shorter one is below the clock's noise.
SLICE = 0.03


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: quartiles of CPU time, median of wall time, and the ratio to others'.

    ``ratio`` holds the quartiles of the round-by-round ratios of CPU time to the reference's.
    """

    cpu: tuple[float, float, float]
    wall: float
    ratio: tuple[float, float, float] | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def clock(run: Run, repeats: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleaved(
    runs: dict[str, Run], reference: str, budget: float, rounds: int = 41
) -> dict[str, Timing]:
    """Time all in turn, in a new order every round, until the rounds or the seconds are up."""
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(SLICE / max(clock(run, 2)[0], 1e-6)))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order, start = list(runs), time.process_time()
    while len(taken[reference]) < rounds:
        if len(taken[reference]) >= 5 and time.process_time() - start > budget:
            break
        random.shuffle(order)
        for name in order:
            taken[name].append(clock(runs[name], repeats[name]))
    result = {}
    for name, times in taken.items():
        cpu = [1e3 * t for t, _ in times]
        of_reference = [1e3 * t for t, _ in taken[reference]]
        ratios = [mine / other for mine, other in zip(cpu, of_reference, strict=True)]
        wall = 1e3 * statistics.median(w for _, w in times)
        result[name] = Timing(quartiles(cpu), wall, quartiles(ratios))
    return result
