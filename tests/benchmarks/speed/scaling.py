"""How costs grow with features, layers, batch and draws: ``make bench-scaling``.

Times flows of growing sizes beside what they are held to: the conditioner networks alone, and for
drawing from an autoregressive flow one small product for each feature. Measures the memory of a
training step and the time of imports too. Writes docs/benchmarks/scaling.md and its picture.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyro
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.speed.architecture import Architecture, Contender, Run
from tests.benchmarks.speed.contenders import CONTENDERS, is_installed
from tests.benchmarks.speed.measure import clock_of, interleaved
from tests.benchmarks.speed.page import fill, line_of_machine, machine
from tests.benchmarks.speed.work import sample, step
from tests.benchmarks.speed.workloads import WORKLOADS, Workload

DOCS = Path(__file__).parents[3] / "docs"
NOTES = Path(__file__).with_name("scaling_notes.md")
COUPLING = Architecture("coupling", True, 16, 4, 128)
MAF = Architecture("density", False, 16, 4, 128)
ROWS, DRAWS = 512, 256


class SmallProducts(Contender):
    """For each layer and feature the new units of every hidden layer, and the feature's numbers."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        units = math.ceil(a.hidden / a.features)
        sizes = [(a.features, units), (a.hidden, units), (a.hidden, a.count)]
        self.steps_of_all = a.features * a.layers
        self.products = nn.ModuleList(nn.Linear(*size) for size in sizes)

    @torch.no_grad()
    def sample(self, number: int) -> torch.Tensor:
        inputs = [torch.randn(number, p.in_features) for p in self.products]  # type: ignore[arg-type]
        for _ in range(self.steps_of_all):
            for product, x in zip(self.products, inputs, strict=True):
                out = product(x)
        return out


BUILDERS: dict[str, Callable[[Architecture], Contender]] = {
    "pyroflows": CONTENDERS["pyroflows"],
    "networks alone": CONTENDERS["floor"],
    "small products": SmallProducts,
}


@dataclass(frozen=True)
class Curve:
    """A cost at growing sizes, and what it is held to."""

    title: str
    axis: str
    architecture: Architecture
    sizes: tuple[int, ...]
    work: Callable[[Contender, int, int], Run] = step
    beside: str = "networks alone"
    number: int = ROWS

    def runs(self, size: int) -> dict[str, Run]:
        a, number = self.architecture, self.number
        if self.axis in ("features", "layers"):
            a = replace(a, **{self.axis: size})
        else:
            number = size
        made = {}
        for name in ("pyroflows", self.beside):
            torch.manual_seed(0)
            made[name] = self.work(BUILDERS[name](a), number, a.features)
        return made


_features = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CURVES = [
    Curve("spline coupling, training step", "features", COUPLING, _features),
    Curve("MAF, training step", "features", MAF, _features),
    Curve("MAF, drawing", "features", MAF, _features[:-1], sample, "small products", DRAWS),
    Curve("spline coupling, training step", "layers", COUPLING, (1, 2, 4, 8, 16, 32)),
    Curve("spline coupling, training step", "batch", COUPLING, (16, 64, 256, 1024, 4096, 16384)),
    Curve("MAF, drawing", "draws", MAF, (16, 64, 256, 1024, 4096), sample, "small products"),
]
Points = dict[str, list[float]]


def measured(curve: Curve, budget: float) -> Points:
    """Milliseconds of CPU time at every size."""
    points: Points = {"pyroflows": [], curve.beside: []}
    for size in curve.sizes:
        clocks = {name: clock_of(run) for name, run in curve.runs(size).items()}
        for name, timing in interleaved(clocks, "pyroflows", budget, rounds=9).items():
            points[name].append(timing.cpu[1])
    return points


def exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    """The slope in logarithms over the upper half of the sizes."""
    half = len(sizes) // 2
    x = [math.log(size) for size in sizes[half:]]
    y = [math.log(time) for time in times[half:]]
    return statistics.linear_regression(x, y).slope


def table(curves: list[tuple[Curve, Points]]) -> str:
    lines = [
        "| cost | against | from, ms | to, ms | exponent | held to | its exponent |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve, points in curves:
        ours, other = points["pyroflows"], points[curve.beside]
        cells = [
            curve.title,
            f"{curve.axis}, {curve.sizes[0]:,} to {curve.sizes[-1]:,}",
            f"{ours[0]:.3g}",
            f"{ours[-1]:.3g}",
            f"{exponent(curve.sizes, ours):.2f}",
            curve.beside,
            f"{exponent(curve.sizes, other):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(curves: list[tuple[Curve, Points]], path: Path) -> None:
    """All curves, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (curve, points) in zip(figure.subplots(2, 3).flat, curves, strict=True):
        for (name, times), style in zip(points.items(), ("o-", "s--"), strict=True):
            slope = exponent(curve.sizes, times)
            axes.loglog(curve.sizes, times, style, label=f"{name} (exponent {slope:.2f})")
        axes.set(title=curve.title, xlabel=curve.axis, ylabel="CPU time, ms")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- memory, imports ------------------------------------------------------------------------------


def peak(run: Run) -> float:
    """MiB that a call holds at most beyond what it found."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def memory(names: list[str]) -> str:
    lines = [
        "| training step | " + " | ".join(names) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for title, workload in WORKLOADS.items():
        if workload.work == "step":
            cells = [f"{peak(workload.run(build(workload, name))):.1f}" for name in names]
            lines.append("| " + " | ".join([title.split(":")[0], *cells]) + " |")
    return "\n".join(lines)


def build(workload: Workload, name: str) -> Contender:
    return CONTENDERS[name](workload.architecture)


def importing(modules: list[str], rounds: int = 7) -> str:
    """CPU seconds of a process that does nothing but import, medians."""
    taken: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(rounds):
        for module in modules:
            process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", f"import {module}"])
            _, _, used = os.wait4(process.pid, 0)
            taken[module].append(used.ru_utime + used.ru_stime)
    medians = {module: statistics.median(times) for module, times in taken.items()}
    return ", ".join(f"`import {module}` {seconds:.2f} s" for module, seconds in medians.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=4.0, help="CPU seconds a point")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    curves = []
    for curve in CURVES:
        curves.append((curve, measured(curve, arguments.budget)))
        print(table(curves[-1:]), flush=True)
    draw(curves, DOCS / "images" / "scaling.png")
    peers = [n for n in ("zuko", "Pyro", "nflows", "normflows", "torchflows") if is_installed(n)]
    # Two of them import nothing before their parts.
    places = {"Pyro": "pyro", "nflows": "nflows.flows", "torchflows": "torchflows.flows"}
    modules = ["torch", "pyroflows", *(places.get(name, name) for name in peers)]
    marks = {
        "MACHINE": line_of_machine(machine(1)),
        "TABLE": table(curves),
        "MEMORY": memory(["pyroflows", *peers]),
        "IMPORTS": importing(modules),
    }
    fill(NOTES, DOCS / "benchmarks" / "scaling.md", marks)


if __name__ == "__main__":
    sys.exit(main())
