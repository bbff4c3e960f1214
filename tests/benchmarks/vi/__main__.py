"""Guides and NUTS on posteriors with a known answer.

``python -m tests.benchmarks.vi`` runs what has no result yet, each in a process of its own, one
file each under build/benchmarks/vi, and writes docs/benchmarks/guides.md from all of them.
Posteriors of posteriordb are left out, visibly, where PYROFLOWS_DATA is not set.
"""

from __future__ import annotations

import argparse
import os
from itertools import product

from tests.benchmarks.vi.methods import METHODS, NUMPYRO
from tests.benchmarks.vi.report import SEEDS, measure_dims, write
from tests.benchmarks.vi.runs import attempt
from tests.benchmarks.vi.table import GROUPS, POSTERIORS


def available() -> tuple[list[str], list[str]]:
    """Posteriors and methods for which everything is there; says what is not."""
    names, methods = list(POSTERIORS), list(METHODS)
    if "PYROFLOWS_DATA" not in os.environ:
        print("PYROFLOWS_DATA is not set: without the posteriors of posteriordb")
        names = [name for name in names if name not in GROUPS["posteriordb"]]
    if not NUMPYRO.exists():
        print(f"{NUMPYRO} is not there: without NumPyro's NUTS (make bench-vi-numpyro)")
        methods.remove("NumPyro NUTS")
    return names, methods


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.vi", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(POSTERIORS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of pyroflows")
    parser.add_argument("--dims", action="store_true", help="measure the cost by dimension only")
    parser.add_argument("--report", action="store_true", help="write the page only")
    options = parser.parse_args()
    if options.dims:
        measure_dims()
    elif not options.report:
        names, methods = available()
        for job in jobs(options.models or names, options.methods or methods, options.seeds):
            attempt(*job)
    write()


def jobs(names: list[str], methods: list[str], seeds: list[int]) -> list[tuple[str, str, int]]:
    """All seeds for ours, the first for the others; NumPyro's models are those of posteriordb."""
    return [
        (name, method, seed)
        for method, seed, name in product(methods, seeds, names)
        if (method == "pyroflows" or seed == seeds[0])
        and (method != "NumPyro NUTS" or name in GROUPS["posteriordb"])
    ]


if __name__ == "__main__":
    main()
