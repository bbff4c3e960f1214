"""Gaussians close to a posterior, found from many starts before any flow is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.guides import AutoFlow
from pyroflows.guides.default import DENSE
from pyroflows.layers import Whitening
from pyroflows.numerics import ascend, batch_and_match

#: Draws of one step of matching, and of a comparison.
DRAWS, LOOK = 64, 640
#: Latents evaluated at once, so that memory does not grow with the number of starts.
CHUNK = 1024
#: Iterations of the ascent, and how many points of each way are tried.
ASCENT, POINTS = 100, 6
#: Deviation of the draws around a point whose curvature is still unknown.
NEAR = 0.1
#: Steps of matching, after twenty of which most posteriors are matched.
MATCHING = 60
#: Standard deviation of the log weights below which a Gaussian is as good as exact, in nats.
EXACT = 0.03
#: Differences of estimated lower bounds below this say nothing, in nats.
NOISE = 0.05
#: Where the posterior is so many times denser than the guide, the guide does not see it.
UNSEEN = 20.0
#: Mass that fewer effective draws of a Gaussian show is a large weight in its own tail.
SEEN_BY = 5
#: Starts that end within so many deviations of a better one are the same mode.
SAME = 5.0


class Density:
    """The model's log density over unconstrained latents, with scores, in float64 on the CPU."""

    def __init__(self, guide: AutoFlow, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``(...)`` and gradients ``(..., D)``; minus infinity where undefined."""
        parts = [self._chunk(part) for part in latents.flatten(0, -2).split(CHUNK)]
        log_p, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_p.reshape(latents.shape[:-1]), scores.reshape(latents.shape)

    def _chunk(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        flow = self.guide.flow
        with torch.enable_grad():
            z = latents.to(flow.device, flow.dtype).requires_grad_()
            log_p = self.guide.log_joint(z, *self.args, **self.kwargs)
            (scores,) = torch.autograd.grad(log_p.sum(), z)
        log_p, scores = log_p.detach().double().cpu(), scores.double().cpu()
        usable = log_p.isfinite() & scores.isfinite().all(-1)
        return (
            torch.where(usable, log_p, -math.inf),
            torch.where(usable.unsqueeze(-1), scores, 0.0),
        )

    @torch.no_grad()
    def is_random(self) -> bool:
        """Whether two scores of the same draw differ: minibatches, or sites the model samples."""
        latents, _ = self.draw_guide(2)
        first, again = self(latents)[0], self(latents)[0]
        return not torch.allclose(first, again, rtol=1e-5, atol=1e-3, equal_nan=True)

    @torch.no_grad()
    def draw_guide(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``(S, D)`` of the guide and their log densities ``(S,)``."""
        q = self.guide.get_posterior(*self.args, **self.kwargs)
        latents, log_q = q.rsample_and_log_prob((draws,))
        return latents.double().cpu(), log_q.double().cpu()

    @torch.no_grad()
    def score_guide(self, latents: Tensor) -> Tensor:
        """Log densities under the guide of latents ``(..., D)``."""
        flow = self.guide.flow
        q = self.guide.get_posterior(*self.args, **self.kwargs)
        return q.log_prob(latents.to(flow.device, flow.dtype)).double().cpu()


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
        near = NEAR**2 * torch.eye(block, dtype=points.dtype)
        covariance = near.expand(count, size // block, block, block)
        return cls(points, covariance, torch.full((count,), -math.inf, dtype=points.dtype))

    def _blocks(self, vectors: Tensor) -> Tensor:
        """``(K, S, D)`` to ``(K, blocks, S, d)``."""
        return vectors.unflatten(-1, self.covariance.shape[1:3]).transpose(1, 2)

    def draw(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``(K, S, D)`` and their log densities ``(K, S)``."""
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        count, size = self.loc.shape
        noise = torch.randn(count, draws, size, dtype=self.loc.dtype)
        constant = factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        constant = constant + 0.5 * size * math.log(2 * math.pi)
        log_q = -0.5 * noise.square().sum(-1) - constant.unsqueeze(-1)
        # A singular covariance has no density: nothing of it is used.
        log_q = torch.where((failed == 0).all(-1, keepdim=True), log_q, math.nan)
        away = (self._blocks(noise) @ factor.mT).transpose(1, 2).flatten(-2)
        return self.loc.unsqueeze(-2) + away, log_q

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
        return Gaussians(loc.flatten(1), covariance, torch.full_like(self.elbo, -math.inf))

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


def _lower_bound(log_weights: Tensor) -> Tensor:
    """Means ``(K,)`` of the finite ones ``(K, S)``, which must be nine in ten."""
    usable = log_weights.isfinite()
    total = torch.where(usable, log_weights, 0.0).sum(-1)
    share = usable.double().mean(-1)
    mean = total / usable.sum(-1).clamp_min(1)
    return torch.where(share >= 0.9, mean, -math.inf)


def starting_points(guide: AutoFlow, count: int) -> Tensor:
    """The guide's own start, and random ones: from the prior, and uniform between -2 and 2."""
    own = guide.flow.transform.standardization.loc.detach().double().cpu()
    points = own + 4 * torch.rand(count, len(own), dtype=own.dtype) - 2
    points[0] = own
    half = count // 2
    sites: Any = guide.prototype_trace
    place = 0
    for name, site in sites.iter_stochastic_nodes():
        size = math.prod(guide.latent_shapes[name])
        try:
            prior = biject_to(site["fn"].support).inv(site["fn"].sample((half,)))
        except NotImplementedError:  # ImproperUniform
            prior = None
        if prior is not None and half and prior.isfinite().all():
            points[count - half :, place : place + size] = prior.reshape(half, size).to(points)
        place += size
    return points


@torch.no_grad()
def find_start(density: Density, count: int) -> Gaussians:
    """Set the guide's standardization to the best Gaussian found, unless the guide is better.

    Returns all that were found, the best first.
    """
    gaussians = find_gaussians(density, starting_points(density.guide, count))
    standardization = density.guide.flow.transform.standardization
    before = copy.deepcopy(standardization.state_dict())
    elbo = _guide_lower_bound(density)
    loc, covariance = gaussians.loc[0], gaussians.covariance[0]
    if isinstance(standardization, Whitening) and len(covariance) == 1:
        standardization.set_covariance_(loc, covariance[0])
    else:
        standardization.set_(loc, covariance.diagonal(dim1=-2, dim2=-1).flatten().sqrt())
    if not _guide_lower_bound(density) > elbo + NOISE:
        standardization.load_state_dict(before)
    return gaussians


def _guide_lower_bound(density: Density) -> float:
    latents, log_q = density.draw_guide(LOOK)
    return _lower_bound((density(latents)[0] - log_q)[None]).item()


@torch.no_grad()
def missed_mass(density: Density, gaussians: Gaussians, log_evidence: float) -> float:
    r"""Mass at the Gaussians that the guide hardly draws from, as a share of what it does cover.

    .. math:: \sum_k E_{u \sim g_k}\left[\frac{p(x, u)}{Z g_k(u)}
        1\{p(x, u) > 20 Z q(u)\}\right]

    with the guide's own estimate :math:`Z` of the evidence. Weights of the guide's draws cannot see
    this mass. A Gaussian counts with five effective draws there: one alone, far out in a tail, may
    stand for a tenth of the posterior in one run and for nothing in the next.
    """
    z, log_g = gaussians.draw(LOOK)
    log_p = density(z)[0] - log_evidence
    unseen = log_p > density.score_guide(z) + math.log(UNSEEN)
    share = torch.where(unseen & log_g.isfinite(), (log_p - log_g).exp(), 0.0)
    total, squares = share.sum(-1), share.square().sum(-1)
    return torch.where(total.square() >= SEEN_BY * squares, share.mean(-1), 0.0).sum().item()


def find_gaussians(density: Density, points: Tensor, draws: int = DRAWS) -> Gaussians:
    """Gaussians matched to the density, each of another mode, the best first.

    From every point an L-BFGS ascent to a mode; on its way the point around which a Gaussian has
    the best evidence lower bound, as densities of hierarchical models have their mode far from
    their mass; from there batch-and-match.
    """
    path = list(ascend(density, points, ASCENT))
    # Early points lie close in time and far in space.
    chosen = torch.logspace(0, math.log10(len(path)), POINTS).round().int().unique() - 1
    nearby = [_around(density, path[i], draws) for i in chosen.tolist()]
    best = nearby[0]
    for gaussians in nearby[1:]:
        best = _where(gaussians.elbo > best.elbo, gaussians, best)
    modes = _match(density, _distinct(best, most=6 if points.shape[-1] <= 100 else 2), draws)
    return _distinct(modes, most=len(modes.loc))


def _around(density: Density, points: Tensor, draws: int) -> Gaussians:
    """Gaussians that match the scores near points."""
    first = Gaussians.around(points)
    z, _ = first.draw(draws // 2)
    log_p, scores = density(z)
    found = first.matched(z, scores, log_p.isfinite(), 1e6)
    z, log_q = found.draw(draws // 2)
    return Gaussians(found.loc, found.covariance, _lower_bound(density(z)[0] - log_q))


def _distinct(gaussians: Gaussians, most: int) -> Gaussians:
    """The best of each mode, the best first."""
    kept: list[int] = []
    for i in gaussians.elbo.argsort(descending=True).tolist():
        apart = all(_distance(gaussians, i, k) > SAME for k in kept)
        if gaussians.elbo[i].isfinite() and apart and len(kept) < most:
            kept.append(i)
    return gaussians[kept or [0]]


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
    first = best = now
    for step in range(MATCHING):
        z, log_q = now.draw(draws)
        log_p, scores = density(z)
        gap = log_p - log_q
        now = Gaussians(now.loc, now.covariance, _lower_bound(gap))
        best = _where(now.elbo > best.elbo, now, best)
        usable = gap.isfinite()
        # Where draws fail, go back to the best and approach again, with smaller steps.
        now = _where(now.elbo.isfinite(), now, best)
        if usable.all() and gap.std(-1).max() < EXACT:
            break
        now = now.matched(z, scores, usable, draws * now.covariance.shape[-1] / (step + 1))
    tried = []
    for gaussians in (now, best, first):
        z, log_q = gaussians.draw(10 * draws)
        elbo = _lower_bound(density(z)[0] - log_q)
        tried.append(Gaussians(gaussians.loc, gaussians.covariance, elbo))
    result = tried[0]
    for gaussians in tried[1:]:
        # The last has seen the most scores: noise is no reason to leave it.
        result = _where(gaussians.elbo > result.elbo + NOISE, gaussians, result)
    return result
