"""What `fit_svi` costs as the number of latents grows, in float32.

A correlated normal posterior of any dimension, see `tests.benchmarks.vi.nasty.chain`. Two fits of
few and more steps: their difference is the cost of a step, the rest that of start and report.
"""

from __future__ import annotations

import math
import resource
import time
from functools import partial
from typing import Any

import pyroflows as pf
from tests.benchmarks.vi.methods import CountedGuide
from tests.benchmarks.vi.nasty import chain, chain_data, chain_truth
from tests.benchmarks.vi.posterior import Posterior

DIMS = (10, 100, 1_000, 5_000)
FEW, MORE = 10, 110


def posterior_of(dim: int) -> Posterior:
    return Posterior(f"chain-{dim}", chain, partial(chain_data, dim), partial(chain_truth, dim))


def fit(dim: int, steps: int) -> tuple[CountedGuide, Any, float]:
    guide = CountedGuide(chain, name=f"chain_{dim}_{steps}")
    start = time.process_time()
    result = pf.fit_svi(
        guide, *chain_data(dim), steps=steps, psis_samples=1_000, progress=False, seed=0
    )
    return guide, result, time.process_time() - start


def measure(dim: int) -> dict[str, Any]:
    """CPU seconds of a step and of the rest, peak memory, and whether all stayed finite."""
    fit(10, FEW)  # so that what the first fit imports is not measured
    base = peak()
    _, _, few = fit(dim, FEW)
    guide, result, more = fit(dim, MORE)
    numbers = [*result.history.losses, result.psis.log_evidence, result.psis.elbo]
    parameters = list(guide.parameters())
    step = (more - few) / (MORE - FEW)
    return {
        "dtype": str(guide.flow.dtype),
        "parameters": sum(p.numel() for p in parameters),
        "seconds_per_step": step,
        "seconds_besides": more - MORE * step,
        "megabytes": peak() - base,
        "finite": all(map(math.isfinite, numbers))
        and all(bool(p.isfinite().all()) for p in parameters),
        "elbo_gap": result.psis.elbo - (chain_truth(dim).log_evidence or math.nan),
    }


def peak() -> float:
    """Megabytes of the process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
