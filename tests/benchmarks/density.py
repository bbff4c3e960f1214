"""Held-out nats of densities on ten data sets: our recipes, the peers, and what `select` picks.

``python -m tests.benchmarks.density`` fits what has no result yet, one file each under
build/benchmarks/density, and writes docs/benchmarks.md from all of them. Needs the ``bench`` extra;
POWER is left out, visibly, where PYROFLOWS_DATA is not set.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.numerics import forked_rng
from pyroflows.training.data import minibatches
from pyroflows.training.loop import Loop
from tests.benchmarks.models import COMPARED, MODELS
from tests.benchmarks.sets import SETS, Split

RESULTS = Path(__file__).parents[2] / "build" / "benchmarks" / "density"
#: Steps of the selection in all; its winner gets about as many as each recipe alone.
BUDGET = 4500


@dataclass(frozen=True)
class Size:
    """How a set is fitted; equal for all flows."""

    hidden: int
    steps: int
    batch_size: int


SMALL, LARGE = Size(64, 1500, 256), Size(128, 5000, 512)


def size_of(name: str) -> Size:
    return LARGE if name == "POWER" else SMALL


def fit_ours(flow: pf.Flow, split: Split, size: Size, seed: int) -> None:
    pf.fit_mle(
        flow,
        split.train,
        validation=split.validation,
        steps=size.steps,
        batch_size=size.batch_size,
        patience=None,
        seed=seed,
        progress=False,
    )


def fit_peer(model: nn.Module, split: Split, size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """The same optimiser, schedule, checks and standardisation; gives location and scale."""
    loc, scale = split.train.mean(0), split.train.std(0, correction=0)

    @torch.no_grad()
    def check() -> float:
        rows = (split.validation - loc) / scale
        return -torch.cat([model(part) for part in rows.split(8192)]).mean().item()

    rows = ((split.train - loc) / scale, None)
    loop = Loop(
        loss=lambda x, _: -model(x).mean(),
        batches=minibatches(rows, size.batch_size, torch.Generator().manual_seed(seed)),
        parameters=list(model.parameters()),
        steps=size.steps,
        lr=1e-3,
        clip_norm=5.0,
        check=check,
        check_every=max(1, size.steps // 50),
        patience=None,
        progress=False,
        title="",
    )
    loop.run()
    return loc, scale


@torch.no_grad()
def scores_of(density: Any, rows: Tensor) -> Tensor:
    return torch.cat([density(part) for part in rows.split(8192)]).double()


def run(set_name: str, model_name: str, seed: int) -> dict[str, Any]:
    """Fit one model to one split; the test rows' log densities and the costs."""
    split, size = SETS[set_name](seed), size_of(set_name)
    with forked_rng(seed):
        start = time.process_time()
        if model_name == "select":
            rows = torch.cat([split.train, split.validation])
            choice = pf.select(rows, budget=BUDGET, seed=seed, progress=False)
            chosen, model = choice.name, choice.flow
            if choice.table[0].candidate.options:
                chosen = str(choice.table[0].candidate)
            scores = scores_of(lambda x: model().log_prob(x), split.test)
        else:
            chosen = model_name
            model = MODELS[model_name](split.train.shape[1], size.hidden)
            if isinstance(model, pf.Flow):
                fit_ours(model, split, size, seed)
                scores = scores_of(lambda x: model().log_prob(x), split.test)
            else:
                loc, scale = fit_peer(model, split, size, seed)
                scores = scores_of(lambda x: model((x - loc) / scale), split.test)
                scores = scores - scale.log().sum()
        return {
            "chosen": chosen,
            "scores": scores,
            "seconds": time.process_time() - start,
            "parameters": sum(p.numel() for p in model.parameters()),
        }


def path_of(set_name: str, model_name: str, seed: int) -> Path:
    return RESULTS / f"{set_name}-{model_name}-{seed}.pt".replace(" ", "-")


def attempt(set_name: str, model_name: str, seed: int) -> None:
    """Run and store; a failure is a result too."""
    path = path_of(set_name, model_name, seed)
    if path.exists():
        return
    try:
        result = run(set_name, model_name, seed)
    except Exception as error:
        result = {"problem": f"{type(error).__name__}: {error}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(result, path)
    nats = result["scores"].mean().item() if "scores" in result else result["problem"]
    print(f"{set_name}, {model_name}, seed {seed}: {nats}", flush=True)


def jobs(sets: list[str], models: list[str], seeds: list[int]) -> list[tuple[str, str, int]]:
    """All seeds for what is compared with the peers, the first for the other recipes."""
    chosen = product(seeds, sets, models)
    return [(s, m, seed) for seed, s, m in chosen if m in COMPARED or seed == seeds[0]]


def main() -> None:
    available = [name for name in SETS if name != "POWER" or "PYROFLOWS_DATA" in os.environ]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=available, choices=list(SETS))
    parser.add_argument("--models", nargs="+", default=[*MODELS, "select"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for job in jobs(arguments.sets, arguments.models, arguments.seeds):
        attempt(*job)


if __name__ == "__main__":
    main()
