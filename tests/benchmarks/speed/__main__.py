"""Speed beside the peers: ``python -m tests.benchmarks.speed``, by ``make bench``.

Times every workload for pyroflows and each installed peer in one process, interleaved, on one
thread; writes build/benchmarks/speed.json, and the page docs/benchmarks/speed.md with ``--page``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyro
import torch

from tests.benchmarks.speed.contenders import CONTENDERS
from tests.benchmarks.speed.measure import Timing, interleaved
from tests.benchmarks.speed.page import machine, table, write_page
from tests.benchmarks.speed.workloads import WORKLOADS, Workload

REFERENCE = "zuko"
RESULT = Path(__file__).parents[3] / "build" / "benchmarks" / "speed.json"
MODULES = {"zuko": "zuko", "nflows": "nflows", "normflows": "normflows"}


def installed(names: list[str]) -> list[str]:
    def is_there(name: str) -> bool:
        return name not in MODULES or importlib.util.find_spec(MODULES[name]) is not None

    missing = [name for name in names if not is_there(name)]
    if missing:
        print("not installed, left out:", ", ".join(missing))
    return [name for name in names if name not in missing]


def measure(workload: Workload, names: list[str], budget: float) -> dict[str, Timing]:
    if workload.pyro_only:
        names = [
            name for name in names if name in ("pyroflows", "pyroflows recipe", "zuko", "Pyro")
        ]
    runs = {}
    for name in names:
        torch.manual_seed(0)
        runs[name] = workload.make(workload.build(name))
    return interleaved(runs, REFERENCE, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of workloads' names")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds a workload")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="write the page of the documentation")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # As in production; Pyro switches validation on for everyone.
    pyro.enable_validation(False)
    random.seed(0)
    names = installed(arguments.contenders)
    results: dict[str, dict[str, Timing]] = {}
    for title, workload in WORKLOADS.items():
        if any(title.startswith(start) for start in arguments.only):
            results[title] = measure(workload, names, arguments.budget)
            print(table({title: results[title]}, header=len(results) == 1), flush=True)
    stored: dict[str, Any] = {
        "machine": machine(arguments.threads),
        "results": {
            title: {name: timing.as_dict() for name, timing in line.items()}
            for title, line in results.items()
        },
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(stored, indent=1))
    if arguments.page:
        write_page(results, stored["machine"])


if __name__ == "__main__":
    sys.exit(main())
