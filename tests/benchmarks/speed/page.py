"""The page of the documentation, from the timings."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.speed.contenders import NAMES, ON_GPU, REFERENCE, is_installed
from tests.benchmarks.speed.measure import Timing
from tests.benchmarks.speed.worker import FLOWJAX
from tests.benchmarks.speed.workloads import GPU_WORKLOADS, WORKLOADS

PAGES = Path(__file__).parents[3] / "docs" / "benchmarks"
NOTES = Path(__file__).with_name("notes.md")
GPU_NOTES = Path(__file__).with_name("notes_gpu.md")
PACKAGES = ("torch", "triton", "pyro-ppl", "zuko", "nflows", "normflows", "torchflows")


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {
        "date": datetime.date.today().isoformat(),
        "card": _card() if device == "cuda" else None,
        "cpu": _cpu(),
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


def _card() -> str:
    size = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name(0)} of {size:.0f} GiB, CUDA {torch.version.cuda}"


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


def table(
    results: dict[str, dict[str, Timing]],
    names: Sequence[str] = NAMES,
    header: bool = True,
    by_wall: bool = False,
) -> str:
    """Ratios to zuko's time in the same round, medians.

    Of CPU time with goals in parentheses, or of wall time, for which there are none.
    """
    lines = []
    if header:
        lines.append("| workload | zuko, ms | " + " | ".join(names) + " |")
        lines.append("| --- " * (len(names) + 2) + "|")
    for title, line in results.items():
        workload = (WORKLOADS | GPU_WORKLOADS)[title]
        goals = {"pyroflows": workload.goal, "pyroflows compiled": workload.compiled_goal}
        reference = line[REFERENCE]
        cells = [title, f"{reference.wall if by_wall else reference.cpu[1]:.3g}"]
        for name in names:
            timing, goal = line.get(name), None if by_wall else goals.get(name)
            ratio = timing and (timing.wall_ratio if by_wall else timing.ratio[1])
            cells.append(_number(ratio) + (f" ({_number(goal)})" if ratio and goal else ""))
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


def memory(results: dict[str, dict[str, Timing]], names: Sequence[str]) -> str:
    """Of the GPU, in MiB."""
    lines = ["| workload | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for title, line in results.items():
        found = [line[name].memory if name in line else None for name in names]
        cells = ["" if size is None else f"{size:,.0f}" for size in found]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def line_of_machine(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    card = f"{where['card']}; " if where["card"] else ""
    return (
        f"Measured on {where['date']}: {card}{where['cpu']}, {where['cores']} cores, "
        f"{where['threads']} thread, Python {where['python']}, {versions}."
    )


def fill(notes: Path, page: Path, marks: dict[str, str]) -> None:
    """Write a page from its text, figures in the place of its marks."""
    text = notes.read_text()
    for mark, content in marks.items():
        text = text.replace(f"<!-- {mark} -->", content)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)


def write_page(
    results: dict[str, dict[str, Timing]],
    where: dict[str, Any],
    on_two: dict[str, dict[str, Timing]],
) -> None:
    """That of a GPU where the results are of one; with those on two threads, if there are any."""
    names = ON_GPU if where["card"] else NAMES
    marks = {
        "MACHINE": line_of_machine(where),
        "TABLE": table(results, names),
        "SPREAD": spread(results),
        "MEMORY": memory(results, names),
        "THREADS": table(on_two, by_wall=True) if on_two else "Not measured.",
    }
    if where["card"]:
        fill(GPU_NOTES, PAGES / "speed-gpu.md", marks)
    else:
        fill(NOTES, PAGES / "speed.md", marks)
