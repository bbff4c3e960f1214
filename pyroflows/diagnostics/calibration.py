"""Simulation-based calibration of amortised posteriors: ranks, their band, coverage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.diagnostics.simulation import Simulations, simulate
from pyroflows.errors import DataError, ShapeError
from pyroflows.guides import AutoAmortizedFlow
from pyroflows.numerics import forked_rng

#: What the ranks of the density are called among those of the latents.
DENSITY = "density"
#: Simulations of uniform ranks behind a band.
NULL_DRAWS = 2_000
#: Posterior draws of so many observations are made at once.
CHUNK = 500


@dataclass
class SBC:
    r"""Ranks of true values among posterior draws; for a right posterior they are uniform.

    A quantity passes where the empirical distribution of its ranks lies in a band that uniform
    ranks leave anywhere with probability ``error`` divided by the number of quantities: so all of
    them pass for a right posterior with probability ``1 - error`` or more.

    Attributes
    ----------
    ranks
        Integers from 0 to ``draws``, one for each simulation, by quantity: a coordinate of a
        latent site, or ``"density"``, the guide's own density, whose ranks are those of the
        smallest credible region with the true value in it.
    draws
        Number of posterior draws of each simulation.
    error
        Probability of a false alarm.

    References
    ----------
    Talts, Betancourt, Simpson, Vehtari and Gelman, "Validating Bayesian inference algorithms with
    simulation-based calibration", 2018; Säilynoja, Bürkner and Vehtari, "Graphical test for
    discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample
    comparison", Statistics and Computing 2022.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> uniform = torch.randint(0, 100, (500,), generator=generator)
    >>> SBC({"z": uniform}, draws=99).passed
    True
    >>> SBC({"z": uniform // 2}, draws=99).passed
    False
    """

    ranks: Mapping[str, Tensor] = field(repr=False)
    draws: int
    error: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise ValueError(f"error: expected a probability in (0, 1), got {self.error}")
        for name, rank in self.ranks.items():
            if rank.dim() != 1 or not len(rank):
                raise ShapeError(
                    f"ranks of {name!r}: expected shape (simulations,), got {tuple(rank.shape)}"
                )
            if rank.min() < 0 or rank.max() > self.draws:
                raise DataError(f"ranks of {name!r}: expected integers from 0 to {self.draws}")

    @property
    def simulations(self) -> int:
        """Number of simulations."""
        return len(next(iter(self.ranks.values())))

    @property
    def p_values(self) -> dict[str, float]:
        """For each quantity, how often uniform ranks look at least as odd."""
        statistics = {n: self._statistic(self._below(rank)) for n, rank in self.ranks.items()}
        return {
            name: float((1 + (self._null <= statistic).sum()) / (1 + len(self._null)))
            for name, statistic in statistics.items()
        }

    @property
    def passed(self) -> bool:
        """Whether every quantity is inside its band."""
        return all(p > self.error / len(self.ranks) for p in self.p_values.values())

    def coverage(self, levels: Any = (0.5, 0.8, 0.9, 0.95)) -> dict[float, float]:
        """Share of true values inside the guide's smallest credible regions of these levels.

        Below its level where the guide is overconfident.
        """
        if DENSITY not in self.ranks:
            raise ValueError("coverage: expected ranks of the density, as pyroflows.sbc makes them")
        outside = 1 - (self.ranks[DENSITY].double() + 0.5) / (self.draws + 1)
        return {float(level): float((outside <= level).double().mean()) for level in levels}

    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points and the lower and upper end of the band of the ranks' empirical distribution."""
        from scipy.stats import binom

        points = self._points
        gamma = np.quantile(self._null, self.error / len(self.ranks))
        low = binom.ppf(gamma / 2, self.simulations, points) / self.simulations
        high = binom.ppf(1 - gamma / 2, self.simulations, points) / self.simulations
        return points, low, high

    def plot(self, ax: Any = None) -> Any:
        """Plot what the empirical distributions have over the uniform one, and the band."""
        from matplotlib import pyplot

        if ax is None:
            _, ax = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        points, low, high = self.band()
        ax.fill_between(points, low - points, high - points, color="0.85", label="band")
        for name, rank in self.ranks.items():
            ax.plot(points, self._below(rank) / self.simulations - points, label=name)
        ax.set(
            xlabel="rank / (draws + 1)", ylabel="share of ranks below, minus that of uniform ones"
        )
        ax.legend(frameon=False, fontsize="small", ncols=2)
        return ax

    def __str__(self) -> str:
        odd = {n: p for n, p in self.p_values.items() if not p > self.error / len(self.ranks)}
        verdict = "calibrated as far as can be seen" if not odd else "not calibrated"
        lines = [
            f"{verdict}: {self.simulations} simulations, {self.draws} draws each, "
            f"false alarms {self.error:.0%}"
        ]
        lines += [f"  {name}: p = {p:.4f}" for name, p in odd.items()]
        if DENSITY in self.ranks:
            covered = ", ".join(
                f"{share:.1%} of {level:.0%}" for level, share in self.coverage().items()
            )
            lines.append(f"  coverage: {covered}")
        return "\n".join(lines)

    # --- the band -----------------------------------------------------------------------------

    @property
    def _step(self) -> int:
        """Ranks between the points of comparison, of which there are at most a hundred."""
        return max(1, self.draws // 100)

    @cached_property
    def _points(self) -> np.ndarray:
        """Values of the uniform distribution where the others are compared with it."""
        return np.arange(1, self.draws + 1, self._step) / (self.draws + 1)

    def _below(self, ranks: Tensor) -> np.ndarray:
        """How many ranks are below each point."""
        counts = np.bincount(ranks.numpy(), minlength=self.draws + 1)
        return counts.cumsum()[: self.draws : self._step]

    @cached_property
    def _tails(self) -> np.ndarray:
        """Two-sided binomial tail probability of each count at each point."""
        from scipy.stats import binom

        counts = np.arange(self.simulations + 1)[:, None]
        below = binom.cdf(counts, self.simulations, self._points)
        above = binom.sf(counts - 1, self.simulations, self._points)
        return 2 * np.minimum(below, above)

    def _statistic(self, below: np.ndarray) -> np.ndarray:
        """The smallest tail probability over the points, from counts ``(*batch, points)``."""
        return self._tails[below, np.arange(len(self._points))].min(-1)

    @cached_property
    def _null(self) -> np.ndarray:
        """Statistics of uniform ranks."""
        generator = np.random.default_rng(0)
        share = np.full(self.draws + 1, 1 / (self.draws + 1))
        counts = generator.multinomial(self.simulations, share, NULL_DRAWS)
        return self._statistic(counts.cumsum(-1)[:, : self.draws : self._step])


def sbc(
    guide: AutoAmortizedFlow,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    simulations: int | Simulations = 1000,
    draws: int = 99,
    error: float = 0.05,
    seed: int | None = None,
) -> SBC:
    """Simulation-based calibration of an amortised guide.

    Draws latents and data from the model, asks the guide for its posterior of each data set, and
    ranks the true values among draws of it. A guide that is wrong on average over the prior is
    found; one that is wrong at some observations and right at most is not: see `local_c2st`.

    Parameters
    ----------
    guide
        An `AutoAmortizedFlow` whose latents are all global and amortised.
    *args
        The model's arguments.
    model_kwargs
        The model's keyword arguments.
    simulations
        Their number, or simulations that the guide has not been trained on.
    draws
        Posterior draws of each.
    error
        Probability that a right posterior does not pass.
    seed
        Seed of simulations and draws; the global random state is left alone when it is given.

    Returns
    -------
    SBC
        Ranks, ``passed``, ``coverage()``, ``plot()``; ``print`` it.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 0.5))
    >>> guide = pf.AutoAmortizedFlow(model, observed=["y"])
    >>> fit = pf.fit_npe(guide, simulations=500, steps=5, seed=0)
    >>> pf.sbc(guide, simulations=300, seed=0).passed  # hardly trained
    False
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    kwargs = dict(model_kwargs or {})
    with torch.no_grad(), forked_rng(seed) if seed is not None else nullcontext():
        truth, contexts = held_out(guide, simulations, args, kwargs)
        reading = guide.read(*args, **kwargs)
        ranks: dict[str, list[Tensor]] = {}
        for u, context in zip(truth.split(CHUNK), contexts.split(CHUNK), strict=True):
            q = guide.flow()(context)
            drawn, log_q = q.rsample_and_log_prob((draws,))
            found = {DENSITY: (log_q < q.log_prob(u)).sum(0)}
            true_values, values = guide.unpack(u, reading), guide.unpack(drawn, reading)
            for site, value in values.items():
                below = (value < true_values[site]).sum(0).reshape(len(u), -1)
                one = below.shape[1] == 1
                found.update(
                    {site if one else f"{site}[{i}]": column for i, column in enumerate(below.T)}
                )
            for name, rank in found.items():
                ranks.setdefault(name, []).append(rank)
    return SBC({name: torch.cat(parts).cpu() for name, parts in ranks.items()}, draws, error)


def held_out(
    guide: AutoAmortizedFlow,
    simulations: int | Simulations,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Unconstrained true values of simulations, and the contexts of their data."""
    if not isinstance(guide, AutoAmortizedFlow):
        raise TypeError(f"guide: expected an AutoAmortizedFlow, got {type(guide).__name__}")
    reading = guide.read(*args, **kwargs)
    sites = [*guide.latent_sites, *guide.data_encoder().sites]
    if not isinstance(simulations, Simulations):
        simulations = simulate(
            guide.original_model, *args, sites=sites, count=simulations, model_kwargs=kwargs
        )
    u = guide.pack(simulations.values, reading)
    return u, guide.encode(simulations.values, *args, **kwargs)
