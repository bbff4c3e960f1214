"""One fit of the density benchmark, and where its result is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.numerics import forked_rng
from pyroflows.training.data import minibatches
from pyroflows.training.loop import Loop
from tests.benchmarks.models import MODELS
from tests.benchmarks.sets import SETS, Split

RESULTS = Path(__file__).parents[2] / "build" / "benchmarks" / "density"
#: The selection's budget, in fits of one recipe; its winner gets about as many steps as each alone.
FITS = 3


@dataclass(frozen=True)
class Size:
    """How a set is fitted; equal for all flows."""

    hidden: int
    steps: int
    batch_size: int
    seeds: int


# Three small fits say too little of how fits vary.
SMALL, LARGE = Size(64, 800, 256, seeds=6), Size(128, 5000, 512, seeds=3)


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
            choice = pf.select(
                rows,
                budget=FITS * size.steps,
                batch_size=size.batch_size,
                seed=seed,
                progress=False,
            )
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
