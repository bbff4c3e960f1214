"""A posterior with a known answer, and how an answer is compared with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Draws = dict[str, Tensor]

#: What `tests.benchmarks.vi.truths` computed.
TRUTHS = Path(__file__).parent / "truths.json"

#: Levels one standard deviation below and above the median of a normal distribution.
LEVELS = (0.15865525393145707, 0.8413447460685429)


@dataclass(frozen=True)
class Truth:
    """Centre and spread of every named scalar of a posterior, and its evidence where known.

    Attributes
    ----------
    centre, spread
        Mean and standard deviation; with ``quantiles`` the median, and half the distance between
        the quantiles that lie one deviation on either side of a normal's median.
    log_evidence, log_evidence_error
        In nats, with its standard error; None where nobody has computed it.
    quantiles
        For tails so heavy that moments do not exist, or take millions of draws to estimate.
    """

    centre: dict[str, float]
    spread: dict[str, float]
    log_evidence: float | None = None
    log_evidence_error: float = 0.0
    quantiles: bool = False

    def errors(self, draws: Draws, weights: Tensor | None = None) -> tuple[float, float]:
        """Worst error of a centre, in spreads, and worst absolute logarithm of a spread's ratio.

        ``draws`` are scalars ``{name: (S,)}``, ``weights`` ``(S,)`` sum to one.
        """
        size = len(next(iter(draws.values())))
        if weights is None:
            weights = torch.full((size,), 1 / size, dtype=torch.float64)
        measure = _by_quantiles if self.quantiles else _by_moments
        worst_centre = worst_spread = 0.0
        for name, centre in self.centre.items():
            found_centre, found_spread = measure(draws[name].double(), weights)
            spread = self.spread[name]
            worst_centre = _larger(worst_centre, abs(found_centre - centre) / spread)
            ratio = found_spread / spread
            worst_spread = _larger(worst_spread, abs(math.log(ratio)) if ratio else math.inf)
        return worst_centre, worst_spread


def _larger(a: float, b: float) -> float:
    """The larger of two; NaN where either is, which ``max`` would lose."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _by_moments(x: Tensor, weights: Tensor) -> tuple[float, float]:
    mean = (weights * x).sum()
    return mean.item(), (weights * (x - mean) ** 2).sum().sqrt().item()


def _by_quantiles(x: Tensor, weights: Tensor) -> tuple[float, float]:
    x, order = x.sort()
    cumulative = weights[order].cumsum(0)
    levels = torch.tensor([LEVELS[0], 0.5, LEVELS[1]], dtype=cumulative.dtype)
    low, middle, high = x[torch.searchsorted(cumulative, levels).clamp(max=len(x) - 1)].tolist()
    return middle, (high - low) / 2


@dataclass(frozen=True)
class Posterior:
    """A model, its data, and the truth about its posterior.

    Attributes
    ----------
    name
        What the command line and the report call it.
    model
        The Pyro model. Like every model it makes its priors in torch's default dtype.
    args
        Loads the model's arguments, in torch's default dtype.
    truth
        Loads what is known.
    derive
        From draws of the sites ``{site: (S, *shape)}`` to what the truth speaks of, so named.
    """

    name: str
    model: Callable[..., Any]
    args: Callable[[], tuple[Any, ...]]
    truth: Callable[[], Truth]
    derive: Callable[[Draws], Draws] = dict

    def scalars(self, draws: Draws) -> Draws:
        """Draws of the sites to those of scalars, ``{name: (S,)}``, named as Stan names them."""
        return scalars(self.derive(draws))


@cache
def stored_truths() -> dict[str, Any]:
    """By posterior its evidence, and the centres and spreads of those without a closed form."""
    return json.loads(TRUTHS.read_text())


def scalars(draws: Draws) -> Draws:
    """Each element by its name and one-based index: ``tau``, ``beta[1]``, ``corr[2,1]``."""
    flat: Draws = {}
    for site, value in draws.items():
        for index in np.ndindex(*value.shape[1:]):
            label = ",".join(str(i + 1) for i in index)
            flat[f"{site}[{label}]" if index else site] = value[(slice(None), *index)]
    return flat


def stacked(named: Draws) -> Draws:
    """Back from scalars to sites, for sites that are scalars or vectors."""
    sites: dict[str, list[Tensor]] = {}
    for name, value in named.items():
        sites.setdefault(name.partition("[")[0], []).append(value)
    vectors = {name.partition("[")[0] for name in named if "[" in name}
    return {s: torch.stack(v, -1) if s in vectors else v[0] for s, v in sites.items()}
