"""Three tasks by `fit_npe`, against the reference draws of the benchmark of SBI.

`make bench-sbi` does what is missing in ``build/sbi-runs``, part by part, and writes the tables of
all runs into `docs/benchmarks/simulation.md`. PYROFLOWS_DATA must hold the folder ``sbibm`` with
the reference draws. With ``--peer PYTHON``, an interpreter that has the package sbi, its NPE is
trained on the same simulations, with a flow of the same size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyroflows as pf
from pyroflows.nn import DeepSet
from tests.benchmarks.tasks import TASKS, gaussian_reference

RUNS = Path("build/sbi-runs")
PAGE = Path("docs/benchmarks/simulation.md")
MARK = "<!-- The command writes what follows. -->"
SIMULATIONS = {"two_moons": 10_000, "gaussian_linear": 10_000, "slcp": 100_000}
STEPS = {"two_moons": 2000, "gaussian_linear": 2000, "slcp": 8000}
LR = 2e-3
#: The data of SLCP are four exchangeable points whose scales differ by orders of magnitude.
GUIDES: dict[str, Callable[[], dict[str, Any]]] = {
    "two_moons": lambda: {"flow": pf.NSF},
    "gaussian_linear": lambda: {"flow": pf.NSF},
    "slcp": lambda: {
        "flow": partial(pf.NSF, autoregressive=True),
        "encoder": DeepSet(2, 16, standardize=True),
    },
}
DRAWS = 10_000
REFINE = 300


@dataclass
class Run:
    """One task with one seed: its parts, their results in a file, guides and draws beside it."""

    task: str
    seed: int
    peer: str | None

    def __post_init__(self) -> None:
        self.folder = RUNS / f"{self.task}-{self.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.json"
        self.results: dict[str, Any] = {}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
        self.model, shape = TASKS[self.task]
        if self.task == "gaussian_linear":
            self.observations, self.reference = gaussian_reference(DRAWS)
            return
        data = np.load(Path(os.environ["PYROFLOWS_DATA"]) / "sbibm" / f"{self.task}.npz")
        self.observations = torch.tensor(data["observation"]).reshape(-1, *shape)
        self.reference = torch.tensor(data["reference_posterior_samples"])

    def parts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "train", self.train
        for i in range(len(self.observations)):
            yield f"posterior {i}", lambda i=i: self.posterior(i)
        if self.task != "slcp":
            for i in range(len(self.observations)):
                yield f"refined {i}", lambda i=i: self.refined(i)
        if self.peer and self.task != "gaussian_linear":
            yield "sbi train", self.train_peer
            for i in range(len(self.observations)):
                yield f"sbi {i}", lambda i=i: self.posterior_of_peer(i)

    def do(self, parts: int) -> int:
        """Do so many of the parts that are missing; how many are left of them."""
        for name, part in self.parts():
            if name not in self.results and parts:
                pyro.clear_param_store()
                torch.manual_seed(self.seed)
                self.results[name] = part()
                self.file.write_text(json.dumps(self.results, indent=1))
                print(f"{self.task}: {name}: {self.results[name]}", flush=True)
                parts -= 1
        return parts

    def new_guide(self) -> pf.AutoAmortizedFlow:
        return pf.AutoAmortizedFlow(self.model, observed=["y"], **GUIDES[self.task]())

    def guide(self) -> pf.AutoAmortizedFlow:
        guide = self.new_guide()
        guide.read()
        guide.load_state_dict(torch.load(self.folder / "guide.pt", weights_only=True))
        return guide

    def train(self) -> dict[str, float]:
        guide, count = self.new_guide(), SIMULATIONS[self.task]
        start = time.process_time()
        fit = pf.fit_npe(
            guide,
            simulations=count,
            steps=STEPS[self.task],
            lr=LR,
            seed=self.seed,
            progress=False,
        )
        seconds = time.process_time() - start
        torch.save(guide.state_dict(), self.folder / "guide.pt")
        values = {k: v.flatten(1).numpy() for k, v in fit.simulations.values.items()}
        observations = self.observations.flatten(1).numpy()
        np.savez(self.folder / "in.npz", **values, observations=observations)
        return {"seconds": seconds, "loss": fit.history.best[1], "steps": len(fit.history.losses)}

    def posterior(self, i: int) -> dict[str, float]:
        posterior = self.guide().posterior(self.observations[i])
        drawn = posterior.sample(DRAWS)["theta"]
        report = pf.psis(posterior, num_samples=DRAWS, seed=self.seed)
        found = {"k": report.k_hat, "ess": report.ess / DRAWS}
        if self.task == "gaussian_linear":
            exact = self.reference[i]
            shift = ((drawn.mean(0) - exact.mean(0)) / exact.std(0)).abs().max().item()
            return {**found, "shift": shift}
        return {**found, "c2st": pf.c2st(self.reference[i], drawn)}

    def refined(self, i: int) -> dict[str, float]:
        _, fit = pf.refine(
            self.guide(), self.observations[i], steps=REFINE, seed=self.seed, progress=False
        )
        report = fit.psis
        if report is None:
            raise RuntimeError("no report")
        return {"k": report.k_hat, "ess": report.ess / DRAWS}

    def train_peer(self) -> dict[str, float]:
        script = Path(__file__).with_name("sbi_peer.py").resolve()
        # Isolated: a script's folder comes first, and there sbi is this file. Its logs stay there.
        peer = Path(str(self.peer)).absolute()
        command = [str(peer), "-I", str(script), ".", str(self.seed), str(DRAWS)]
        subprocess.run(command, check=True, cwd=self.folder)
        result: dict[str, float] = json.loads((self.folder / "peer.json").read_text())
        return result

    def posterior_of_peer(self, i: int) -> dict[str, float]:
        drawn = torch.tensor(np.load(self.folder / "peer.npy")[i])
        return {"c2st": pf.c2st(self.reference[i], drawn)}

    def rows(self) -> Iterator[tuple[str, list[float]]]:
        """What the parts that are done have found, by observation."""
        for title, part, key in (
            ("C2ST, `fit_npe`", "posterior", "c2st"),
            ("C2ST, sbi", "sbi", "c2st"),
            ("largest error of a mean, in deviations", "posterior", "shift"),
            ("k-hat", "posterior", "k"),
            ("effective share", "posterior", "ess"),
            ("k-hat, refined", "refined", "k"),
            ("effective share, refined", "refined", "ess"),
        ):
            names = [f"{part} {i}" for i in range(len(self.observations))]
            done = [self.results[name] for name in names if name in self.results]
            found = [result[key] for result in done if key in result]
            if found:
                yield title, found

    def table(self) -> str:
        count = f"{SIMULATIONS[self.task]:,}"
        lines = [f"## {self.task}, {count} simulations, seed {self.seed}", ""]
        for who, part in (("fit_npe", "train"), ("sbi", "sbi train")):
            if part in self.results:
                found = self.results[part]
                lines.append(
                    f"- {who}: {found['seconds']:.0f} s of CPU, {found['steps']:.0f} steps"
                )
        numbers = " | ".join(str(i + 1) for i in range(len(self.observations)))
        lines += ["", f"| observation | mean | {numbers} |"]
        lines.append("| --- |" + " ---: |" * (1 + len(self.observations)))
        for title, values in self.rows():
            cells = " | ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {title} | {float(np.mean(values)):.3f} | {cells} |")
        refined = [v["k"] for name, v in self.results.items() if name.startswith("refined")]
        if refined:
            reliable = sum(k < 0.7 for k in refined)
            lines += ["", f"Refined, k-hat is below 0.7 on {reliable} of {len(refined)}."]
        return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1000, help="do at most so many parts")
    parser.add_argument("--peer", help="a Python that has sbi")
    parser.add_argument("--page", action="store_true", help="write all tables into the page")
    options = parser.parse_args()
    parts = options.parts
    for task in options.tasks or TASKS:
        parts = Run(task, options.seed, options.peer).do(parts)
    done = [name.rsplit("-", 1) for name in sorted(path.name for path in RUNS.iterdir())]
    runs = [Run(task, int(seed), None) for known in TASKS for task, seed in done if task == known]
    tables = "\n".join(run.table() for run in runs)
    print("\n" + tables)
    if options.page:
        text = PAGE.read_text().partition(MARK)[0]
        PAGE.write_text(f"{text}{MARK}\n\n{tables}")


if __name__ == "__main__":
    main()
