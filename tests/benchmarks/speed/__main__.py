"""Speed beside the peers: ``python -m tests.benchmarks.speed``, by ``make bench``.

Times every workload for pyroflows and each installed peer, interleaved; writes
build/benchmarks/speed-1.json, of two threads speed-2.json, and the page docs/benchmarks/speed.md
with ``--page``, of what has been measured on one thread now and on two before. With
``--device cuda`` it is larger workloads on a GPU, beside zuko, with the memory that each needs, to
build/benchmarks/speed-cuda.json and docs/benchmarks/speed-gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch

from pyroflows.errors import first_line
from tests.benchmarks.speed.contenders import NAMES, ON_GPU, REFERENCE, is_installed
from tests.benchmarks.speed.measure import Clock, PeakMemory, Timing, clock_of, interleaved
from tests.benchmarks.speed.ours import Compiled
from tests.benchmarks.speed.page import machine, table, write_page
from tests.benchmarks.speed.worker import Worker
from tests.benchmarks.speed.workloads import (
    GPU_WORKLOADS,
    WORKLOADS,
    Workload,
    check_round_trip,
    check_size,
)

FOLDER = Path(__file__).parents[3] / "build" / "benchmarks"


@dataclass(frozen=True)
class Built:
    """The clock of a contender, and what was measured while it was built: see `Timing`."""

    clock: Clock
    compiling: float | None = None
    memory: float | None = None


def build(workload: Workload, name: str, device: str) -> Built:
    peak = PeakMemory() if device == "cuda" else None
    contender = workload.build(name, device)
    run = workload.run(contender)
    compiling = contender.seconds if isinstance(contender, Compiled) else None
    memory = None if peak is None else peak.of(run)
    return Built(clock_of(run, device), compiling, memory)


def measure(
    workload: Workload, names: list[str], budget: float, device: str = "cpu"
) -> dict[str, Timing]:
    """Build all contenders and time them in turn; empty where the reference cannot be built."""
    built: dict[str, Built] = {}
    worker: Worker | None = None
    for name in filter(workload.admits, names):
        if name == "flowjax (jit)":
            worker = Worker(torch.get_num_threads())
            worker.build(workload.architecture, workload.work, workload.number, workload.trained)
            check_size(name, worker.parameters, workload.architecture)
            check_round_trip(name, worker.gap)
            built[name] = Built(worker.clock)
            continue
        try:
            built[name] = build(workload, name, device)
        except Exception as error:
            if device == "cpu":
                raise
            # Cards and their compilers differ: what one cannot do leaves the others' times.
            print(f"left out: {name}, {first_line(error)}")
    if REFERENCE not in built:
        return {}
    timings = interleaved({name: b.clock for name, b in built.items()}, REFERENCE, budget)
    if worker is not None:
        worker.close()
    return {
        name: replace(timing, compiling=built[name].compiling, memory=built[name].memory)
        for name, timing in timings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of workloads' names")
    parser.add_argument("--contenders", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds a workload")
    parser.add_argument("--threads", type=int, default=1, choices=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--page", action="store_true", help="write the page of the documentation")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # As in production; Pyro switches validation on for everyone.
    pyro.enable_validation(False)
    random.seed(0)
    on_gpu = arguments.device == "cuda"
    columns = ON_GPU if on_gpu else NAMES
    names = [name for name in arguments.contenders if is_installed(name) and name in columns]
    if REFERENCE not in names:
        parser.error(f"all are compared with {REFERENCE}: install it, and leave it among them")
    print("left out:", ", ".join(n for n in arguments.contenders if n not in names) or "nobody")
    results: dict[str, dict[str, Timing]] = {}
    # Compile times are those of a first time, unless a cache is asked for.
    with TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        for title, workload in (GPU_WORKLOADS if on_gpu else WORKLOADS).items():
            if any(title.startswith(start) for start in arguments.only):
                line = measure(workload, names, arguments.budget, arguments.device)
                if line:
                    results[title] = line
                    print(table({title: line}, columns, header=len(results) == 1), flush=True)
    stored: dict[str, Any] = {
        "machine": machine(arguments.threads, arguments.device),
        "results": {
            title: {name: timing.as_dict() for name, timing in line.items()}
            for title, line in results.items()
        },
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"speed-{'cuda' if on_gpu else arguments.threads}.json"
    path.write_text(json.dumps(stored, indent=1))
    if arguments.page:
        write_page(results, stored["machine"], read(FOLDER / "speed-2.json"))


def read(path: Path) -> dict[str, dict[str, Timing]]:
    """Results of another run, if there was one."""
    if not path.exists():
        return {}
    lines = json.loads(path.read_text())["results"]
    return {
        title: {name: Timing(**timing) for name, timing in line.items()}
        for title, line in lines.items()
    }


if __name__ == "__main__":
    sys.exit(main())
