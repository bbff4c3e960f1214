"""Targets on which guides fail, and conjugate models: answers in closed form or by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy import special, stats
from torch import Tensor

from tests.benchmarks.vi.posterior import LEVELS, Draws, Posterior, Truth


def named(site: str, values: list[float]) -> dict[str, float]:
    """Elements of a vector by Stan's names."""
    return {f"{site}[{i + 1}]": value for i, value in enumerate(values)}


# --- funnel -----------------------------------------------------------------------------------

FUNNEL = 100


def funnel() -> None:
    """Neal's: each of 99 coordinates is normal with variance exp(v)."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    width = (v / 2).exp().unsqueeze(-1).expand(*v.shape, FUNNEL - 1)
    pyro.sample("x", dist.Normal(0.0, width).to_event(1))


def funnel_truth() -> Truth:
    """By quantiles: the fourth moment of x is exp(18) times that of a normal."""
    # Hermite's rule for v, and a root search for the place where x has LEVELS[1] below it.
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    widths, weights = np.exp(1.5 * nodes), weights / weights.sum()
    spread = _root(lambda x: weights @ special.ndtr(x / widths) - LEVELS[1])
    size = FUNNEL - 1
    return Truth(
        {"v": 0.0, **named("x", [0.0] * size)},
        {"v": 3.0, **named("x", [spread] * size)},
        log_evidence=0.0,
        quantiles=True,
    )


def _root(f: Callable[[float], float]) -> float:
    from scipy.optimize import brentq

    return float(brentq(f, 0.0, 100.0))


# --- shapes in the plane ----------------------------------------------------------------------

MODES, SHARES = ((-5.0, -5.0), (5.0, 5.0)), (0.3, 0.7)


def two_modes() -> None:
    """Two standard normals, fourteen deviations apart, of unequal weight."""
    share = dist.Categorical(torch.tensor(SHARES))
    normals = dist.Normal(torch.tensor(MODES), 1.0).to_event(1)
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    pyro.factor("mixture", dist.MixtureSameFamily(share, normals).log_prob(x))


def two_modes_truth() -> Truth:
    mean = 5 * (SHARES[1] - SHARES[0])
    spread = math.sqrt(1 + 100 * SHARES[0] * SHARES[1])
    return Truth(named("x", [mean] * 2), named("x", [spread] * 2), log_evidence=0.0)


def banana() -> None:
    """A normal, bent along a parabola."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    pyro.sample("b", dist.Normal(0.5 * a**2, 0.5))


def banana_truth() -> Truth:
    # The square of a normal of variance 4 has mean 4 and variance 32.
    return Truth({"a": 0.0, "b": 2.0}, {"a": 2.0, "b": math.sqrt(0.25 + 8.0)}, log_evidence=0.0)


RADIUS, THICKNESS = 5.0, 0.3


def ring() -> None:
    """A circle of radius 5, 0.3 thick."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    pyro.factor("ring", -0.5 * ((x.norm(dim=-1) - RADIUS) / THICKNESS) ** 2)


def ring_truth() -> Truth:
    """The radius has a normal density times r; its cut at zero is sixteen deviations away."""
    second = (RADIUS**3 + 3 * RADIUS * THICKNESS**2) / RADIUS
    evidence = math.log(2 * math.pi * RADIUS * THICKNESS * math.sqrt(2 * math.pi))
    spread = math.sqrt(second / 2)
    return Truth(named("x", [0.0] * 2), named("x", [spread] * 2), log_evidence=evidence)


STUDENT = 10


def student() -> None:
    """Ten independent Student t with two degrees of freedom: no variance."""
    pyro.sample("x", dist.StudentT(2.0, 1.0, 2.0).expand([STUDENT]).to_event(1))


def student_truth() -> Truth:
    spread = 2.0 * float(stats.t(2).ppf(LEVELS[1]))
    centre = named("x", [1.0] * STUDENT)
    return Truth(centre, named("x", [spread] * STUDENT), log_evidence=0.0, quantiles=True)


# --- horseshoe --------------------------------------------------------------------------------

SPARSE = 1_000
#: Grids of the quadratures, over the logarithms of the common scale and of a local one. The
#: integrands are smooth and fall off to both sides: the plain sum converges faster than any power.
LOG_TAU, LOG_LAMBDA = (-8.0, 1.0, 100), (-22.0, 18.0, 250)


def horseshoe(y: Tensor) -> None:
    """Regression on an orthonormal design, in its coordinates: 2,001 latents, non-centred."""
    tau = pyro.sample("tau", dist.HalfCauchy(0.1))
    lam = pyro.sample("lam", dist.HalfCauchy(1.0).expand([len(y)]).to_event(1))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    beta = z * lam * tau.unsqueeze(-1)
    pyro.sample("y", dist.Normal(beta, 1.0).to_event(1), obs=y)


def horseshoe_data() -> tuple[Tensor]:
    """Twenty coefficients of 3 to 6 and else nothing, with standard noise."""
    generator = torch.Generator().manual_seed(0)
    beta = torch.zeros(SPARSE, dtype=torch.float64)
    beta[:20] = torch.linspace(3.0, 6.0, 20, dtype=torch.float64)
    y = beta + torch.randn(SPARSE, generator=generator, dtype=torch.float64)
    return (y.to(torch.get_default_dtype()),)


def with_beta(draws: Draws) -> Draws:
    beta = draws["z"] * draws["lam"] * draws["tau"].unsqueeze(-1)
    return {"beta": beta, "log_tau": draws["tau"].log()}


def horseshoe_truth(y: Tensor | None = None) -> Truth:
    """Given tau the coefficients are independent, and given lambda too they are normal.

    So the posterior is a quadrature over log tau of products of quadratures over log lambda.
    """
    y = (horseshoe_data()[0] if y is None else y).double()[:, None]
    log_lambda = torch.linspace(*LOG_LAMBDA, dtype=torch.float64)
    grid = torch.linspace(*LOG_TAU, dtype=torch.float64)
    log_prior = (dist.HalfCauchy(1.0).log_prob(log_lambda.exp()) + log_lambda).log_softmax(0)
    log_joint, means, seconds = [], [], []
    for log_tau in grid:
        variance = (2 * (log_lambda + log_tau)).exp()
        log_marginal = log_prior + dist.Normal(0.0, (1 + variance).sqrt()).log_prob(y)
        log_y = log_marginal.logsumexp(-1)
        weights = (log_marginal - log_y[:, None]).exp()
        shrink = variance / (1 + variance)
        mean = shrink * y
        log_joint.append(dist.HalfCauchy(0.1).log_prob(log_tau.exp()) + log_tau + log_y.sum())
        means.append((weights * mean).sum(-1))
        seconds.append((weights * (mean**2 + shrink)).sum(-1))
    log_tau_density = torch.stack(log_joint)
    step = (grid[1] - grid[0]).item()
    p = log_tau_density.softmax(0)
    mean, second = p @ torch.stack(means), p @ torch.stack(seconds)
    centre = (p @ grid).item()
    spread = (p @ (grid - centre) ** 2).sqrt().item()
    return Truth(
        {"log_tau": centre, **named("beta", mean.tolist())},
        {"log_tau": spread, **named("beta", (second - mean**2).sqrt().tolist())},
        log_evidence=log_tau_density.logsumexp(0).item() + math.log(step),
    )


# --- conjugate --------------------------------------------------------------------------------


def collinear(x: Tensor, y: Tensor) -> None:
    """Regression with known noise on twenty columns that are nearly one."""
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    pyro.sample("y", dist.Normal(beta @ x.T, 1.0).to_event(1), obs=y)


def collinear_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 22, generator=generator, dtype=torch.float64)
    x = noise[:, :1] + 0.1 * noise[:, 1:21]
    y = x.sum(-1) / 20 + noise[:, 21]
    default = torch.get_default_dtype()
    return x.to(default), y.to(default)


def collinear_truth() -> Truth:
    x, y = (value.double() for value in collinear_data())
    covariance = torch.linalg.inv(x.T @ x + torch.eye(20) / 4)
    mean = covariance @ x.T @ y
    marginal = dist.MultivariateNormal(torch.zeros_like(y), torch.eye(len(y)) + 4 * x @ x.T)
    spread = covariance.diagonal().sqrt()
    return Truth(
        named("beta", mean.tolist()),
        named("beta", spread.tolist()),
        log_evidence=marginal.log_prob(y).item(),
    )


COUNTS = (2.0, 4.0, 1.0, 3.0, 3.0, 0.0, 7.0)


def gamma_poisson(y: Tensor) -> None:
    """One rate; its posterior is a gamma distribution."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def gamma_poisson_truth() -> Truth:
    y = np.array(COUNTS)
    shape, rate = 3.0 + y.sum(), 2.0 + len(y)
    evidence = (
        3.0 * math.log(2.0)
        - special.gammaln(3.0)
        + special.gammaln(shape)
        - shape * math.log(rate)
        - special.gammaln(y + 1).sum()
    )
    mean, spread = float(shape / rate), float(shape**0.5 / rate)
    return Truth({"rate": mean}, {"rate": spread}, log_evidence=float(evidence))


# --- a chain of any length --------------------------------------------------------------------


def chain(y: Tensor) -> None:
    """A standard normal vector whose neighbours' differences are observed: correlated normals."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(y) + 1]).to_event(1))
    pyro.sample("y", dist.Normal(x[..., 1:] - x[..., :-1], 0.5).to_event(1), obs=y)


def chain_data(dim: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(dim, generator=generator, dtype=torch.float64)
    y = x.diff() + 0.5 * torch.randn(dim - 1, generator=generator, dtype=torch.float64)
    return (y.to(torch.get_default_dtype()),)


def chain_truth(dim: int) -> Truth:
    y = chain_data(dim)[0].double()
    difference = torch.eye(dim, dtype=torch.float64).diff(dim=0)
    covariance = torch.linalg.inv(torch.eye(dim) + 4 * difference.T @ difference)
    mean = covariance @ (4 * difference.T @ y)
    noise = 0.25 * torch.eye(dim - 1, dtype=torch.float64)
    marginal = dist.MultivariateNormal(torch.zeros_like(y), noise + difference @ difference.T)
    return Truth(
        named("x", mean.tolist()),
        named("x", covariance.diagonal().sqrt().tolist()),
        log_evidence=marginal.log_prob(y).item(),
    )


def nothing() -> tuple[()]:
    return ()


POSTERIORS = [
    Posterior("gamma_poisson", gamma_poisson, lambda: (torch.tensor(COUNTS),), gamma_poisson_truth),
    Posterior("collinear", collinear, collinear_data, collinear_truth),
    Posterior("chain", chain, partial(chain_data, 100), partial(chain_truth, 100)),
    Posterior("banana", banana, nothing, banana_truth),
    Posterior("ring", ring, nothing, ring_truth),
    Posterior("two_modes", two_modes, nothing, two_modes_truth),
    Posterior("student", student, nothing, student_truth),
    Posterior("funnel", funnel, nothing, funnel_truth),
    Posterior("horseshoe", horseshoe, horseshoe_data, horseshoe_truth, with_beta),
]
