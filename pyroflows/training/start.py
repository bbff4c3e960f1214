"""Where a guide starts: at the Gaussians that fit its posterior, before any flow is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.distributions import Modes
from pyroflows.flows import Flow
from pyroflows.guides import AutoFlow
from pyroflows.layers import LowRankWhitening, Whitening
from pyroflows.training.density import Density
from pyroflows.training.gaussians import (
    LOOK,
    NOISE,
    Gaussians,
    find_gaussians,
    lower_bound,
    mixture_weights,
    separated,
)
from pyroflows.training.low_rank import correlate
from pyroflows.training.walk import walk

#: Modes of a smaller weight are left out.
LEAST = 0.01
#: Where the posterior is so many times denser than the guide, the guide does not see it.
UNSEEN = 20.0
#: Short chains from the guide's draws, and how many more where one of them ends unseen.
CHAINS, MORE = 64, 192
#: Mass that fewer effective draws of a Gaussian show is a large weight in its own tail.
SEEN_BY = 5


def starting_points(guide: AutoFlow, count: int) -> Tensor:
    """The guide's own start, and random ones: from the prior, and uniform between -2 and 2."""
    own = guide.flow.transform.standardization.loc.detach().double().cpu()
    points = own + 4 * torch.rand(count, len(own), dtype=own.dtype, device=own.device) - 2
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
    flow = density.guide.flow
    _keep_if_better(density, lambda: _place(density, gaussians))
    if isinstance(flow.base, Modes) and len(gaussians.loc) > 1:
        weights = mixture_weights(density, gaussians)
        kept = (weights > LEAST) & separated(density, gaussians)
        if kept.sum() > 1:
            _keep_if_better(density, lambda: _place_modes(flow, gaussians[kept], weights[kept]))
    return gaussians


def _keep_if_better(density: Density, change: Callable[[], None]) -> None:
    """Change the guide's flow, and change it back unless the lower bound has risen."""
    flow = density.guide.flow
    before, elbo = copy.deepcopy(flow.state_dict()), _guide_lower_bound(density)
    change()
    if not _guide_lower_bound(density) > elbo + NOISE:
        flow.load_state_dict(before)


def _place(density: Density, gaussians: Gaussians) -> None:
    """Standardise by the first Gaussian."""
    standardization = density.guide.flow.transform.standardization
    loc, covariance = gaussians.loc[0], gaussians.covariance[0]
    if isinstance(standardization, Whitening) and len(covariance) == 1:
        standardization.set_covariance_(loc, covariance[0])
    elif isinstance(standardization, LowRankWhitening) and len(covariance) == len(loc):
        found = correlate(density, gaussians, standardization.rank)
        standardization.set_low_rank_(found.loc, found.scale, found.basis, found.variance)
    else:
        standardization.set_(loc, covariance.diagonal(dim1=-2, dim2=-1).flatten().sqrt())


def _place_modes(flow: Flow, gaussians: Gaussians, weights: Tensor) -> None:
    """Standardise by the moments of the mixture, and place its modes in these units."""
    standardization, base = flow.transform.standardization, cast("Modes", flow.base)
    weights = weights / weights.sum()
    mean = weights @ gaussians.loc
    away = gaussians.loc - mean
    covariance = gaussians.covariance.squeeze(1) + away.unsqueeze(-1) * away.unsqueeze(-2)
    covariance = torch.einsum("k,kij->ij", weights, covariance)
    cast("Whitening", standardization).set_covariance_(mean, covariance)
    whole = torch.linalg.cholesky(covariance)
    factor = torch.linalg.cholesky(gaussians.covariance.squeeze(1))
    base.set_(
        weights,
        torch.linalg.solve_triangular(whole, away.mT, upper=False).mT,
        torch.linalg.solve_triangular(whole, factor, upper=False),
    )


def _guide_lower_bound(density: Density) -> float:
    latents, log_q = density.draw_guide(LOOK)
    return lower_bound((density.value(latents) - log_q)[None]).item()


@torch.no_grad()
def missed_mass(density: Density, gaussians: Gaussians, log_evidence: float) -> float:
    r"""Mass where the guide hardly draws, as a share of what it does cover.

    Weights of the guide's draws cannot see this mass. The Gaussians of the starts see it as

    .. math:: \sum_k E_{u \sim g_k}\left[\frac{p(x, u)}{Z g_k(u)}
        1\{p(x, u) > 20 Z q(u)\}\right]

    with the guide's own estimate :math:`Z` of the evidence; each counts if five effective draws
    show it, for one alone, far out in a tail, may stand for a tenth of the posterior in one run and
    for nothing in the next. What hangs together with the guide's draws is seen by short chains from
    them (`walk`): the share that ends there. The larger of the two is given.
    """
    z, log_g = gaussians.draw(LOOK)
    log_p = density.value(z) - log_evidence
    mass = torch.where(_unseen(density, z, log_p) & log_g.isfinite(), (log_p - log_g).exp(), 0.0)
    shown = mass.sum(-1).square() >= SEEN_BY * mass.square().sum(-1)
    by_starts = torch.where(shown, mass.mean(-1), 0.0).sum().item()
    away = _ends_unseen(density, CHAINS, log_evidence)
    if away.any():
        away = torch.cat([away, _ends_unseen(density, MORE, log_evidence)])
    return max(by_starts, away.double().mean().item())


def _ends_unseen(density: Density, chains: int, log_evidence: float) -> Tensor:
    ends = walk(density, chains)
    return _unseen(density, ends, density.value(ends) - log_evidence)


def _unseen(density: Density, latents: Tensor, log_p: Tensor) -> Tensor:
    """Where the posterior is much denser than the guide."""
    return log_p > density.score_guide(latents) + math.log(UNSEEN)
