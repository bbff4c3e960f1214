"""Twelve posteriors of posteriordb: our translations to Pyro, and its reference draws.

The data and the draws lie under the folder that PYROFLOWS_DATA names. Sites carry the names of
Stan's parameters. Flat priors are improper, as there; where Stan leaves a constant out of a prior
the evidence differs by that constant. A model makes its priors in torch's default dtype, and takes
an outer plate of draws.

Source: Magnusson et al., "posteriordb: testing, benchmarking and developing Bayesian inference
algorithms", AISTATS 2025.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from tests.benchmarks.vi.posterior import Draws, Posterior, Truth, stacked, stored_truths

# --- priors and likelihood in common ----------------------------------------------------------


def flat(size: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(constraints.real_vector, (), (size,))


def flat_positive() -> dist.ImproperUniform:
    return dist.ImproperUniform(constraints.positive, (), ())


def observe_line(mean: Tensor, sigma: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


# --- models -----------------------------------------------------------------------------------


def ar(lags: Tensor, y: Tensor) -> None:
    """Autoregression on the columns of ``lags``."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    observe_line(alpha.unsqueeze(-1) + beta @ lags.T, sigma, y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    """Linear regression with flat priors."""
    beta = pyro.sample("beta", flat(x.shape[1]))
    sigma = pyro.sample("sigma", flat_positive())
    observe_line(beta @ x.T, sigma, y)


def kidscore(x: Tensor, y: Tensor) -> None:
    """Linear regression with a prior on the noise alone."""
    beta = pyro.sample("beta", flat(x.shape[1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    observe_line(beta @ x.T, sigma, y)


def vague_regression(x: Tensor, y: Tensor) -> None:
    """Linear regression with wide normal priors."""
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    observe_line(beta @ x.T, sigma, y)


def schools_centered(errors: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, errors), obs=y)


def schools_noncentered(errors: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta_trans, errors), obs=y)


def gp_factor(rho: Tensor, alpha: Tensor, x: Tensor) -> Tensor:
    """Cholesky factor of the squared-exponential covariance at ``x``."""
    distance = (x.unsqueeze(-1) - x) / rho[..., None, None]
    covariance = alpha[..., None, None] ** 2 * torch.exp(-0.5 * distance**2)
    return torch.linalg.cholesky(covariance + 1e-10 * torch.eye(len(x)))


def gp_poisson(x: Tensor, k: Tensor) -> None:
    """Counts whose log rate is a Gaussian process; needs float64."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = pyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    f = (gp_factor(rho, alpha, x) @ f_tilde.unsqueeze(-1)).squeeze(-1)
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def hmm(y: Tensor) -> None:
    """Two hidden states with normal outputs, summed out by the forward algorithm."""
    theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    prior = dist.Normal(torch.tensor([3.0, 10.0]), 1.0).to_event(1)
    pyro.factor("prior", prior.log_prob(mu))
    step = torch.stack([theta1, theta2], -2).log().unsqueeze(-3)
    # Pyro's chain makes a step before its first output; Stan's starts there, from either state.
    steps = torch.cat([torch.zeros_like(step), step.repeat_interleave(len(y) - 1, -3)], -3)
    output = dist.Normal(mu.unsqueeze(-2), 1.0)
    chain = dist.DiscreteHMM(torch.zeros(2), steps, output, duration=len(y))
    pyro.sample("y", chain, obs=y)


def gauss_mix(y: Tensor) -> None:
    """Two normals of unknown place, width and share, in order."""
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("rows", len(y)):
        share = dist.Categorical(torch.stack([theta, 1 - theta], -1))
        pyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(mu, sigma)), obs=y)


# --- transformed parameters -------------------------------------------------------------------


def with_theta(draws: Draws) -> Draws:
    theta = draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["theta_trans"]
    return {"theta": theta, "mu": draws["mu"], "tau": draws["tau"]}


def with_theta_trans(draws: Draws) -> Draws:
    theta_trans = (draws["theta"] - draws["mu"].unsqueeze(-1)) / draws["tau"].unsqueeze(-1)
    return {"theta_trans": theta_trans, "mu": draws["mu"], "tau": draws["tau"]}


def with_f(draws: Draws) -> Draws:
    factor = gp_factor(draws["rho"], draws["alpha"], gp_data()[0])
    f = (factor @ draws["f_tilde"].unsqueeze(-1)).squeeze(-1)
    return {"rho": draws["rho"], "alpha": draws["alpha"], "f": f}


def with_f_tilde(draws: Draws) -> Draws:
    factor = gp_factor(draws["rho"], draws["alpha"], gp_data()[0])
    f_tilde = torch.linalg.solve_triangular(factor, draws["f"].unsqueeze(-1), upper=False)
    return {"rho": draws["rho"], "alpha": draws["alpha"], "f_tilde": f_tilde.squeeze(-1)}


# --- data -------------------------------------------------------------------------------------


def folder() -> Path:
    return Path(os.environ["PYROFLOWS_DATA"]) / "posteriordb"


def load(name: str) -> dict[str, Any]:
    """A data set, its columns as tensors."""
    data = json.loads((folder() / "data" / f"{name}.json").read_text())
    default = torch.get_default_dtype()
    return {
        k: torch.tensor(v, dtype=default) if isinstance(v, list) else v for k, v in data.items()
    }


def design(*columns: Tensor) -> Tensor:
    """Columns behind one of ones."""
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def ar_data() -> tuple[Tensor, Tensor]:
    d = load("arK")
    y, order = d["y"], d["K"]
    lags = [y[order - k : len(y) - k] for k in range(1, order + 1)]
    return torch.stack(lags, -1), y[order:]


def earnings_data() -> tuple[Tensor, Tensor]:
    d = load("earnings")
    return design(d["height"]), d["earn"]


def schools_data() -> tuple[Tensor, Tensor]:
    d = load("eight_schools")
    return d["sigma"], d["y"]


def gp_data() -> tuple[Tensor, Tensor]:
    d = load("gp_pois_regr")
    return d["x"], d["k"]


def hmm_data() -> tuple[Tensor]:
    return (load("hmm_example")["y"],)


def interaction_data() -> tuple[Tensor, Tensor]:
    d = load("kidiq")
    return design(d["mom_hs"], d["mom_iq"], d["mom_hs"] * d["mom_iq"]), d["kid_score"]


def momiq_data() -> tuple[Tensor, Tensor]:
    d = load("kidiq")
    return design(d["mom_iq"]), d["kid_score"]


def mix_data() -> tuple[Tensor]:
    return (load("low_dim_gauss_mix")["y"],)


def mesquite_data() -> tuple[Tensor, Tensor]:
    d = load("mesquite")
    names = ("diam1", "diam2", "canopy_height", "total_height", "density")
    return design(*(d[name].log() for name in names), d["group"]), d["weight"].log()


def nes_data() -> tuple[Tensor, Tensor]:
    d = load("nes1980")
    ages = [(d["age_discrete"] == group).to(d["income"]) for group in (2, 3, 4)]
    columns = (d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"])
    return design(*columns), d["partyid7"]


def blr_data() -> tuple[Tensor, Tensor]:
    d = load("sblrc")
    return d["X"], d["y"]


# --- the table --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Reference draws of posteriordb, and how they become draws of the model's sites."""

    file: str
    sites: Callable[[Draws], Draws] = dict

    def scalars(self) -> Draws:
        """The 10,000 draws by Stan's names, ten chains after each other."""
        stored = np.load(folder() / "draws" / f"{self.file}.npz")
        draws = torch.from_numpy(stored["draws"]).to(torch.get_default_dtype())
        return dict(zip(stored["names"].tolist(), draws.unbind(-1), strict=True))

    def draws(self) -> Draws:
        """The same by the model's sites, ``{site: (S, *shape)}``."""
        return self.sites(stacked(self.scalars()))


SCHOOLS = "eight_schools-eight_schools_noncentered"
REFERENCES = {
    "arK": Reference("arK-arK"),
    "earn_height": Reference("earnings-earn_height"),
    "eight_schools_centered": Reference(SCHOOLS),
    "eight_schools_noncentered": Reference(SCHOOLS, with_theta_trans),
    "gp_pois_regr": Reference("gp_pois_regr-gp_pois_regr", with_f_tilde),
    "hmm_example": Reference("hmm_example-hmm_example"),
    "kidscore_interaction": Reference("kidiq-kidscore_interaction"),
    "kidscore_momiq": Reference("kidiq-kidscore_momiq"),
    "low_dim_gauss_mix": Reference("low_dim_gauss_mix-low_dim_gauss_mix"),
    "logmesquite": Reference("mesquite-logmesquite"),
    "nes": Reference("nes1980-nes"),
    "blr": Reference("sblrc-blr"),
}


def reference_truth(name: str) -> Truth:
    """Moments of the reference draws, and the evidence by the bridge."""
    named = {k: v.double() for k, v in REFERENCES[name].scalars().items()}
    centre = {k: v.mean().item() for k, v in named.items()}
    spread = {k: v.std().item() for k, v in named.items()}
    evidence = stored_truths()[name]
    return Truth(centre, spread, evidence["log_evidence"], evidence["log_evidence_error"])


def _posterior(
    name: str,
    model: Callable[..., Any],
    args: Callable[[], tuple[Any, ...]],
    derive: Callable[[Draws], Draws] = dict,
) -> Posterior:
    return Posterior(name, model, args, lambda: reference_truth(name), derive)


POSTERIORS = [
    _posterior("arK", ar, ar_data),
    _posterior("earn_height", flat_regression, earnings_data),
    _posterior("eight_schools_centered", schools_centered, schools_data),
    _posterior("eight_schools_noncentered", schools_noncentered, schools_data, with_theta),
    _posterior("gp_pois_regr", gp_poisson, gp_data, with_f),
    _posterior("hmm_example", hmm, hmm_data),
    _posterior("kidscore_interaction", kidscore, interaction_data),
    _posterior("kidscore_momiq", kidscore, momiq_data),
    _posterior("low_dim_gauss_mix", gauss_mix, mix_data),
    _posterior("logmesquite", flat_regression, mesquite_data),
    _posterior("nes", flat_regression, nes_data),
    _posterior("blr", vague_regression, blr_data),
]
