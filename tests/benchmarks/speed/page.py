"""The page of the documentation, from the timings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from tests.benchmarks.speed.contenders import CONTENDERS
from tests.benchmarks.speed.measure import Timing
from tests.benchmarks.speed.workloads import WORKLOADS

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks" / "speed.md"
NOTES = Path(__file__).with_name("notes.md")
PACKAGES = ("torch", "pyro-ppl", "zuko", "nflows", "normflows")


def machine(threads: int) -> dict[str, Any]:
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))


def _ratio(timing: Timing | None) -> str:
    if timing is None or timing.ratio is None:
        return ""
    return (
        f"{timing.ratio[1]:.3f}".lstrip("0") if timing.ratio[1] < 0.1 else f"{timing.ratio[1]:.2f}"
    )


def table(results: dict[str, dict[str, Timing]], header: bool = True) -> str:
    """Ratios to zuko's CPU time in the same round, medians."""
    timed = {name for line in results.values() for name in line}
    names = [name for name in CONTENDERS if name in timed]
    lines = []
    if header:
        lines.append("| workload | zuko, ms | goal | " + " | ".join(names) + " |")
        lines.append("| --- " * (len(names) + 3) + "|")
    for title, line in results.items():
        zuko = f"{line['zuko'].cpu[1]:.3g}"
        cells = [title, zuko, f"{WORKLOADS[title].goal:.2f}"]
        lines.append("| " + " | ".join([*cells, *(_ratio(line.get(n)) for n in names)]) + " |")
    return "\n".join(lines)


def spread(results: dict[str, dict[str, Timing]]) -> str:
    lines = ["| workload | pyroflows, ms | quartiles of the ratio |", "| --- | --- | --- |"]
    for title, line in results.items():
        ours = line["pyroflows"]
        low, _, high = ours.ratio or (0.0, 0.0, 0.0)
        lines.append(f"| {title} | {ours.cpu[1]:.3g} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def write_page(results: dict[str, dict[str, Timing]], where: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    intro = (
        f"Measured on {where['date']}: {where['cpu']}, {where['cores']} cores, "
        f"{where['threads']} thread, Python {where['python']}, {versions}."
    )
    text = NOTES.read_text()
    for mark, content in {
        "MACHINE": intro,
        "TABLE": table(results),
        "SPREAD": spread(results),
    }.items():
        text = text.replace(f"<!-- {mark} -->", content)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
