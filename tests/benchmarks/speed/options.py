"""What options of fits change: ``python -m tests.benchmarks.speed.options`` prints two tables.

``compile=True``: a step's CPU time without and with it, and what compiling takes, with an empty
cache and in a second process with the cache of the first. ``precision="bf16"``: the CPU time of a
loss and its gradient. All on one thread.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch
from torch import nn

import pyroflows as pf
from pyroflows.training import NegativeELBO, NegativeLogLikelihood
from pyroflows.training.adam import Adam
from pyroflows.training.compiled import CompiledStep
from pyroflows.training.losses import ReducedPrecision
from pyroflows.training.repay import Repay
from tests.benchmarks.speed.architecture import Run, gradients
from tests.benchmarks.speed.measure import clock_of, interleaved
from tests.benchmarks.speed.page import line_of_machine, machine
from tests.models import SCHOOL_ERRORS, SCHOOLS, eight_schools

#: A loss as fits have it, and the batch of every step.
Case = tuple[nn.Module, tuple[Any, ...]]
RATE, CLIP_NORM = 1e-3, 100.0


def density(recipe: Any, features: int, rows: int, **options: Any) -> Callable[[], Case]:
    """Maximum likelihood of a flow."""

    def case() -> Case:
        flow = recipe(features, **options)
        return NegativeLogLikelihood(flow), (torch.randn(rows, features), None)

    return case


def guide(draws: int) -> Callable[[], Case]:
    """The default guide of eight schools."""

    def case() -> Case:
        pyro.clear_param_store()
        made, data = pf.AutoFlow(eight_schools), (SCHOOL_ERRORS, SCHOOLS)
        made.register(*data)
        return NegativeELBO(made, draws), (data, {})

    return case


_two, _small = {"transforms": 2, "hidden_features": (16,)}, {"hidden_features": (64, 64)}
_five, _eight = ({"transforms": n, "hidden_features": (128, 128)} for n in (5, 8))
_four = {"transforms": 4, "hidden_features": (512, 512)}
COMPILED = {
    "RealNVP, 4 features, 2 layers of 16; 256": density(pf.RealNVP, 4, 256, **_two),
    "NSF, 2 features, 5 layers of 64, 64; 256": density(pf.NSF, 2, 256, transforms=5, **_small),
    "RealNVP, 64 features, 8 layers of 128, 128; 1,024": density(pf.RealNVP, 64, 1024, **_eight),
    "autoregressive NSF, 16 features, 5 layers of 128, 128; 1,024": density(
        pf.NSF, 16, 1024, autoregressive=True, **_five
    ),
    "the default guide of eight schools; 1,024 draws": guide(1024),
    "the same; 16 draws": guide(16),
}
REDUCED = {
    "NSF, 16 features, 5 layers of 128, 128": density(pf.NSF, 16, 1024, **_five),
    "MAF, 16 features, 5 layers of 128, 128": density(pf.MAF, 16, 1024, **_five),
    "RealNVP, 64 features, 4 layers of 512, 512": density(pf.RealNVP, 64, 1024, **_four),
}

# --- compile=True ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiling:
    """Operations of a step, milliseconds of an eager and a compiled one, seconds to compile."""

    operations: int
    eager: float
    compiled: float
    seconds: float


class Counted(Repay):
    """Compiles at the first step; keeps the number of operations by which ``"auto"`` decides."""

    operations = 0

    def due(self, left: int, operations: Callable[[], int]) -> bool:
        self.operations = operations()
        return True


def compiling(title: str, budget: float) -> Compiling:
    """Of a line of the table, in this process and with the cache as it is."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    torch.manual_seed(0)
    loss, batch = COMPILED[title]()
    adam = Adam([p for p in loss.parameters() if p.requires_grad])
    counted = Counted(sure=True)
    step = CompiledStep(loss, adam.parameters, CLIP_NORM, counted)
    before = cpu_seconds()
    step.take(adam, RATE, batch)
    seconds = cpu_seconds() - before

    def compiled() -> None:
        if step.take(adam, RATE, batch) is None:
            raise RuntimeError(f"{title}: {step.outcome}")

    clocks = {"eager": clock_of(eager(loss, adam, batch)), "compiled": clock_of(compiled)}
    times = interleaved(clocks, "eager", budget)
    return Compiling(counted.operations, times["eager"].cpu[1], times["compiled"].cpu[1], seconds)


def eager(loss: nn.Module, adam: Adam, batch: tuple[Any, ...]) -> Run:
    """The step that fits take without ``compile``."""

    def step() -> None:
        adam.zero_grad()
        loss(*batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(adam.parameters, CLIP_NORM)
        adam.step(RATE, unless=~norm.isfinite())

    return step


def cpu_seconds() -> float:
    """Of this process and of the C++ compilers that it has waited for."""
    return sum(os.times()[:4])


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process: nothing imported, nothing compiled before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compile_table(budget: float) -> None:
    print("| flow, batch | operations | a step, eager | compiled | to compile | again |")
    print("| --- " * 6 + "|")
    # One core: else Inductor has its kernels compiled by a pool of processes.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    for title in COMPILED:
        with TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            first, again = (apart(compiling, title, b) for b in (budget, 0.0))
        cells = [
            f"{first.operations:,}",
            f"{first.eager:.2g} ms",
            f"{first.compiled:.2g} ms",
            f"{first.seconds:.0f} s",
            f"{again.seconds:.0f} s",
        ]
        print("|", " | ".join([title, *cells]), "|", flush=True)


# --- precision="bf16" -----------------------------------------------------------------------------


def precision_table(budget: float) -> None:
    print("| flow | float32 | bf16 |")
    print("| --- " * 3 + "|")
    for title, case in REDUCED.items():
        torch.manual_seed(0)
        loss, batch = case()
        losses = {"float32": loss, "bf16": ReducedPrecision(loss)}
        clocks = {name: clock_of(gradients(module, *batch)) for name, module in losses.items()}
        times = interleaved(clocks, "float32", budget)
        cells = [f"{times[name].cpu[1]:.2g} ms" for name in losses]
        print("|", " | ".join([title, *cells]), "|", flush=True)


TABLES = {"compile": compile_table, "precision": precision_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--budget", type=float, default=5.0, help="CPU seconds a line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    print(line_of_machine(machine(threads=1)))
    for name in arguments.only:
        print()
        TABLES[name](arguments.budget)


if __name__ == "__main__":
    main()
