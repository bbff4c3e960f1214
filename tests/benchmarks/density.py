"""Held-out nats of densities on ten data sets: our recipes, the peers, and what `select` picks.

``python -m tests.benchmarks.density`` fits what has no result yet, one file each under
build/benchmarks/density, and writes docs/benchmarks/densities.md from all of them. Needs the
``peers`` extra; POWER is left out, visibly, where PYROFLOWS_DATA is not set.
"""

from __future__ import annotations

import argparse
import os
from itertools import product

import torch

from tests.benchmarks.models import COMPARED, MODELS
from tests.benchmarks.report import write
from tests.benchmarks.runs import SMALL, attempt, size_of
from tests.benchmarks.sets import SETS


def jobs(sets: list[str], models: list[str], seeds: list[int]) -> list[tuple[str, str, int]]:
    """All seeds of a set for what is compared with the peers, the first for the other recipes."""
    return [
        (name, model, seed)
        for seed, name, model in product(seeds, sets, models)
        if seed < (size_of(name).seeds if model in COMPARED else 1)
    ]


def main() -> None:
    available = [name for name in SETS if name != "POWER" or "PYROFLOWS_DATA" in os.environ]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=available, choices=list(SETS))
    parser.add_argument("--models", nargs="+", default=[*MODELS, "select"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SMALL.seeds)))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for job in jobs(arguments.sets, arguments.models, arguments.seeds):
        attempt(*job)
    write()


if __name__ == "__main__":
    main()
