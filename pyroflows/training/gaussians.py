"""Gaussians close to a density, one for each of its modes, found from many starts at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.guides.default import DENSE
from pyroflows.numerics import ascend, batch_and_match
from pyroflows.training.density import Density

#: Draws of one step of matching, and of a comparison.
DRAWS, LOOK = 64, 640
#: Iterations of the ascent, and how many points of each way are tried.
ASCENT, POINTS = 100, 6
#: Deviation of the draws around a point whose curvature is still unknown.
NEAR = 0.1
#: Steps of matching at most; how many come before Gaussians that became one are merged, and over
#: how many the mean lower bound must rise.
MATCHING, MERGE, RISE = 60, 15, 10
#: Standard deviation of the log weights below which a Gaussian is as good as exact, in nats.
EXACT = 0.03
#: Differences of estimated lower bounds below this say nothing, in nats.
NOISE = 0.05
#: Modes are apart where the density between them is so much lower, in nats.
VALLEY = 3.0
#: Starts that end within so many deviations of a better one are the same mode.
SAME = 5.0


@dataclass(frozen=True)
class Gaussians:
    """Normal distributions of the latent vector, with their evidence lower bounds in nats.

    Attributes
    ----------
    loc
        Shape ``(K, D)``.
    covariance
        Of blocks of the vector that are independent of each other, shape ``(K, blocks, d, d)``:
        one block for dense covariances, ``D`` for diagonal ones.
    elbo
        Shape ``(K,)``; minus infinity where more than a tenth of the draws have no density.
    """

    loc: Tensor
    covariance: Tensor
    elbo: Tensor

    def __getitem__(self, index: Tensor | list[int]) -> Gaussians:
        return Gaussians(self.loc[index], self.covariance[index], self.elbo[index])

    @classmethod
    def around(cls, points: Tensor) -> Gaussians:
        """Narrow ones around points ``(K, D)``: dense, or diagonal of many latents."""
        count, size = points.shape
        block = size if size <= DENSE else 1
        near = NEAR**2 * torch.eye(block, dtype=points.dtype, device=points.device)
        covariance = near.expand(count, size // block, block, block)
        return cls(points, covariance, points.new_full((count,), -math.inf))

    def _blocks(self, vectors: Tensor) -> Tensor:
        """``(K, S, D)`` to ``(K, blocks, S, d)``."""
        return vectors.unflatten(-1, self.covariance.shape[1:3]).transpose(1, 2)

    def draw(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``(K, S, D)`` and their log densities ``(K, S)``."""
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        count, size = self.loc.shape
        noise = self.loc.new_empty(count, draws, size).normal_()
        constant = factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        constant = constant + 0.5 * size * math.log(2 * math.pi)
        log_q = -0.5 * noise.square().sum(-1) - constant.unsqueeze(-1)
        # A singular covariance has no density: nothing of it is used.
        log_q = torch.where((failed == 0).all(-1, keepdim=True), log_q, math.nan)
        away = (self._blocks(noise) @ factor.mT).transpose(1, 2).flatten(-2)
        return self.loc.unsqueeze(-2) + away, log_q

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log densities ``(K, S)`` of latents ``(S, D)``."""
        factor = torch.linalg.cholesky(self.covariance)
        away = self._blocks(latents - self.loc.unsqueeze(1))
        z = torch.linalg.solve_triangular(factor.mT, away, upper=True, left=False)
        constant = factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        constant = constant + 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)
        return -0.5 * z.square().sum((1, 3)) - constant.unsqueeze(-1)

    def matched(self, draws: Tensor, scores: Tensor, usable: Tensor, rate: float) -> Gaussians:
        """Updated by scores; draws that are not usable count as the mean of the others."""
        weights = usable.double() / usable.sum(-1, keepdim=True).clamp_min(1)
        centres = [(weights.unsqueeze(-1) * rows).sum(-2, keepdim=True) for rows in (draws, scores)]
        draws, scores = (
            self._blocks(torch.where(usable.unsqueeze(-1), rows, centre))
            for rows, centre in zip((draws, scores), centres, strict=True)
        )
        before = self._blocks(self.loc.unsqueeze(1)).squeeze(-2)
        loc, covariance = batch_and_match(before, self.covariance, draws, scores, rate)
        after = Gaussians(loc.flatten(1), covariance, torch.full_like(self.elbo, -math.inf))
        defined = after.loc.isfinite().all(-1) & covariance.isfinite().flatten(1).all(-1)
        return _where(defined, after, self)

    def spread(self, line: Tensor) -> Tensor:
        """Standard deviations ``(K,)`` along a unit vector."""
        parts = line.unflatten(-1, self.covariance.shape[1:3])
        return torch.einsum("bi,kbij,bj->k", parts, self.covariance, parts).sqrt()


def _where(keep: Tensor, a: Gaussians, b: Gaussians) -> Gaussians:
    return Gaussians(
        torch.where(keep[:, None], a.loc, b.loc),
        torch.where(keep[:, None, None, None], a.covariance, b.covariance),
        torch.where(keep, a.elbo, b.elbo),
    )


def lower_bound(log_weights: Tensor) -> Tensor:
    """Means ``(K,)`` of the finite ones ``(K, S)``, which must be nine in ten."""
    usable = log_weights.isfinite()
    total = torch.where(usable, log_weights, 0.0).sum(-1)
    share = usable.double().mean(-1)
    mean = total / usable.sum(-1).clamp_min(1)
    return torch.where(share >= 0.9, mean, -math.inf)


def find_gaussians(density: Density, points: Tensor, draws: int = DRAWS) -> Gaussians:
    """Gaussians matched to the density, each of another mode, the best first.

    From every point an L-BFGS ascent to a mode; on its way the point around which a Gaussian has
    the best evidence lower bound, as densities of hierarchical models have their mode far from
    their mass; from there batch-and-match.
    """
    path = list(ascend(density, points, ASCENT))
    # Early points lie close in time and far in space.
    chosen = torch.logspace(0, math.log10(len(path)), POINTS).round().int().unique() - 1
    # A Gaussian of few latents takes few scores.
    few = min(draws // 2, max(draws // 4, 2 * points.shape[-1]))
    nearby = [_around(density, path[i], few) for i in chosen.tolist()]
    best = nearby[0]
    for gaussians in nearby[1:]:
        best = _where(gaussians.elbo > best.elbo, gaussians, best)
    best = best[_distinct(best, most=6 if points.shape[-1] <= 100 else 2)]
    modes = _match(density, best, draws)
    return modes[_distinct(modes, most=len(modes.loc))]


def _around(density: Density, points: Tensor, draws: int) -> Gaussians:
    """Gaussians that match the scores near points."""
    first = Gaussians.around(points)
    z, _ = first.draw(draws)
    log_p, scores = density(z)
    found = first.matched(z, scores, log_p.isfinite(), 1e6)
    return _looked_at(density, found, draws)


def _distinct(gaussians: Gaussians, most: int) -> list[int]:
    """Which are the best of each mode, the best first."""
    kept: list[int] = []
    for i in gaussians.elbo.argsort(descending=True).tolist():
        apart = all(_distance(gaussians, i, k) > SAME for k in kept)
        if gaussians.elbo[i].isfinite() and apart and len(kept) < most:
            kept.append(i)
    return kept or [0]


def _distance(gaussians: Gaussians, i: int, k: int) -> float:
    """Between two means, in the larger standard deviation along the line between them."""
    line = gaussians.loc[i] - gaussians.loc[k]
    length = line.norm().item()
    if length == 0:
        return 0.0
    line = line / length
    return length / gaussians[[i, k]].spread(line).max().item()


def _match(density: Density, now: Gaussians, draws: int) -> Gaussians:
    """Match Gaussians to the density by its scores; the best that was seen of each."""
    best = now
    bounds: list[Tensor] = []
    for step in range(MATCHING):
        z, log_q = now.draw(draws)
        log_p, scores = density(z)
        gap = log_p - log_q
        now = Gaussians(now.loc, now.covariance, lower_bound(gap))
        bounds.append(now.elbo)
        best = _where(now.elbo > best.elbo, now, best)
        usable = gap.isfinite()
        # Where draws fail, go back to the best and approach again, with smaller steps.
        now = _where(now.elbo.isfinite(), now, best)
        if (usable.all() and gap.std(-1).max() < EXACT) or not _is_rising(bounds):
            break
        now = now.matched(z, scores, usable, draws * now.covariance.shape[-1] / (step + 1))
        if step == MERGE:
            kept = _distinct(best, most=len(best.loc))
            best, now = best[kept], now[kept]
            bounds = []
    # The last has seen the most scores: noise is no reason to leave it.
    last, best = (_looked_at(density, gaussians, 10 * draws) for gaussians in (now, best))
    return _where(best.elbo > last.elbo + NOISE, best, last)


def _looked_at(density: Density, gaussians: Gaussians, draws: int) -> Gaussians:
    """The same with lower bounds from so many new draws."""
    z, log_q = gaussians.draw(draws)
    elbo = lower_bound(density.value(z) - log_q)
    return Gaussians(gaussians.loc, gaussians.covariance, elbo)


def _is_rising(bounds: list[Tensor]) -> bool:
    """Whether the lower bounds ``(K,)`` of some Gaussian may still rise, by those so far."""
    if len(bounds) < 2 * RISE:
        return True
    before, now = torch.stack(bounds[-2 * RISE :]).unflatten(0, (2, RISE)).mean(1)
    return bool(((now - before > NOISE) | ~(now - before).isfinite()).any())


def separated(density: Density, gaussians: Gaussians) -> Tensor:
    """Which Gaussians ``(K,)`` have a valley of density between them and every better one.

    The neck of a funnel is no mode of its own: a flow bends one normal into it more easily.
    """
    loc = gaussians.loc
    share = torch.linspace(0, 1, 21, dtype=loc.dtype, device=loc.device)[:, None]
    kept = [0]
    for i in range(1, len(loc)):
        ways = [torch.lerp(loc[i], loc[k], share) for k in kept]
        heights = density.value(torch.stack(ways))
        ends = torch.minimum(heights[:, 0], heights[:, -1])
        if (ends - heights.amin(-1) > VALLEY).all():
            kept.append(i)
    return torch.tensor([i in kept for i in range(len(loc))], device=loc.device)


def mixture_weights(density: Density, gaussians: Gaussians) -> Tensor:
    """Weights ``(K,)`` of the Gaussians, by their draws and expectation maximisation.

    Minimises the divergence from the posterior to the mixture, where the Gaussians draw.
    """
    z, _ = gaussians.draw(LOOK)
    log_g = gaussians.log_prob(z.flatten(0, 1))
    # All draws together are draws of the mixture with equal weights.
    log_v = density.value(z).flatten() - (log_g.logsumexp(0) - math.log(len(log_g)))
    share = log_v.softmax(0)
    log_weights = log_g.new_full((len(log_g),), -math.log(len(log_g)))
    for _ in range(50):
        belongs = (log_g + log_weights.unsqueeze(-1)).softmax(0)
        log_weights = (belongs @ share).log()
    return log_weights.exp()
