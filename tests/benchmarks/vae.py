"""Variational autoencoders of 8x8 digits: normal prior and posterior beside flows in their places.

`make bench-vae` trains both with several seeds and writes the table of `docs/benchmarks/vae.md`.
The score is the importance-weighted bound on the log likelihood of images held out, in nats per
image, which is below the log likelihood and near it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.layers import CouplingLayer

PAGE = Path("docs/benchmarks/vae.md")
MARK = "<!-- The command writes what follows. -->"
LATENTS, HIDDEN = 6, 128
STEPS, BATCH, LR = 1500, 128, 2e-3
DRAWS = 500


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images of counts from 0 to 16, four fifths to train on and the rest."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:1437]], images[order[1437:]]


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN),
        nn.SiLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.SiLU(),
        nn.Linear(HIDDEN, outputs),
    )


def normal_posterior(features: int, context: int) -> pf.Flow:
    """Independent normals, location and log scale linear in the context."""
    layer = CouplingLayer(features, context, mask=[True] * features, hidden_features=())
    return pf.Flow([layer], features, context)


class Autoencoder:
    """A model of images with its amortised guide; with flows as prior and posterior, or normal."""

    def __init__(self, flows: bool) -> None:
        self.decoder = network(LATENTS, 64)
        self.prior = pf.RealNVP(LATENTS) if flows else None
        self.guide = pf.AutoAmortizedFlow(
            self.model,
            encoders={"z": network(64, 32)},
            flow=None if flows else normal_posterior,
        )

    def model(self, x: Tensor, batch: int | None = None) -> None:
        pyro.module("decoder", self.decoder)
        if self.prior is not None:
            pyro.module("prior", self.prior)
        normal = dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1)
        with pyro.plate("images", len(x), subsample_size=batch, dim=-1) as index:
            z = pyro.sample("z", normal if self.prior is None else self.prior())
            pixels = dist.Binomial(16, logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x[index])

    def fit(self, x: Tensor, seed: int, steps: int = STEPS) -> pf.training.SVIFit:
        options: dict[str, Any] = {"model_kwargs": {"batch": BATCH}, "progress": False}
        return pf.fit_svi(self.guide, x, steps=steps, lr=LR, seed=seed, **options)


@torch.no_grad()
def importance_bound(vae: Autoencoder, x: Tensor, draws: int = DRAWS) -> Tensor:
    r"""Bound :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k \mid x)` of each image, in nats."""
    parts = []
    for rows in x.split(30):
        with pyro.plate("draws", draws, dim=-2):
            guide = poutine.trace(vae.guide).get_trace(rows)
            model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(rows)
        weights = torch.zeros(draws, len(rows))
        for trace, sign in ((model, 1), (guide, -1)):
            trace.compute_log_prob()
            for site in trace.nodes.values():
                if site["type"] == "sample" and site["name"] not in ("images", "draws"):
                    weights = weights + sign * site["log_prob"]
        parts.append(weights.logsumexp(0) - math.log(draws))
    return torch.cat(parts)


def run(seed: int, steps: int) -> tuple[Tensor, list[float]]:
    """Bounds of the images held out, ``(2, rows)``, normal and with flows, and seconds of CPU."""
    train, held_out = digits(seed)
    bounds, seconds = [], []
    for flows in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        vae = Autoencoder(flows)
        start = time.process_time()
        vae.fit(train, seed, steps)
        seconds.append(time.process_time() - start)
        bounds.append(importance_bound(vae, held_out))
    return torch.stack(bounds), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--page", action="store_true", help="write the table into the page")
    options = parser.parse_args()
    lines = [
        "| seed | normal | flows | flows minus normal | seconds, normal | flows |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    gains = []
    for seed in range(options.seeds):
        bounds, seconds = run(seed, options.steps)
        gain = bounds[1] - bounds[0]
        gains.append(gain.mean().item())
        error = gain.std().item() / len(gain) ** 0.5
        normal, flows = bounds.mean(1).tolist()
        lines.append(
            f"| {seed} | {normal:.2f} | {flows:.2f} | {gains[-1]:.2f} ± {error:.2f} | "
            f"{seconds[0]:.0f} | {seconds[1]:.0f} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"On average {np.mean(gains):.2f} nats per image, at least {min(gains):.2f}.", ""]
    print("\n".join(lines))
    if options.page:
        text = PAGE.read_text().partition(MARK)[0]
        PAGE.write_text(f"{text}{MARK}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
