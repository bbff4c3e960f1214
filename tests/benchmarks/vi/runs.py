"""One run of the benchmark of guides, in a process of its own, and where its result is kept."""

from __future__ import annotations

import json
import multiprocessing
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.vi.methods import METHODS
from tests.benchmarks.vi.table import POSTERIORS

Result = dict[str, Any]

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "build" / "benchmarks" / "vi"
#: CPU seconds after which a run is killed, whatever it does.
CAP = 900


def path_of(name: str, method: str, seed: int) -> Path:
    return RESULTS / f"{name}-{method}-{seed}.json"


def stored(name: str, method: str, seed: int) -> Result | None:
    path = path_of(name, method, seed)
    return json.loads(path.read_text()) if path.exists() else None


def run(name: str, method: str, seed: int) -> Result:
    """Run one method on one posterior, in float64, and compare its answer with the truth."""
    torch.set_default_dtype(torch.float64)
    posterior = POSTERIORS[name]
    args, truth = posterior.args(), posterior.truth()
    answer = METHODS[method](posterior, args, seed)
    draws = posterior.scalars(answer.draws)
    centre, spread = truth.errors(draws)
    result = {
        "seconds": answer.seconds,
        "densities": answer.count.densities,
        "gradients": answer.count.gradients,
        "centre_error": centre,
        "spread_error": spread,
        **answer.notes,
    }
    if answer.weights is not None:
        weighted = truth.errors(draws, answer.weights)
        result["weighted_centre_error"], result["weighted_spread_error"] = weighted
    return result


def attempt(name: str, method: str, seed: int) -> None:
    """Run in another process, and store; a failure is a result too."""
    in_process(run, (name, method, seed), path_of(name, method, seed))


def in_process(task: Callable[..., Result], arguments: tuple[Any, ...], path: Path) -> None:
    """The result of a task into a file, unless that exists.

    Each process is a fresh copy of a server that has imported everything and done nothing.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([task.__module__])
    process = context.Process(target=_store, args=(task, arguments, path))
    process.start()
    process.join()
    if not path.exists():
        problem = f"ended by signal {-(process.exitcode or 0)}, at most {CAP} s of CPU"
        path.write_text(json.dumps({"problem": problem}) + "\n")
    print(f"{', '.join(map(str, arguments))}: {line_of(json.loads(path.read_text()))}", flush=True)


def _store(task: Callable[..., Result], arguments: tuple[Any, ...], path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CAP, CAP))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        result = task(*arguments)
    except Exception as error:
        result = {"problem": f"{type(error).__name__}: {error}".partition("\n")[0]}
    path.write_text(json.dumps(result, indent=1) + "\n")


def line_of(result: Result) -> str:
    """A result in one line."""
    if "problem" in result:
        return result["problem"]
    keys = ("seconds", "centre_error", "weighted_centre_error", "ess_fraction", "k_hat")
    numbers = [f"{key} {result[key]:.3g}" for key in keys if key in result]
    return ", ".join([*numbers, result.get("verdict", "")])
