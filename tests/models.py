"""Pyro models with known posteriors, and guides set to them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyroflows as pf

COUNTS = torch.tensor([2.0, 4.0, 1.0, 3.0, 3.0])
SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOL_ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def gamma_poisson(y: Tensor) -> None:
    """One positive latent; its posterior is Gamma(3 + sum y, 2 + n)."""
    rate = pyro.sample("rate", dist.Gamma(y.new_tensor(3.0), y.new_tensor(2.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def gamma_poisson_evidence(y: Tensor) -> float:
    """Log evidence in nats, in closed form."""
    y = y.double()
    a, b, n, total = 3.0, 2.0, len(y), float(y.sum())
    return (
        a * math.log(b)
        - math.lgamma(a)
        + math.lgamma(a + total)
        - (a + total) * math.log(b + n)
        - float(torch.lgamma(y + 1).sum())
    )


CORRELATED = torch.tensor([[1.0, 0.7], [0.7, 1.0]])


def gaussian(y: Tensor) -> None:
    """A mean of two correlated columns; its posterior is normal."""
    zero, covariance = y.new_zeros(2), CORRELATED.to(y)
    mean = pyro.sample("mean", dist.Normal(zero, 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(mean, covariance), obs=y)


def gaussian_data(rows: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(CORRELATED.double())
    return (torch.tensor([0.5, -0.5]) + noise @ factor.T).to(dtype)


def gaussian_posterior(y: Tensor) -> dist.MultivariateNormal:
    y = y.double()
    precision = torch.linalg.inv(CORRELATED.double())
    covariance = torch.linalg.inv(torch.eye(2).double() + len(y) * precision)
    return dist.MultivariateNormal(covariance @ precision @ y.sum(0), covariance)


def gaussian_evidence(y: Tensor) -> float:
    """Bayes' theorem at the origin: prior times likelihood over posterior."""
    y = y.double()
    zero = torch.zeros(2).double()
    likelihood = dist.MultivariateNormal(zero, CORRELATED.double()).log_prob(y).sum()
    prior = dist.Normal(zero, 1.0).log_prob(zero).sum()
    return float(prior + likelihood - gaussian_posterior(y).log_prob(zero))


@torch.no_grad()
def set_to_normal(guide: pf.AutoFlow, posterior: dist.MultivariateNormal) -> pf.AutoFlow:
    """Make the guide's default flow that normal distribution, by its affine parts alone."""
    transform = guide.flow.transform
    transform.standardization.set_(posterior.loc, 1.0)
    factor = posterior.scale_tril
    diagonal = factor.diagonal()
    last = transform.layers[-1]
    last.factors.copy_((factor / diagonal).tril(-1))
    last.log_diagonal.copy_(diagonal.log())
    return guide


def exact_gaussian_guide(y: Tensor) -> pf.AutoFlow:
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    return set_to_normal(guide, gaussian_posterior(y))


def eight_schools(errors: Tensor, y: Tensor | None = None) -> None:
    """Non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(errors)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, errors), obs=y)


MIXTURE_DATA = torch.tensor([-2.1, -1.4, -1.9, 1.2, 2.3])


def mixture(y: Tensor) -> None:
    """Two normals with unknown share and means; memberships are enumerated."""
    share = pyro.sample("share", dist.Beta(y.new_tensor(2.0), y.new_tensor(2.0)))
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        part = pyro.sample("part", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        mean = torch.where(part == 1, loc[..., 1], loc[..., 0])
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def mixture_log_joint(values: dict[str, Tensor], y: Tensor) -> Tensor:
    """With the memberships summed out by hand, ``(S,)``; without the Jacobian."""
    share, loc = values["share"], values["loc"]
    prior = dist.Beta(2.0, 2.0).log_prob(share) + dist.Normal(0.0, 3.0).log_prob(loc).sum(-1)
    parts = dist.Normal(loc.unsqueeze(-2), 1.0).log_prob(y.unsqueeze(-1))
    weights = torch.stack([(1 - share).log(), share.log()], -1).unsqueeze(-2)
    return prior + (parts + weights).logsumexp(-1).sum(-1)
