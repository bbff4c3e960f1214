"""What test_processes.py runs in one process and in two, started by torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, distributed

import pyroflows as pf
from pyroflows import cli

RANK = int(os.environ.get("RANK", "0"))


def table(rows: int = 403) -> Tensor:
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.stack([100 * x[:, 0], x[:, 0] ** 2 + x[:, 1]], -1)


def density(folder: Path, **options: Any) -> list[float]:
    """A fit by maximum likelihood: uneven parts of the batches, weights that differ at first."""
    torch.manual_seed(RANK)
    flow = pf.NSF(2, transforms=1, hidden_features=(8,), act_norm=True).double()
    settings = {"steps": 30, "batch_size": 51, "lr": 0.01, "seed": 3, "progress": False}
    fit = pf.fit_mle(flow, table(), **{**settings, **options})
    score = flow().log_prob(table()).mean().item()
    return [*fit.history.losses, *(value for _, value in fit.history.checks), score]


def guide(folder: Path) -> list[float]:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        pyro.sample("b", dist.Normal(a, 0.5))

    pyro.clear_param_store()
    torch.manual_seed(RANK)
    guide = pf.AutoFlow(model, pf.IAF(2, transforms=1, hidden_features=(8,)))
    options: Any = {"estimator": "total", "starts": 0, "steps": 80, "lr": 0.05}
    fit = pf.fit_svi(guide, draws=101, psis_samples=1000, seed=0, progress=False, **options)
    weights = torch.cat([p.detach().flatten() for p in guide.parameters()])
    return [*fit.history.losses, fit.psis.log_evidence, weights.sum().item()]


def simulator(folder: Path) -> list[float]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5))

    pyro.clear_param_store()
    npe = pf.AutoAmortizedFlow(model, observed=["y"])
    fit = pf.fit_npe(npe, simulations=300, steps=20, seed=0, progress=False)
    return fit.history.losses


def file(folder: Path) -> list[float]:
    """From a file larger than its memory: each process has blocks of its own."""
    flow = pf.RealNVP(2, transforms=1, hidden_features=(8,)).double()
    rows = pf.RowFile(folder / "x.npy", memory=2**15)
    fit = pf.fit_mle(flow, rows, steps=20, batch_size=30, seed=0, progress=False)
    standardization = flow.transform.standardization
    return [*standardization.loc.tolist(), *standardization.scale.tolist(), fit.history.best[1]]


def different(folder: Path) -> str:
    flow = pf.RealNVP(2, transforms=1 + RANK)
    return _refused(lambda: pf.fit_mle(flow, table(), steps=2, progress=False))


def resumed(folder: Path) -> list[float]:
    """Ended, and begun again from the last check."""
    density(folder, checkpoint=folder / "fit.pt")
    return density(folder, checkpoint=folder / "fit.pt")


def everything(folder: Path) -> dict[str, Any]:
    return {
        "density": density(folder),
        "guide": guide(folder),
        "simulator": simulator(folder),
        "file": file(folder),
        "different": different(folder),
        "resumed": resumed(folder),
        "too small": _refused(lambda: density(folder, batch_size=1)),
    }


def _refused(run: Any) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def command_line(folder: Path) -> None:
    options = ["--flow", "RealNVP", "--set", "transforms=2", "--steps", "20", "--seed", "0"]
    out = str(folder / "flow.safetensors")
    assert cli.main(["fit", str(folder / "x.npy"), "--out", out, "--device", "cpu", *options]) == 0


def main(folder: Path) -> None:
    with cli.process_group():
        command_line(folder)
        result = everything(folder)
        (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(result))


def prepare(folder: Path) -> None:
    np.save(folder / "x.npy", table(1000).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
