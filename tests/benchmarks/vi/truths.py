"""Truths that no closed form gives: ``python -m tests.benchmarks.vi.truths`` writes truths.json.

The models of `asides` get long runs of many chains of Hamiltonian Monte Carlo, all chains at once,
and every posterior without a known evidence gets it by bridge sampling: from those runs, or from
the reference draws of posteriordb. Takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

import pyroflows as pf
from tests.benchmarks.vi import asides, models
from tests.benchmarks.vi.posterior import TRUTHS, Posterior

LogDensity = Callable[[Tensor], Tensor]

#: Chains, adaptation steps, kept steps of each.
CHAINS, ADAPT, KEEP = 64, 600, 600
#: Every so many draws of a chain go to the bridge.
THIN = 6
#: Leapfrog steps are drawn between 1 and twice the mean.
LEAPFROG = 12


# --- Hamiltonian Monte Carlo ------------------------------------------------------------------


def value_and_score(log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    u = u.detach().requires_grad_()
    value = log_density(u)
    (score,) = torch.autograd.grad(value.sum(), u)
    return value.detach(), score


def covariance(draws: Tensor) -> Tensor:
    return torch.atleast_2d(torch.cov(draws.T))


def hmc(log_density: LogDensity, start: Tensor, adapt: int = ADAPT, keep: int = KEEP) -> Tensor:
    """Draws ``(keep, chains, D)`` of chains that start at ``(chains, D)``.

    All chains make the same random number of leapfrog steps. While they adapt, the step size is
    steered to accept 80% of proposals, and the metric is the covariance over all chains of the
    second half so far.
    """
    u, step, draws = start, 0.05, []
    value, score = value_and_score(log_density, u)
    factor = torch.eye(u.shape[-1]).to(u)  # of the covariance
    for t in range(adapt + keep):
        count = int(torch.randint(1, 2 * LEAPFROG + 1, ()))
        momentum = torch.randn_like(u)
        # Small steps now and then free a chain that started where the density is steep.
        h = step * torch.exp(-2 * torch.rand(len(u), 1))
        new, v, (new_value, new_score) = u, momentum, (value, score)
        for _ in range(count):
            v = v + h / 2 * new_score @ factor
            new = new + h * v @ factor.T
            new_value, new_score = value_and_score(log_density, new)
            v = v + h / 2 * new_score @ factor
        energy = value - 0.5 * momentum.square().sum(-1)
        log_ratio = new_value - 0.5 * v.square().sum(-1) - energy
        chance = log_ratio.exp().clamp(max=1.0).nan_to_num(0.0)
        accept = torch.rand_like(chance) < chance
        u = torch.where(accept[:, None], new, u)
        value = torch.where(accept, new_value, value)
        score = torch.where(accept[:, None], new_score, score)
        draws.append(u)
        if t < adapt:
            step = min(step * math.exp((chance.mean().item() - 0.8) / (1 + t / 50) ** 0.5), 1.0)
            if t in (adapt // 6, adapt // 3, adapt // 2):
                recent = torch.cat(draws[t // 2 :])
                factor = torch.linalg.cholesky(covariance(recent))
    return torch.stack(draws[adapt:])


def split_rhat(draws: Tensor) -> Tensor:
    """Of draws ``(keep, chains, D)``, for each coordinate."""
    half = len(draws) // 2
    halves = torch.cat([draws[:half], draws[half : 2 * half]], 1)
    within, between = halves.var(0).mean(0), halves.mean(0).var(0)
    return ((half - 1) / half + between / within).sqrt()


# --- bridge sampling --------------------------------------------------------------------------


def bridge(log_density: LogDensity, draws: Tensor) -> tuple[float, float]:
    r"""Log evidence of independent draws ``(S, D)`` of a posterior, and its standard error.

    The optimal bridge of Meng and Wong (Statistica Sinica, 1996) to a normal distribution fitted to
    every second draw; the other half of the draws is used for the estimate.
    """
    fitted, used = draws[::2], draws[1::2]
    normal = torch.distributions.MultivariateNormal(fitted.mean(0), covariance(fitted))
    proposed = normal.sample((len(used),))
    with torch.no_grad():
        here = _gap(log_density, normal, used)
        there = _gap(log_density, normal, proposed)
    estimate = here.median()
    for _ in range(1000):
        # Equal numbers: the terms are 1 / (r + w) and w / (r + w), in units of the estimate.
        top = torch.sigmoid(there - estimate)
        bottom = torch.sigmoid(estimate - here)
        change = top.mean().log() - bottom.mean().log()
        estimate = estimate + change
        if change.abs() < 1e-10:
            break
    parts = [x.var() / x.mean() ** 2 / len(x) for x in (top, bottom)]
    return estimate.item(), math.sqrt(sum(p.item() for p in parts))


def bridge_of_chains(log_density: LogDensity, u: Tensor) -> tuple[float, float]:
    """Of draws ``(keep, chains, D)``; the error is that between four groups of chains, if larger.

    Within a chain draws depend on each other, of which the formula knows nothing.
    """
    evidence, error = bridge(log_density, u[::THIN].flatten(0, 1))
    groups = [bridge(log_density, part[::THIN].flatten(0, 1))[0] for part in u.chunk(4, dim=1)]
    return evidence, max(error, torch.tensor(groups).std().item() / 2)


def _gap(log_density: LogDensity, normal: Any, u: Tensor) -> Tensor:
    values = torch.cat([log_density(part) for part in u.split(2_000)])
    return values.nan_to_num(-math.inf) - normal.log_prob(u)


# --- truths -----------------------------------------------------------------------------------


def log_density_of(posterior: Posterior) -> tuple[pf.AutoFlow, LogDensity]:
    args = posterior.args()
    pyro.clear_param_store()
    guide = pf.AutoFlow(posterior.model, example_args=args)
    return guide, lambda u: guide.log_joint(u, *args)


def aside_truth(posterior: Posterior) -> dict[str, Any]:
    """Moments with their Monte Carlo errors from the spread over chains, and the evidence."""
    guide, log_density = log_density_of(posterior)
    u = hmc(log_density, 0.5 * torch.randn(CHAINS, guide.latent_dim))
    rhat = split_rhat(u).max().item()
    flat = u.transpose(0, 1).flatten(0, 1)
    named = posterior.scalars(guide.unpack(flat))
    chains = {name: value.reshape(CHAINS, KEEP) for name, value in named.items()}
    spread = {name: value.std().item() for name, value in chains.items()}
    errors = {n: (v.mean(1).std() / CHAINS**0.5).item() / spread[n] for n, v in chains.items()}
    evidence, error = bridge_of_chains(log_density, u)
    return {
        "log_evidence": evidence,
        "log_evidence_error": error,
        "largest_split_rhat": rhat,
        "largest_error_of_a_mean": max(errors.values()),
        "centre": {name: value.mean().item() for name, value in chains.items()},
        "spread": spread,
    }


def reference_evidence(posterior: Posterior) -> dict[str, Any]:
    guide, log_density = log_density_of(posterior)
    evidence, error = bridge(log_density, guide.pack(models.REFERENCES[posterior.name].draws()))
    return {"log_evidence": evidence, "log_evidence_error": error}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.9g}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.vi.truths")
    makers = {p.name: reference_evidence for p in models.POSTERIORS}
    makers |= {p.name: aside_truth for p in asides.POSTERIORS}
    posteriors = {p.name: p for p in (*models.POSTERIORS, *asides.POSTERIORS)}
    parser.add_argument("names", nargs="*", default=list(makers))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    truths = json.loads(TRUTHS.read_text()) if TRUTHS.exists() else {}
    for name in parser.parse_args().names:
        pyro.set_rng_seed(0)
        start = time.process_time()
        truths[name] = rounded(makers[name](posteriors[name]))
        TRUTHS.write_text(json.dumps(truths, indent=1, sort_keys=True) + "\n")
        summary = {k: v for k, v in truths[name].items() if not isinstance(v, dict)}
        print(name, summary, f"{time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
