"""The page of the documentation, from the timings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.speed.contenders import NAMES, is_installed
from tests.benchmarks.speed.measure import Timing
from tests.benchmarks.speed.worker import FLOWJAX
from tests.benchmarks.speed.workloads import GPU_WORKLOADS, WORKLOADS

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks" / "speed.md"
NOTES = Path(__file__).with_name("notes.md")
PACKAGES = ("torch", "pyro-ppl", "zuko", "nflows", "normflows", "torchflows")


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions | _of_flowjax(),
    }


def _of_flowjax() -> dict[str, str]:
    if not is_installed("flowjax (jit)"):
        return {}
    code = "import importlib.metadata as m; print(m.version('flowjax'), m.version('jax'))"
    done = subprocess.run([str(FLOWJAX), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(("flowjax", "jax"), done.stdout.split(), strict=True))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))


def _number(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.3f}".lstrip("0") if ratio < 0.1 else f"{ratio:.2f}"


def table(results: dict[str, dict[str, Timing]], header: bool = True) -> str:
    """Ratios to zuko's CPU time in the same round, medians; goals behind a bar."""
    lines = []
    if header:
        lines.append("| workload | zuko, ms | " + " | ".join(NAMES) + " |")
        lines.append("| --- " * (len(NAMES) + 2) + "|")
    for title, line in results.items():
        workload = (WORKLOADS | GPU_WORKLOADS)[title]
        goals = {"pyroflows": workload.goal, "pyroflows compiled": workload.compiled_goal}
        cells = [title, f"{line['zuko'].cpu[1]:.3g}"]
        for name in NAMES:
            ratio = _number(line[name].ratio[1]) if name in line else ""
            goal = goals.get(name)
            cells.append(f"{ratio} ({_number(goal)})" if ratio and goal else ratio)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(results: dict[str, dict[str, Timing]]) -> str:
    lines = [
        "| workload | eager, ms | quartiles | compiled, ms | quartiles | compiling, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for title, line in results.items():
        cells = [title]
        for name in ("pyroflows", "pyroflows compiled"):
            timing = line.get(name)
            if timing is None:
                cells += ["", ""]
            else:
                low, _, high = timing.ratio
                cells += [f"{timing.cpu[1]:.3g}", f"{_number(low)} to {_number(high)}"]
        compiled = line.get("pyroflows compiled")
        seconds = compiled and compiled.compiling
        lines.append("| " + " | ".join([*cells, f"{seconds:.0f}" if seconds else ""]) + " |")
    return "\n".join(lines)


def line_of_machine(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"Measured on {where['date']}: {where['cpu']}, {where['cores']} cores, "
        f"{where['threads']} thread, Python {where['python']}, {versions}."
    )


def fill(notes: Path, page: Path, marks: dict[str, str]) -> None:
    """Write a page from its text, figures in the place of its marks."""
    text = notes.read_text()
    for mark, content in marks.items():
        text = text.replace(f"<!-- {mark} -->", content)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)


def write_page(results: dict[str, dict[str, Timing]], where: dict[str, Any]) -> None:
    marks = {
        "MACHINE": line_of_machine(where),
        "TABLE": table(results),
        "SPREAD": spread(results),
    }
    fill(NOTES, PAGE, marks)
