"""Two moons and SLCP by `fit_npe`, against the reference draws of the benchmark of SBI.

`make bench-sbi` writes the table of `docs/benchmarks/simulation.md`; PYROFLOWS_DATA must hold the
folder ``sbibm`` with the reference draws. With ``--peer PYTHON``, an interpreter that has the
package sbi, its NPE is trained on the same simulations, with a flow of the same size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

import pyroflows as pf
from tests.benchmarks.tasks import TASKS

STEPS = {"two_moons": 3000, "slcp": 12_000}
SIMULATIONS = {"two_moons": 10_000, "slcp": 100_000}
DRAWS = 10_000


def train(task: str, count: int, steps: int, seed: int) -> tuple[Any, Any, float]:
    model, _ = TASKS[task]
    torch.manual_seed(seed)
    guide = pf.AutoAmortizedFlow(model, observed=["y"], flow=pf.NSF)
    start = time.process_time()
    fit = pf.fit_npe(
        guide, simulations=count, steps=steps, batch_size=256, seed=seed, progress=False
    )
    return guide, fit, time.process_time() - start


def peer(python: str, fit: Any, observations: Tensor, seed: int) -> tuple[Tensor, float, float]:
    """Draws of sbi's NPE for each observation, seconds of CPU, and its validation loss."""
    with tempfile.TemporaryDirectory() as folder:
        values = {k: v.flatten(1).numpy() for k, v in fit.simulations.values.items()}
        np.savez(f"{folder}/in.npz", **values, observations=observations.flatten(1).numpy())
        script = Path(__file__).with_name("sbi_peer.py")
        subprocess.run([python, script, folder, str(seed), str(DRAWS)], check=True)
        out = np.load(f"{folder}/out.npz")
        return torch.tensor(out["draws"]), float(out["seconds"]), float(out["loss"])


def row(name: str, values: list[float], digits: int = 3) -> str:
    return (
        f"| {name} | {np.mean(values):.{digits}f} | "
        + " | ".join(f"{v:.2f}" for v in values)
        + " |"
    )


def report(task: str, options: argparse.Namespace) -> None:
    _, shape = TASKS[task]
    data = np.load(Path(os.environ["PYROFLOWS_DATA"]) / "sbibm" / f"{task}.npz")
    observations = torch.tensor(data["observation"]).reshape(-1, *shape)[: options.observations]
    reference = torch.tensor(data["reference_posterior_samples"])
    count = options.simulations or SIMULATIONS[task]
    guide, fit, seconds = train(task, count, options.steps or STEPS[task], options.seed)
    print(f"## {task}, {count:,} simulations, seed {options.seed}\n")
    print(f"{fit}\nCPU seconds: {seconds:.0f}\n", flush=True)
    scores: dict[str, list[float]] = {"fit_npe": [], "and weights": [], "k-hat": [], "ESS": []}
    for y, truth in zip(observations, reference, strict=False):
        pyro.clear_param_store()
        posterior = guide.posterior(y)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            draws = posterior.sample(DRAWS)["theta"]
        scores["fit_npe"].append(pf.c2st(truth, draws))
        weighed = pf.psis(posterior, num_samples=DRAWS, seed=options.seed)
        scores["k-hat"].append(weighed.k_hat)
        scores["ESS"].append(weighed.ess / DRAWS)
        if options.weights:
            corrected = weighed.resample(DRAWS, seed=options.seed)["theta"]
            scores["and weights"].append(pf.c2st(truth, corrected))
        if options.refine:
            _, refined = pf.refine(
                guide, y, steps=options.refine, seed=options.seed, progress=False
            )
            scores.setdefault("k-hat, refined", []).append(refined.psis.k_hat)
            scores.setdefault("ESS, refined", []).append(refined.psis.ess / DRAWS)
        print(end=".", flush=True)
    if options.peer:
        drawn, seconds, loss = peer(options.peer, fit, observations, options.seed)
        print(f"\nsbi: CPU seconds {seconds:.0f}, validation loss {loss:.3f}")
        scores["sbi"] = [pf.c2st(t, d) for t, d in zip(reference, drawn, strict=False)]
    print("\n| | mean |" + " | ".join(f" {i} " for i in range(1, len(observations) + 1)) + " |")
    print("| --- " * (len(observations) + 2) + "|")
    for name, values in scores.items():
        if values:
            print(row(name, values))
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=[*TASKS, []])
    parser.add_argument("--simulations", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refine", type=int, default=0, help="steps of pf.refine; 0 for none")
    parser.add_argument("--weights", action="store_true", help="C2ST of reweighted draws too")
    parser.add_argument("--peer", help="a Python that has sbi")
    options = parser.parse_args()
    for task in options.tasks:
        report(task, options)


if __name__ == "__main__":
    main()
