"""Seven more models, on simulated data and a table of scikit-learn, that no default was tuned on.

Their truth is a long run of many chains, see `tests.benchmarks.vi.truths`.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from sklearn import datasets
from torch import Tensor

from tests.benchmarks.vi.posterior import Draws, Posterior, Truth, stored_truths


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same in every precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(make: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Simulated data: drawn in float64 from one seed, given in the default dtype."""

    def load() -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            arrays = make()
        default = torch.get_default_dtype()
        return tuple(a.to(default) if a.is_floating_point() else a for a in arrays)

    return load


# --- logistic regression ----------------------------------------------------------------------


def logistic(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    logits = intercept.unsqueeze(-1) + beta @ x.T
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def cancer_data() -> tuple[Tensor, ...]:
    """Thirty standardised measurements, collinear ones among them."""
    table, label = datasets.load_breast_cancer(return_X_y=True)
    x = torch.as_tensor(table, dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0), torch.as_tensor(label).double()


# --- counts with overdispersion ---------------------------------------------------------------


def overdispersed(x: Tensor, y: Tensor) -> None:
    """Poisson regression with a normal effect of each of 40 rows, non-centred."""
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    log_rate = beta @ x.T + sigma.unsqueeze(-1) * effect
    pyro.sample("y", dist.Poisson(log_rate.exp()).to_event(1), obs=y)


def count_data() -> tuple[Tensor, ...]:
    x = torch.cat([torch.ones(40, 1).double(), noise(40, 2, seed=1)], -1)
    log_rate = x @ torch.tensor([1.0, 0.5, -0.7]).double() + 0.6 * noise(40, seed=2)
    return x, torch.poisson(log_rate.exp())


# --- varying intercepts -----------------------------------------------------------------------

COUNTIES = 15


def intercepts(county: Tensor, floor: Tensor, y: Tensor) -> None:
    """Radon-like: an intercept for each of 15 counties, of unequal sizes, and one slope."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([COUNTIES]).to_event(1))
    level = mu.unsqueeze(-1) + tau.unsqueeze(-1) * z
    mean = level[..., county] + slope.unsqueeze(-1) * floor
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def county_data() -> tuple[Tensor, ...]:
    sizes = torch.tensor([1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8, 10, 15, 20, 36])
    county = torch.arange(COUNTIES).repeat_interleave(sizes)
    floor = (torch.rand(len(county)) < 0.3).double()
    level = 1.5 + 0.3 * noise(COUNTIES, seed=3)
    return county, floor, level[county] - 0.7 * floor + 0.8 * noise(len(county), seed=4)


# --- item response ----------------------------------------------------------------------------

PERSONS, ITEMS = 20, 10


def item_response(y: Tensor) -> None:
    """Two parameters for each of ten items, one ability for each of twenty persons."""
    ability = pyro.sample("ability", dist.Normal(0.0, 1.0).expand([PERSONS]).to_event(1))
    slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5).expand([ITEMS]).to_event(1))
    difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.5).expand([ITEMS]).to_event(1))
    gap = ability.unsqueeze(-1) - difficulty.unsqueeze(-2)
    logits = slope.unsqueeze(-2) * gap
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=y)


def answer_data() -> tuple[Tensor, ...]:
    slope, difficulty = (0.4 * noise(ITEMS, seed=5)).exp(), noise(ITEMS, seed=6)
    logits = slope * (noise(PERSONS, 1, seed=7) - difficulty)
    return ((torch.rand(PERSONS, ITEMS) < logits.sigmoid()).double(),)


# --- stochastic volatility --------------------------------------------------------------------


def autoregression(phi: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """From standard normal noise to a stationary series, by one product with powers of phi."""
    steps = torch.arange(z.shape[-1])
    lag = (steps.unsqueeze(-1) - steps).clamp(min=0)
    weights = (phi[..., None, None] ** lag).tril()
    first = (1 - phi**2).rsqrt().unsqueeze(-1)
    start = torch.cat([z[..., :1] * first, z[..., 1:]], -1)
    return sigma.unsqueeze(-1) * (weights @ start.unsqueeze(-1)).squeeze(-1)


def volatility(y: Tensor) -> None:
    """An autoregressive log variance of fifty returns, non-centred."""
    mu = pyro.sample("mu", dist.Normal(-1.0, 1.0))
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    log_variance = mu.unsqueeze(-1) + autoregression(phi, sigma, z)
    pyro.sample("y", dist.Normal(0.0, (log_variance / 2).exp()).to_event(1), obs=y)


def return_data() -> tuple[Tensor, ...]:
    h, steps = torch.zeros(50).double(), 0.3 * noise(50, seed=8)
    for t in range(1, 50):
        h[t] = 0.95 * h[t - 1] + steps[t]
    return ((-0.5 + h / 2).exp() * noise(50, seed=9),)


# --- correlations -----------------------------------------------------------------------------


def correlated(y: Tensor) -> None:
    """Mean, scales and correlations of four variables."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0).expand([4]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(3.0).expand([4]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(4, torch.tensor(2.0)))
    with pyro.plate("rows", len(y)):
        scale_tril = scale.unsqueeze(-1) * factor
        pyro.sample("y", dist.MultivariateNormal(mean, scale_tril=scale_tril), obs=y)


def correlated_data() -> tuple[Tensor, ...]:
    mixing = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.3, 0, 0], [-0.5, 0.5, 1, 0], [0, 0.2, 0.4, 2]])
    return (noise(30, 4, seed=10) @ mixing.double().T + 1.0,)


def with_correlations(draws: Draws) -> Draws:
    factor = draws["factor"]
    matrix = factor @ factor.mT
    below = torch.tril_indices(4, 4, -1)
    return {
        "mean": draws["mean"],
        "scale": draws["scale"],
        "correlation": matrix[..., below[0], below[1]],
    }


# --- ordered categories -----------------------------------------------------------------------


def ordered(x: Tensor, y: Tensor) -> None:
    """Ordered logistic regression whose cut points come from Dirichlet shares at zero."""
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(5)))
    cut = share.cumsum(-1)[..., :-1].clamp(1e-6, 1 - 1e-6).logit()
    rows = dist.OrderedLogistic(beta @ x.T, cut.unsqueeze(-2))
    pyro.sample("y", rows.to_event(1), obs=y)


def grade_data() -> tuple[Tensor, ...]:
    x = noise(80, 2, seed=11)
    score = x @ torch.tensor([1.0, -0.5]).double() + torch.rand(80).double().logit()
    return x, torch.bucketize(score, torch.tensor([-2.0, -0.5, 0.5, 2.5]).double())


# --- the table --------------------------------------------------------------------------------


def truth_of(name: str) -> Truth:
    """Centre, spread and evidence of the long run."""
    entry = stored_truths()[name]
    return Truth(
        entry["centre"], entry["spread"], entry["log_evidence"], entry["log_evidence_error"]
    )


def _posterior(
    name: str,
    model: Callable[..., None],
    data: Callable[[], tuple[Tensor, ...]],
    derive: Callable[[Draws], Draws] = dict,
) -> Posterior:
    return Posterior(name, model, seeded(data), lambda: truth_of(name), derive)


POSTERIORS = [
    _posterior("logistic", logistic, cancer_data),
    _posterior("overdispersed", overdispersed, count_data),
    _posterior("intercepts", intercepts, county_data),
    _posterior("item_response", item_response, answer_data),
    _posterior("volatility", volatility, return_data),
    _posterior("correlated", correlated, correlated_data, with_correlations),
    _posterior("ordered", ordered, grade_data),
]
