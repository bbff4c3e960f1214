"""Flows inside models: variational autoencoders, likelihoods, Markov chains, learned priors."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_model_relations
from torch import Tensor, nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import DataError
from pyroflows.layers import CouplingLayer, LULinear
from pyroflows.testing import redraw_

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": (8, 8)}


# --- variational autoencoders ---------------------------------------------------------------------


def linear_data(rows: int = 300) -> Tensor:
    """Two factors in five columns, and noise."""
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(2, 5, generator=generator)
    z = torch.randn(rows, 2, generator=generator)
    return z @ loadings + 0.5 * torch.randn(rows, 5, generator=generator) + 1.0


def best_likelihood(x: Tensor, factors: int) -> float:
    """Greatest log likelihood of a linear-Gaussian model in nats per row, in closed form.

    Tipping and Bishop, "Probabilistic principal component analysis", JRSS B 1999.
    """
    columns = x.shape[-1]
    values = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0)).flip(0)
    noise = values[factors:].mean()
    logs = values[:factors].log().sum() + (columns - factors) * noise.log()
    return float(-0.5 * (columns * math.log(2 * math.pi) + logs + columns))


def linear_flow(features: int, context: int) -> pf.Flow:
    """Any normal distribution whose mean is linear in the context."""
    of_context = CouplingLayer(features, context, mask=[True] * features, hidden_features=())
    return pf.Flow([LULinear(features), of_context], features, context)


@pytest.mark.parametrize("learned_prior", [False, True])
def test_a_linear_vae_reaches_the_exact_likelihood(learned_prior: bool) -> None:
    """Where the posterior is normal, the bound is the likelihood, which has a closed form."""
    x = linear_data()
    decoder = nn.Linear(2, 5)
    prior = pf.Flow([LULinear(2)], 2) if learned_prior else None

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        if prior is not None:
            pyro.module("prior", prior)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            latent = prior() if prior is not None else dist.Normal(torch.zeros(2), 1.0).to_event(1)
            z = pyro.sample("z", latent)
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    guide = pf.AutoAmortizedFlow(model, encoders={"z": nn.Linear(5, 2)}, flow=linear_flow)
    pf.fit_svi(guide, x, steps=700, lr=0.03, seed=0, progress=False)
    bound = -Trace_ELBO(num_particles=200, vectorize_particles=True).loss(model, guide, x) / len(x)
    exact = best_likelihood(x, 2)
    assert bound <= exact + 0.01
    assert bound == pytest.approx(exact, abs=0.05)


def test_a_flow_vae_trains_prior_posterior_and_networks() -> None:
    x = linear_data(60)
    prior, decoder = pf.NSF(2, **SMALL), nn.Linear(2, 5)
    before = [p.detach().clone() for p in (*prior.parameters(), *decoder.parameters())]

    def model(x: Tensor, batch: int | None = None) -> None:
        pyro.module("prior", prior)
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x), subsample_size=batch) as rows:
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x[rows])

    encoder = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 8))
    guide = pf.AutoAmortizedFlow(model, encoders={"z": encoder})
    kwargs = {"batch": 20}
    fit = pf.fit_svi(guide, x, model_kwargs=kwargs, steps=100, lr=0.01, seed=0, progress=False)
    losses = torch.tensor(fit.history.losses)
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()
    after = (*prior.parameters(), *decoder.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    assert guide.sample(4, x[:3])["z"].shape == (4, 3, 2)
    generated = Predictive(model, num_samples=6)(torch.zeros(2, 5))
    assert generated["z"].shape == (6, 2, 2)


# --- flows as likelihoods -------------------------------------------------------------------------


def test_a_flow_likelihood_reads_a_latent_particle_by_particle() -> None:
    """With particles in a row and all at once: the same draws score the same."""
    flow = pf.NSF(2, 3, **SMALL)
    redraw_(flow, 0.3)
    x = torch.randn(5, 2)

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(z), obs=x)

    guide = AutoNormal(model)
    guide(x)
    z = torch.randn(7, 3)
    by_hand = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + flow(z.unsqueeze(1)).log_prob(x).sum(-1)
    for i in range(7):
        one = poutine.trace(poutine.condition(model, data={"z": z[i]})).get_trace(x)
        torch.testing.assert_close(one.log_prob_sum(), by_hand[i], rtol=1e-5, atol=1e-4)

    def together(x: Tensor) -> None:
        with pyro.plate("particles", 7, dim=-2):
            model(x)

    conditioned = poutine.condition(together, data={"z": z.unsqueeze(1)})
    joint = poutine.trace(conditioned).get_trace(x)
    torch.testing.assert_close(joint.log_prob_sum(), by_hand.sum(), rtol=1e-5, atol=1e-3)
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(x) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])
    report = pf.fit_svi(pf.AutoFlow(model), x, budget=0, psis_samples=500, seed=0).psis
    assert report is not None


# --- discrete states ------------------------------------------------------------------------------


def one_hot(k: Tensor) -> Tensor:
    return torch.stack([1.0 - k, k], -1)


def test_a_hidden_markov_model_with_flow_emissions() -> None:
    """States are enumerated under `markov`; the forward algorithm says what must come out."""
    flow = pf.NSF(1, 2, **SMALL)
    redraw_(flow, 0.5)
    x = torch.randn(6, 1)
    stay = 0.8

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        state: Any = None
        for t in pyro.markov(range(len(x))):
            odds = 0.5 if state is None else stay * state + (1 - stay) * (1 - state)
            state = pyro.sample(f"k{t}", dist.Bernoulli(odds), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", flow(one_hot(state)), obs=x[t])

    scores = flow(torch.eye(2)).log_prob(x.unsqueeze(1))
    moves = torch.tensor([[stay, 1 - stay], [1 - stay, stay]]).log()
    forward = math.log(0.5) + scores[0]
    for score in scores[1:]:
        forward = (forward.unsqueeze(-1) + moves).logsumexp(0) + score
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    loss = elbo.loss(model, lambda x: None, x)
    assert -loss == pytest.approx(forward.logsumexp(0).item(), abs=1e-4)
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(x) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_mixture_of_flows_in_a_plate() -> None:
    """Assignments are enumerated row by row."""
    flow = pf.MAF(2, 2, **SMALL)
    redraw_(flow, 0.5)
    x = torch.randn(9, 2)

    def model(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", flow(one_hot(k)), obs=x)

    weights = torch.tensor([0.7, 0.3]).log()
    exact = (flow(torch.eye(2)).log_prob(x.unsqueeze(1)) + weights).logsumexp(-1).sum()
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    assert -loss == pytest.approx(exact.item(), abs=1e-4)


@pytest.mark.parametrize("name", pf.list_flows())
def test_pyro_draws_the_graph_of_a_model_with_flows(name: str) -> None:
    """As `pyro.render_model` does: it follows dependencies by a tensor class of its own."""
    make = pf.get_flow(name)
    prior, likelihood = make(2), make(3, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    relations = get_model_relations(model, (torch.zeros(4, 3),))
    # Its solver is an autograd function, which no tensor class follows.
    seen = [] if name == "ResidualFlow" else ["z"]
    assert relations["sample_sample"] == {"z": [], "x": seen}
    assert relations["plate_sample"] == {"rows": ["z", "x"]}
    assert relations["observed"] == ["x"]


# --- yesterday's posterior as today's prior -------------------------------------------------------


def rates(y: Tensor) -> None:
    """Counts with a positive rate, and a share of them in the unit interval."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate * share), obs=y)


def test_yesterdays_posterior_is_todays_prior() -> None:
    """Rate and share are correlated and constrained; two days in turn give the same as both."""
    generator = torch.Generator().manual_seed(0)
    y = torch.poisson(torch.full((40,), 1.5), generator=generator)
    monday, tuesday = y[:20], y[20:]
    guide = pf.AutoFlow(rates)
    pf.fit_svi(guide, monday, steps=150, draws=64, psis_samples=0, seed=0, progress=False)
    idata = pf.to_arviz(guide, monday, num_samples=10_000, seed=0)
    x = pf.from_arviz(idata, ["rate", "share"])
    assert x.shape == (10_000, 2)
    assert pf.from_arviz(idata).shape == (10_000, 2)
    with pytest.raises(DataError, match="posterior has no 'rat'; it has"):
        pf.from_arviz(idata, ["rat"])
    with pytest.raises(DataError, match="expected at least one of"):
        pf.from_arviz(idata, [])
    with pytest.raises(DataError, match="with the group 'warmup_posterior'"):
        pf.from_arviz(idata, group="warmup_posterior")
    idata.posterior["rate"][0, 0] = float("nan")
    with pytest.raises(DataError, match="'rate': expected finite numbers"):
        pf.from_arviz(idata)
    prior = pf.NSF(2, support=[constraints.positive, constraints.unit_interval])
    pf.fit_mle(prior, x, steps=600, seed=0, progress=False)
    prior.requires_grad_(False)

    def updated(y: Tensor) -> None:
        theta = pyro.sample("theta", prior())
        rate, share = theta.unbind(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(rate * share), obs=y)

    assert ((prior().sample((500,)) > 0).all(0)).all()
    both, in_turn = pf.AutoFlow(rates), pf.AutoFlow(updated)
    pf.fit_svi(both, y, steps=150, draws=64, psis_samples=0, seed=0, progress=False)
    pf.fit_svi(in_turn, tuesday, steps=150, draws=64, psis_samples=0, seed=0, progress=False)
    draws, reference = in_turn.sample(10_000)["theta"], both.sample(10_000)
    product = draws.prod(-1)
    exact = reference["rate"] * reference["share"]
    assert product.mean().item() == pytest.approx(
        exact.mean().item(), abs=0.15 * exact.std().item()
    )
    assert product.std().item() == pytest.approx(exact.std().item(), rel=0.15)
    for i, name in enumerate(["rate", "share"]):
        shift = (draws[:, i].mean() - reference[name].mean()) / reference[name].std()
        assert abs(shift) < 0.2
