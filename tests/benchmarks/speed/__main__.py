"""Speed beside the peers: ``python -m tests.benchmarks.speed``, by ``make bench``.

Times every workload for pyroflows and each installed peer, interleaved, on one thread; writes
build/benchmarks/speed.json, and the page docs/benchmarks/speed.md with ``--page``. With
``--device cuda`` it is larger workloads on a GPU, beside zuko, to build/benchmarks/speed-cuda.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch

from tests.benchmarks.speed.contenders import NAMES, REFERENCE, is_installed
from tests.benchmarks.speed.measure import Clock, Timing, clock_of, interleaved
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
#: What is compared on a GPU, where nothing but zuko has been built for.
ON_GPU = ["pyroflows", "pyroflows compiled", "pyroflows recipe", "zuko", "floor"]


def measure(
    workload: Workload, names: list[str], budget: float, device: str = "cpu"
) -> dict[str, Timing]:
    """Build all contenders and time them in turn."""
    clocks: dict[str, Clock] = {}
    compiling: dict[str, float] = {}
    worker: Worker | None = None
    for name in filter(workload.admits, names):
        if name == "flowjax (jit)":
            worker = Worker()
            worker.build(workload.architecture, workload.work, workload.number, workload.trained)
            check_size(name, worker.parameters, workload.architecture)
            check_round_trip(name, worker.gap)
            clocks[name] = worker.clock
            continue
        contender = workload.build(name, device)
        clocks[name] = clock_of(workload.run(contender), device)
        if isinstance(contender, Compiled):
            compiling[name] = contender.seconds
    timings = interleaved(clocks, REFERENCE, budget)
    if worker is not None:
        worker.close()
    return {
        name: replace(timing, compiling=compiling.get(name)) for name, timing in timings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of workloads' names")
    parser.add_argument("--contenders", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds a workload")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--page", action="store_true", help="write the page of the documentation")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # As in production; Pyro switches validation on for everyone.
    pyro.enable_validation(False)
    random.seed(0)
    on_gpu = arguments.device == "cuda"
    names = [
        name
        for name in arguments.contenders
        if is_installed(name) and (not on_gpu or name in ON_GPU)
    ]
    print("left out:", ", ".join(n for n in arguments.contenders if n not in names) or "nobody")
    results: dict[str, dict[str, Timing]] = {}
    # Compile times are those of a first time, unless a cache is asked for.
    with TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        for title, workload in (GPU_WORKLOADS if on_gpu else WORKLOADS).items():
            if any(title.startswith(start) for start in arguments.only):
                results[title] = measure(workload, names, arguments.budget, arguments.device)
                print(table({title: results[title]}, header=len(results) == 1), flush=True)
    stored: dict[str, Any] = {
        "machine": machine(arguments.threads, arguments.device),
        "results": {
            title: {name: timing.as_dict() for name, timing in line.items()}
            for title, line in results.items()
        },
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / ("speed-cuda.json" if on_gpu else "speed.json")
    path.write_text(json.dumps(stored, indent=1))
    if arguments.page and not on_gpu:
        write_page(results, stored["machine"])


if __name__ == "__main__":
    sys.exit(main())
