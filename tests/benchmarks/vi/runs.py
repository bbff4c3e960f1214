"""One run of the benchmark of guides, in a process of its own, and where its result is kept."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.vi.methods import METHODS
from tests.benchmarks.vi.table import POSTERIORS

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "build" / "benchmarks" / "vi"
#: CPU seconds after which a run is killed, whatever it does.
CAP = 900


def path_of(name: str, method: str, seed: int) -> Path:
    return RESULTS / f"{name}-{method}-{seed}.json"


def stored(name: str, method: str, seed: int) -> dict[str, Any] | None:
    path = path_of(name, method, seed)
    return json.loads(path.read_text()) if path.exists() else None


def run(name: str, method: str, seed: int) -> dict[str, Any]:
    """Run one method on one posterior and compare its answer with the truth."""
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
    in_process("tests.benchmarks.vi.runs", [name, method, str(seed)], path_of(name, method, seed))


def in_process(module: str, arguments: list[str], path: Path) -> None:
    """The JSON that a module prints last, into a file, unless that exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        result = json.loads(done.stdout.splitlines()[-1])
    elif done.returncode < 0:
        result = {"problem": f"killed by signal {-done.returncode}, at most {CAP} s of CPU"}
    else:
        result = {"problem": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{', '.join(arguments)}: {line_of(result)}", flush=True)


def line_of(result: dict[str, Any]) -> str:
    """A result in one line."""
    if "problem" in result:
        return result["problem"]
    keys = ("seconds", "centre_error", "weighted_centre_error", "ess_fraction", "k_hat")
    numbers = [f"{key} {result[key]:.3g}" for key in keys if key in result]
    return ", ".join([*numbers, result.get("verdict", "")])


def main() -> None:
    name, method, seed = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CPU, (CAP, CAP))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(json.dumps(run(name, method, int(seed))))


if __name__ == "__main__":
    main()
