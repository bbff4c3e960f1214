"""Correlations of many latents: a Gaussian of low rank plus diagonal, from a diagonal one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.numerics import low_rank_match
from pyroflows.training.density import Density
from pyroflows.training.gaussians import LOOK, NOISE, Gaussians, lower_bound
from pyroflows.transforms import LowRankAffineTransform

#: Draws of one round of matching; how many rounds, and how many may come without a rise.
DRAWS, ROUNDS, IDLE = 512, 12, 2


@dataclass(frozen=True)
class LowRankGaussian:
    """A normal distribution, see `pyroflows.layers.LowRankWhitening`.

    Attributes
    ----------
    loc, scale
        Shape ``(D,)``.
    basis
        Orthonormal columns, shape ``(D, rank)``.
    variance
        Along the columns, in units of the scale, shape ``(rank,)``.
    """

    loc: Tensor
    scale: Tensor
    basis: Tensor
    variance: Tensor

    def draw(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``(S, D)`` and their log densities ``(S,)``."""
        noise = torch.randn(draws, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        stretch = self.variance.sqrt()
        transform = LowRankAffineTransform(self.scale, self.loc, self.basis, stretch)
        z, ladj = transform.call_and_ladj(noise)
        return z, -(noise.square() + math.log(2 * math.pi)).sum(-1) / 2 - ladj

    def matched(self, draws: Tensor, scores: Tensor, rank: int) -> LowRankGaussian:
        """One that matches the scores at the draws; itself where they overflow."""
        z, g = (draws - self.loc) / self.scale, scores * self.scale
        loc, scale, basis, variance = low_rank_match(z, g, rank)
        if not all(part.isfinite().all() for part in (loc, scale, basis, variance)):
            return self
        return LowRankGaussian(self.loc + self.scale * loc, self.scale * scale, basis, variance)


def correlate(density: Density, gaussians: Gaussians, rank: int) -> LowRankGaussian:
    """The best Gaussian of low rank plus diagonal found from the first, a diagonal one."""
    loc, scale = gaussians.loc[0], gaussians.covariance[0].flatten().sqrt()
    basis, variance = torch.eye(len(loc), rank).to(loc), torch.ones(rank).to(loc)
    best = LowRankGaussian(loc, scale, basis, variance)
    elbo, idle = gaussians.elbo[0].item(), 0
    for _ in range(ROUNDS):
        z, _ = best.draw(DRAWS)
        log_p, scores = density(z)
        usable = log_p.isfinite()
        if usable.sum() <= 2 * rank:
            break
        new = best.matched(z[usable], scores[usable], rank)
        z, log_q = new.draw(LOOK)
        now = lower_bound((density.value(z) - log_q)[None]).item()
        idle = 0 if now > elbo + NOISE else idle + 1
        if now > elbo:
            best, elbo = new, now
        if idle == IDLE:
            break
    return best
