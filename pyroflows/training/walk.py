"""Short chains from a guide's draws, to see whether the posterior goes on where the guide ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.guides.default import DENSE
from pyroflows.training.density import Density

#: Transitions of a chain, and the leapfrog steps of one.
TRANSITIONS, LEAPFROGS = 8, 8
#: Shortest and longest step, in deviations of the guide; each transition of each chain draws one.
STEPS = (0.05, 0.5)


@torch.no_grad()
def walk(density: Density, chains: int) -> Tensor:
    """Ends ``(chains, D)`` of Hamiltonian chains of the posterior that start at the guide's draws.

    Were the draws the posterior's, so would be the ends. Where the guide lacks a part of the
    posterior that hangs together with the rest, some chains end there.

    References
    ----------
    Neal, "MCMC using Hamiltonian dynamics", Handbook of Markov chain Monte Carlo, 2011.
    """
    points, _ = density.draw_guide(max(chains, 2 * min(density.guide.latent_dim, DENSE)))
    stretch, pull = _metric(points)
    points = points[:chains]
    log_p, scores = density(points)
    for _ in range(TRANSITIONS):
        low, high = map(math.log, STEPS)
        size = (low + (high - low) * torch.rand_like(points[:, :1])).exp()
        momentum = torch.randn_like(points)
        there, g, p = points, scores, momentum
        for _ in range(LEAPFROGS):
            p = p + size / 2 * pull(g)
            there = there + size * stretch(p)
            new_log_p, g = density(there)
            p = p + size / 2 * pull(g)
        gain = new_log_p - log_p - (p.square() - momentum.square()).sum(-1) / 2
        moved = (torch.rand_like(gain).log() < gain) & there.isfinite().all(-1)
        points = torch.where(moved.unsqueeze(-1), there, points)
        scores = torch.where(moved.unsqueeze(-1), g, scores)
        log_p = torch.where(moved, new_log_p, log_p)
    return points


def _metric(draws: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The products with a factor of the draws' covariance and with its transpose.

    Of many latents the deviations alone.
    """
    if draws.shape[-1] > DENSE:
        deviation = draws.std(0)
        return deviation.mul, deviation.mul
    covariance = draws.mT.cov().reshape(2 * draws.shape[-1:])
    least = torch.finfo(draws.dtype).eps ** 0.5 * covariance.diagonal().diag()
    factor = torch.linalg.cholesky(covariance + least)
    return lambda p: p @ factor.mT, lambda g: g @ factor
