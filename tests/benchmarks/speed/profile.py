"""Where a step's time goes: ``python -m tests.benchmarks.speed.profile`` prints a table.

For every workload with an eager goal, ours beside zuko's: the CPU time of a step, how many of
torch's operators it calls, what matrix products take of the time, and what is left for each of the
other operators, the interpreter's and autograd's part included. Views, which compute nothing but
take the interpreter's time, are operators too.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import pyro
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.speed.architecture import Run
from tests.benchmarks.speed.workloads import WORKLOADS

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "mkldnn::", "aten::mkldnn")
#: Steps of one measurement, and measurements of the time, of which the shortest counts.
STEPS, ROUNDS = 5, 5


@dataclass(frozen=True)
class Profile:
    """Of one step: microseconds, calls of operators, share of the time in products of matrices."""

    total: float
    calls: float
    share: float

    @property
    def cells(self) -> list[str]:
        rest = self.total * (1 - self.share) / self.calls
        return [f"{self.total / 1000:.2f}", f"{self.calls:.0f}", f"{self.share:.0%}", f"{rest:.1f}"]


def profile_of(run: Run) -> Profile:
    """The time without the profiler, the rest with it."""
    for _ in range(STEPS):
        run()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(STEPS):
            run()
        times.append((time.process_time() - start) / STEPS)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        for _ in range(STEPS):
            run()
        whole = 1e6 * (time.perf_counter() - start)
    events = [event for event in recorded.events() or [] if is_operator(event)]
    products = sum(e.self_cpu_time_total for e in events if e.name.startswith(PRODUCTS))
    # What an operator calls in turn is not a call of the interpreter's or of autograd's.
    outer = [e for e in events if e.cpu_parent is None or not is_operator(e.cpu_parent)]
    return Profile(1e6 * min(times), len(outer) / STEPS, products / whole)


def is_operator(event: FunctionEvent) -> bool:
    return event.name.startswith(("aten::", "mkldnn::"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of workloads' names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    columns = ["ms", "operators", "in products", "µs each of the others"]
    print("| workload | flow |", " | ".join(columns), "|")
    print("| --- " * (2 + len(columns)) + "|")
    for title, workload in WORKLOADS.items():
        if not any(title.startswith(start) for start in arguments.only):
            continue
        for name in ("pyroflows", "zuko"):
            found = profile_of(workload.run(workload.build(name)))
            print("|", " | ".join([title, name, *found.cells]), "|", flush=True)


if __name__ == "__main__":
    main()
