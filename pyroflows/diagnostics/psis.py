"""Pareto-smoothed importance sampling: whether to trust a guide, and the posterior regardless."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.diagnostics.predictions import isolated
from pyroflows.guides import AutoFlow

#: Draws whose log joint is evaluated at once, so that memory does not grow with their number.
CHUNK = 512
#: Fewer draws have too few large weights for a shape.
MIN_DRAWS = 100
#: Share of effective draws from which on all weigh about the same: k-hat then describes noise.
EQUAL = 0.99
#: Largest move of a mean by the weights, in deviations, and of the logarithm of a deviation, with
#: which unweighted draws will do; and the largest distance between the halves of the draws.
SHIFT, STRETCH, SPLIT = 0.1, 0.2, 0.25
#: Largest share of the posterior that may lie where only other starts of a fit have been: a share
#: e, however far away, moves a mean by at most sqrt(e) deviations.
MISSED = 0.05
#: Bootstrap replicates behind the interval of k-hat.
REPLICATES = 50


@dataclass(frozen=True)
class PSIS:
    r"""Importance weights of a guide's draws against the model's posterior, and their verdict.

    Attributes
    ----------
    k_hat
        Shape of the generalised Pareto distribution fitted to the largest weights; minus infinity
        where all are equal.
    k_hat_interval
        5% and 95% quantiles of its bootstrap distribution.
    ess
        Effective number of draws, :math:`1 / \sum w^2` of the smoothed normalised weights.
    log_evidence, log_evidence_error
        Estimate of :math:`\log p(x)` in nats, and its standard error.
    elbo
        Mean log weight, in nats, of the draws where it is finite; below the log evidence by the
        Kullback-Leibler divergence.
    shift, stretch
        How far the weights move a mean, in standard deviations, and the logarithm of a standard
        deviation: the largest among all scalars of all sites.
    split
        Largest distance, in standard deviations, of a weighted mean between two halves of the
        draws.
    log_weights
        Smoothed, normalised logarithms of the weights, shape ``(num_samples,)``.
    latents
        The draws in unconstrained space, shape ``(num_samples, D)``.
    dropped
        Draws at which the model's density was infinite or not a number; they have weight zero.
    missed
        Mass that other starts of the fit, or short chains from the guide's draws, saw where the
        guide hardly draws, as a share of what it covers; None where nobody has looked, as weights
        alone cannot see it.

    References
    ----------
    Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 2024;
    Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?", ICML 2018.
    """

    k_hat: float
    k_hat_interval: tuple[float, float]
    ess: float
    log_evidence: float
    log_evidence_error: float
    elbo: float
    shift: float
    stretch: float
    split: float
    log_weights: Tensor = field(repr=False)
    latents: Tensor = field(repr=False)
    dropped: int
    unpack: Callable[[Tensor], dict[str, Tensor]] = field(repr=False)
    missed: float | None = None

    @property
    def num_samples(self) -> int:
        """Number of draws."""
        return len(self.log_weights)

    @property
    def threshold(self) -> float:
        """The largest k-hat at which this many draws give a reliable estimate."""
        return min(1 - 1 / math.log10(max(self.num_samples, 11)), 0.7)

    def figures(self) -> dict[str, Any]:
        """Verdict, advice and every number of the report, by name: for tables and files."""
        names = ("ess", "log_evidence", "log_evidence_error", "elbo", "shift", "stretch", "split")
        found = {
            "verdict": self.verdict,
            "advice": self._advice(),
            "k_hat": self.k_hat,
            "k_hat_interval": list(self.k_hat_interval),
            "num_samples": self.num_samples,
            **{name: getattr(self, name) for name in names},
            "dropped": self.dropped,
        }
        # Formats such as netCDF have no word for nothing.
        return found if self.missed is None else {**found, "missed": self.missed}

    def _advice(self) -> str:
        return {
            "good": "the draws can be used as they are",
            "use with weights": "take .resample(n) instead of the draws themselves",
            "do not trust": "; ".join(self._warnings()),
        }[self.verdict]

    @property
    def verdict(self) -> str:
        """One of "good", "use with weights" and "do not trust".

        "do not trust" where other starts saw mass that the guide misses, where the halves of the
        draws disagree, or where k-hat is above `threshold` and less than half of the draws are
        effective. "good" where at least half are and the weights change next to nothing, or where
        practically all are. k-hat alone is a warning: near-exact guides may show a large one.
        """
        if self._warnings():
            return "do not trust"
        if self.ess >= EQUAL * self.num_samples:
            return "good"
        steady = self.shift < SHIFT and self.stretch < STRETCH
        return "good" if self.ess >= 0.5 * self.num_samples and steady else "use with weights"

    def _warnings(self) -> list[str]:
        """Why not to trust the guide, even with weights."""
        found = []
        if self.missed is not None and not self.missed <= MISSED:
            share = self.missed / (1 + self.missed)
            found.append(
                f"about {share:.0%} of the posterior lies where the guide does not draw, as other "
                "starts or short chains from it have seen. Fit longer (budget=); for several modes "
                "give the flow a base that takes them, pyroflows.distributions.Modes"
            )
        if self.ess >= EQUAL * self.num_samples:
            return found
        if not self.k_hat < self.threshold and self.ess < 0.5 * self.num_samples:
            found.append(
                "a few draws carry most of the weight: fit longer (budget=), use a larger flow, or "
                "go on with NUTS in the guide's space (run_mcmc)"
            )
        if not self.split <= SPLIT:
            found.append(
                f"two halves of the draws differ by {self.split:.2f} deviations in a mean: the "
                "weights are too uneven for this number of draws"
            )
        return found

    def resample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draws of the reweighted posterior with replacement, ``{site: (num_samples, ...)}``."""
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        with isolated(seed):
            index = torch.multinomial(self.log_weights.exp(), num_samples, replacement=True)
        return self.unpack(self.latents[index])

    def __str__(self) -> str:
        low, high = self.k_hat_interval
        lines = [
            f"{self.verdict}: {self._advice()}",
            f"  k-hat          {self.k_hat:.2f} ({low:.2f} to {high:.2f}), "
            f"reliable below {self.threshold:.2f}",
            f"  effective      {self.ess:.0f} of {self.num_samples} draws",
            f"  weights move   means by up to {self.shift:.2f} deviations, deviations by up to "
            f"{math.expm1(self.stretch):.0%}; halves differ by {self.split:.2f}",
            f"  log evidence   {self.log_evidence:.3f} ± {self.log_evidence_error:.3f} nats "
            f"(ELBO {self.elbo:.3f})",
        ]
        if self.missed is not None:
            lines.append(f"  others see     {self.missed:.1%} beside what the guide covers")
        if self.dropped:
            lines.append(f"  dropped        {self.dropped} draws where the model is not a number")
        return "\n".join(lines)


def psis(
    guide: AutoFlow,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 10_000,
    seed: int | None = None,
) -> PSIS:
    """Compare a guide with the posterior that it stands for.

    Draws from the guide, weighs each by model over guide, smooths the largest weights and reports
    the Pareto shape k-hat with its spread, the effective number of draws and the evidence. k-hat of
    a small number of draws is noisy: the default number keeps its spread near a tenth. Weights see
    the posterior only where the guide draws: a mode that it misses altogether leaves no trace.

    Parameters
    ----------
    guide
        An `AutoFlow`.
    *args
        The model's arguments.
    model_kwargs
        The model's keyword arguments.
    num_samples
        Number of draws, at least 100.
    seed
        Seed of the draws; the global random state is left alone when it is given.

    Returns
    -------
    PSIS
        The report; ``print`` it.

    Raises
    ------
    ValueError
        For too few draws, or if the model has a finite density at none of them.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 0.1))
    >>> guide = pf.AutoFlow(model, init_loc_fn=pyro.infer.autoguide.init_to_mean, example_args=())
    >>> report = pf.psis(guide, seed=0)
    >>> report.verdict, round(report.log_evidence, 3)
    ('good', 0.0)
    """
    if num_samples < MIN_DRAWS:
        raise ValueError(f"num_samples: expected at least {MIN_DRAWS} draws, got {num_samples}")
    if not isinstance(guide, AutoFlow):
        raise TypeError(f"guide: expected an AutoFlow, got {type(guide).__name__}")
    kwargs = dict(model_kwargs or {})
    with torch.no_grad(), isolated(seed):
        latents, log_q = guide.get_posterior(*args, **kwargs).rsample_and_log_prob((num_samples,))
        log_p = torch.cat([guide.log_joint(z, *args, **kwargs) for z in latents.split(CHUNK)])
        again = guide.log_joint(latents[:2], *args, **kwargs)
    if not torch.allclose(again, log_p[:2], rtol=1e-5, atol=1e-3, equal_nan=True):
        warnings.warn(
            "the model scores the same draw differently each time (subsampled data, or sites that "
            "it draws itself): the weights carry that noise, and k-hat and evidence are not those "
            "of the posterior. Use all data; leave enumerated sites to AutoFlow, unblocked.",
            stacklevel=2,
        )
    return weigh(log_p, log_q, latents, guide.unpack)


def weigh(
    log_p: Tensor,
    log_q: Tensor,
    latents: Tensor,
    unpack: Callable[[Tensor], dict[str, Tensor]],
) -> PSIS:
    """The report on draws with log densities under model and guide, each of shape ``(S,)``."""
    raw = (log_p.double() - log_q.double()).cpu().numpy()
    usable = np.isfinite(raw)
    if not usable.any():
        raise ValueError(
            f"the model's density is zero or not a number at all {len(raw)} draws of the guide. "
            "Check the model's support, or fit the guide first."
        )
    finite = raw[usable]
    log_weights = np.full_like(raw, -np.inf)
    log_weights[usable], k_hat = smooth(finite)
    top = finite.max()
    relative = np.exp(np.where(usable, raw, -np.inf) - top)
    moved = moments_moved(unpack(latents), log_weights)
    generator = np.random.default_rng(0)
    replicates = [smooth(generator.choice(finite, len(finite)))[1] for _ in range(REPLICATES)]
    return PSIS(
        k_hat=k_hat,
        # No interpolation: replicates may be infinite.
        k_hat_interval=tuple(np.quantile(replicates, [0.05, 0.95], method="nearest").tolist()),
        ess=float(1 / np.exp(2 * log_weights).sum()),
        log_evidence=float(top + np.log(relative.mean())),
        log_evidence_error=float(relative.std() / relative.mean() / np.sqrt(len(raw))),
        elbo=float(finite.mean()),
        shift=moved[0],
        stretch=moved[1],
        split=moved[2],
        log_weights=torch.as_tensor(log_weights),
        latents=latents,
        dropped=int((~usable & ~np.isneginf(raw)).sum()),
        unpack=unpack,
    )


def moments_moved(values: dict[str, Tensor], log_weights: np.ndarray) -> tuple[float, float, float]:
    """How far weights move means and deviations, and halves of the draws lie apart.

    The largest of all scalars; infinite where draws with weight are not finite.
    """
    weights = np.exp(log_weights)
    used = weights > 0
    rows = np.concatenate(
        [v.detach().double().cpu().numpy().reshape(len(v), -1) for v in values.values()], 1
    )[used]
    weights = weights[used, None]
    if not np.isfinite(rows).all() or len(rows) < 4:
        return math.inf, math.inf, math.inf
    # What is the same in all draws, such as a corner of a Cholesky factor, has nothing to compare.
    rows = rows[:, np.ptp(rows, axis=0) > 1e-12 * np.abs(rows).max(0)]
    if not rows.shape[1]:
        return 0.0, 0.0, 0.0
    plain, mean = rows.mean(0), (weights * rows).sum(0)
    deviation = np.sqrt((weights * (rows - mean) ** 2).sum(0))
    halves = [(w * r).sum(0) / w.sum() for w, r in ((weights[i::2], rows[i::2]) for i in range(2))]
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.abs(mean - plain) / deviation
        stretch = np.abs(np.log(rows.std(0) / deviation))
        split = np.abs(halves[0] - halves[1]) / deviation
    return _largest(shift), _largest(stretch), _largest(split)


def _largest(values: np.ndarray) -> float:
    return float(np.nan_to_num(values, nan=np.inf).max())


def smooth(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed, normalised log weights and k-hat, by the ArviZ that is installed."""
    if len(log_weights) < MIN_DRAWS:
        return log_weights - np.logaddexp.reduce(log_weights), math.inf
    if np.ptp(log_weights) < 1e-3:
        # Equal up to rounding: no tail to fit.
        return np.full_like(log_weights, -np.log(len(log_weights))), -math.inf
    with np.errstate(over="ignore"):  # in ArviZ, for a long tail
        smoothed, k_hat = _psislw(log_weights)
    # Infinity where the tail is too short to fit: next to nothing carries all the weight.
    return np.asarray(smoothed), float(k_hat)


def _psislw(log_weights: np.ndarray) -> tuple[np.ndarray, Any]:
    try:
        from arviz import psislw
    except ImportError:
        from arviz_stats.base.array import array_stats

        # The 1.x line asks for log likelihoods left out, of which the weights are the inverse.
        return array_stats.psislw(-log_weights)
    return psislw(log_weights.copy())
