"""Variational inference: what it reaches, how its gradients behave, how it ends."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.errors import FitError
from pyroflows.training import SVIFit
from tests.models import (
    COUNTS,
    MIXTURE_DATA,
    SCHOOL_ERRORS,
    SCHOOLS,
    eight_schools,
    gamma_poisson,
    gamma_poisson_evidence,
    gaussian,
    gaussian_data,
    gaussian_evidence,
    gaussian_posterior,
    mixture,
    mixture_log_joint,
)


def fit(guide: pf.AutoFlow, *args: Any, **kwargs: Any) -> SVIFit:
    return pf.fit_svi(guide, *args, **{"seed": 0, "progress": False, "psis_samples": 0, **kwargs})


# --- what it reaches ------------------------------------------------------------------------------


def eight_schools_truth() -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Log evidence, and means and deviations, by quadrature over mu and log tau.

    Given these two all else is normal, so the only error is the grid's: 401 points each way agree
    with 4001 to ten digits in the evidence.
    """
    mu = torch.linspace(-30, 40, 401, dtype=torch.float64).reshape(-1, 1, 1)
    log_tau = torch.linspace(-12, 5.3, 401, dtype=torch.float64).reshape(1, -1, 1)
    tau, y, errors = log_tau.exp(), SCHOOLS.double(), SCHOOL_ERRORS.double()
    log_joint = dist.Normal(y, (errors**2 + tau**2).sqrt()).log_prob(mu).sum(-1)
    log_joint = log_joint + dist.Normal(0.0, 5.0).log_prob(mu[..., 0])
    log_joint = log_joint + (dist.HalfCauchy(5.0).log_prob(tau) + log_tau)[..., 0]
    cell = (mu[1] - mu[0]) * (log_tau[0, 1] - log_tau[0, 0])
    evidence = log_joint.logsumexp((0, 1)) + cell.squeeze().log()
    weights = (log_joint + cell.squeeze().log() - evidence).exp().unsqueeze(-1)

    def moments(mean: Tensor, variance: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        center = (weights * mean).sum((0, 1))
        spread = (weights * (mean**2 + variance)).sum((0, 1)) - center**2
        return center, spread.sqrt()

    precision = 1 + (tau / errors) ** 2
    eta = tau * (y - mu) / errors**2 / precision
    one = torch.ones_like(weights)
    truth = {"mu": moments(mu * one), "tau": moments(tau * one), "eta": moments(eta, 1 / precision)}
    return evidence.item(), truth


def test_eight_schools() -> None:
    """In a quarter of the default steps; at a larger learning rate to make up for it."""
    evidence, truth = eight_schools_truth()
    guide = pf.AutoFlow(eight_schools)
    result = fit(guide, SCHOOL_ERRORS, SCHOOLS, steps=500, lr=0.01, psis_samples=10_000)
    report = result.psis
    assert report.k_hat < 0.7
    assert report.verdict == "good"
    assert report.log_evidence == pytest.approx(evidence, abs=0.02)
    assert report.elbo == pytest.approx(evidence, abs=0.06)
    assert report.elbo < report.log_evidence
    assert result.dropped == 0
    with pyro.poutine.block():
        pyro.set_rng_seed(1)
        draws = guide.sample(20_000)
    for site, (mean, deviation) in truth.items():
        error = (draws[site].double().mean(0) - mean).abs() / deviation
        assert error.max() < 0.1, site


@pytest.mark.slow
def test_eight_schools_by_default() -> None:
    evidence, truth = eight_schools_truth()
    for seed in range(3):
        pyro.clear_param_store()
        guide = pf.AutoFlow(eight_schools, name=f"guide{seed}")
        report = pf.fit_svi(guide, SCHOOL_ERRORS, SCHOOLS, seed=seed, progress=False).psis
        assert report.k_hat < 0.7
        assert report.log_evidence_error < 0.01
        assert abs(report.log_evidence - evidence) < 4 * report.log_evidence_error
        # The noise of a report's 10,000 draws is half of this.
        many = pf.psis(guide, SCHOOL_ERRORS, SCHOOLS, num_samples=100_000, seed=0)
        assert many.log_evidence == pytest.approx(evidence, abs=0.01)
        draws = guide.sample(20_000)
        for site, (mean, deviation) in truth.items():
            error = (draws[site].double().mean(0) - mean).abs() / deviation
            assert error.max() < 0.1, (seed, site)


@pytest.mark.slow
def test_eight_schools_centred_says_what_it_reached() -> None:
    """The funnel is only nearly reached: the report says so, and the weights correct the draws."""

    def centred(errors: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(errors)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, errors), obs=y)

    evidence, truth = eight_schools_truth()
    report = pf.fit_svi(pf.AutoFlow(centred), SCHOOL_ERRORS, SCHOOLS, seed=0, progress=False).psis
    assert report.k_hat > 0.5
    assert report.ess < 0.9 * report.num_samples
    assert report.log_evidence == pytest.approx(evidence, abs=0.15)
    draws = report.resample(20_000, seed=0)
    for site in ("mu", "tau"):
        mean, deviation = truth[site]
        assert ((draws[site].double().mean(0) - mean).abs() / deviation).max() < 0.1, site


def log_normal(loc: float, scale: float) -> None:
    pyro.sample("z", dist.LogNormal(loc, scale))


ONE_LATENT: dict[str, tuple[Callable[..., None], tuple[Any, ...], float]] = {
    "Gamma-Poisson": (gamma_poisson, (COUNTS,), gamma_poisson_evidence(COUNTS)),
    # Fifty times wider than the start: a spline alone ran into the edge of its box, and the report
    # on what was left said "good".
    "wide": (log_normal, (0.0, 5.0), 0.0),
    "narrow and far": (log_normal, (20.0, 0.01), 0.0),
}


@pytest.mark.parametrize("name", ONE_LATENT)
def test_one_latent(name: str) -> None:
    model, args, evidence = ONE_LATENT[name]
    guide = pf.AutoFlow(model)
    result = fit(guide, *args, steps=800, lr=5e-3, psis_samples=2_000)
    assert result.psis.log_evidence == pytest.approx(evidence, abs=0.02)
    assert result.psis.elbo == pytest.approx(evidence, abs=0.05)
    assert result.psis.verdict == "good"


def test_a_curved_posterior() -> None:
    """Its normal approximation is bad; the flow's evidence is not."""

    def banana() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x**2, 0.3))

    result = fit(pf.AutoFlow(banana), steps=600, lr=0.01, psis_samples=2_000)
    assert result.psis.log_evidence == pytest.approx(0.0, abs=0.05)
    assert result.psis.elbo == pytest.approx(0.0, abs=0.15)


def test_enumerated_discretes_are_summed_out() -> None:
    """In 3 dimensions importance sampling from the prior gives the evidence, to 0.01 nats."""
    prior = {
        "share": dist.Beta(2.0, 2.0).sample((400_000,)),
        "loc": dist.Normal(torch.zeros(2), 3.0).sample((400_000,)),
    }
    weights = mixture_log_joint(prior, MIXTURE_DATA) - (
        dist.Beta(2.0, 2.0).log_prob(prior["share"])
        + dist.Normal(0.0, 3.0).log_prob(prior["loc"]).sum(-1)
    )
    evidence = (weights.logsumexp(0) - math.log(400_000)).item()
    init = init_to_value(values={"loc": torch.tensor([-1.0, 1.0])})
    guide = pf.AutoFlow(mixture, init_loc_fn=init)
    result = fit(guide, MIXTURE_DATA, steps=400, lr=0.01, psis_samples=4_000)
    # Labels may be swapped; a guide that starts at one labelling may find one of two equal halves.
    found = result.psis.log_evidence
    assert min(abs(found - evidence), abs(found + math.log(2) - evidence)) < 0.05


def test_training_does_not_unlearn_an_exact_start() -> None:
    """Of a hundred correlated latents a Gaussian is exact; longer steps lost a hundred nats."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([100]).to_event(1))
        pyro.sample("y", dist.Normal(x[..., 1:] - x[..., :-1], 0.5).to_event(1), obs=y)

    losses = fit(pf.AutoFlow(model), torch.zeros(99), steps=30, psis_samples=0).history.losses
    assert max(losses) < losses[0] + 10
    assert losses[-1] < losses[0] + 0.3


# --- the model's side -----------------------------------------------------------------------------


def test_every_keyword_of_the_model_reaches_it() -> None:
    def model(y: Tensor, *, steps: float, seed: float) -> None:
        loc = pyro.sample("loc", dist.Normal(steps, seed))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.randn(3)
    guide = pf.AutoFlow(model)
    kwargs = {"steps": 7.0, "seed": 0.1}
    result = fit(guide, y, model_kwargs=kwargs, steps=300, lr=0.01, psis_samples=1000)
    precision = 1 / 0.1**2 + 3
    expected = (7.0 / 0.1**2 + y.sum()) / precision
    assert guide.median(y, **kwargs)["loc"].item() == pytest.approx(expected.item(), abs=0.02)
    assert result.psis.ess > 500


def test_parameters_of_the_model_train_along() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(3.0), constraint=dist.constraints.positive)
            self.bias = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor, y: Tensor) -> None:
            shift = pyro.param("shift", torch.tensor(0.0))
            slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
            with pyro.plate("rows", len(x)):
                mean = slope * x + shift + self.bias
                pyro.sample("y", dist.Normal(mean, self.scale), obs=y)

    model = Model()
    x = torch.randn(60)
    y = -1.5 * x + 2.0 + 0.3 * torch.randn(60)
    unused = pyro.param("unused", torch.tensor(1.0))
    guide = pf.AutoFlow(model)
    fit(guide, x, y, steps=500, lr=0.02)
    assert pyro.param("shift").item() + model.bias.item() == pytest.approx(2.0, abs=0.15)
    assert 0.5 < model.bias.item() < 1.5
    assert model.scale.item() == pytest.approx(0.3, abs=0.1)
    assert guide.median()["slope"].item() == pytest.approx(-1.5, abs=0.15)
    assert unused.item() == 1.0


def test_draws_where_the_model_is_undefined_are_dropped_and_counted() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.5, 0.5))
        pyro.sample("y", dist.Normal(0.0, z), obs=y)  # no scale below zero

    init = init_to_value(values={"z": torch.tensor(0.5)})
    guide = pf.AutoFlow(model, init_loc_fn=init, init_scale=0.4)
    result = fit(guide, torch.tensor(1.0), steps=50, draws=32, starts=0)
    assert 0 < result.dropped < 50 * 32 / 2
    assert f"{result.dropped} draws dropped in training" in str(result)
    assert all(math.isfinite(loss) for loss in result.history.losses)
    assert all(p.isfinite().all() for p in guide.parameters())
    # A tenth of the draws of one step, 0.5 being 1.25 deviations above zero.
    again = pf.AutoFlow(model, init_loc_fn=init, init_scale=0.4, name="again")
    result = fit(again, torch.tensor(1.0), steps=1, draws=2000, starts=0)
    assert result.dropped == pytest.approx(211, abs=60)


def test_draws_outside_the_support_are_dropped() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(z > 0, 0.0, -torch.inf))

    init = init_to_value(values={"z": torch.tensor(0.5)})
    result = fit(pf.AutoFlow(model, init_loc_fn=init, init_scale=0.5), steps=20, starts=0)
    assert result.dropped > 0
    assert result.history.skipped == 0


def test_a_model_without_a_finite_density() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.full_like(z, -torch.inf))

    with pytest.raises(FitError, match=r"not a number at all 1024 draws.*init_loc_fn.*init_scale"):
        fit(pf.AutoFlow(model), steps=5)


# --- how it ends ----------------------------------------------------------------------------------


def test_interrupted_it_returns_what_it_has() -> None:
    calls = []

    def model() -> None:
        calls.append(None)
        pyro.sample("z", dist.Normal(3.0, 1.0))
        if len(calls) == 80:
            raise KeyboardInterrupt

    guide = pf.AutoFlow(model, example_args=())
    before = guide.sample(1000)["z"].mean()
    result = fit(guide, steps=100, lr=0.02, psis_samples=200)
    assert result.stop_reason == "it was interrupted"
    assert 30 < len(result.history.losses) < 80
    assert result.psis.num_samples == 200
    assert guide.sample(1000)["z"].mean() > before + 0.1


def test_a_seed_reproduces_the_fit_and_leaves_the_global_state_alone() -> None:
    y = gaussian_data()
    start = pf.AutoFlow(gaussian, example_args=(y,))
    guides = [copy.deepcopy(start) for _ in range(3)]
    state = torch.random.get_rng_state()
    results = [
        fit(guide, y, seed=seed, steps=10, psis_samples=200)
        for guide, seed in zip(guides, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = (result.history.losses for result in results)
    assert first == again
    assert first != other
    assert results[0].psis.k_hat == results[1].psis.k_hat


def test_a_seed_also_decides_where_a_fresh_guide_starts() -> None:
    y = gaussian_data()
    losses = []
    for number in range(2):
        torch.rand(3)
        guide = pf.AutoFlow(gaussian, name=f"guide{number}")
        losses.append(fit(guide, y, seed=1, steps=3).history.losses)
    assert losses[0] == losses[1]


def test_the_result_says_what_happened() -> None:
    y = gaussian_data()
    result = fit(pf.AutoFlow(gaussian), y, steps=40, psis_samples=500)
    assert [step for step, _ in result.history.checks] == list(range(5, 41, 5))
    mean = sum(result.history.losses[:5]) / 5
    assert result.history.checks[0][1] == pytest.approx(mean)
    assert "40 steps in" in str(result)
    assert "negative ELBO (nats)" in str(result)
    assert "k-hat" in str(result)
    assert fit(pf.AutoFlow(gaussian), y, steps=1).psis is None


def test_the_best_state_is_restored() -> None:
    states = []

    def model() -> None:
        z = pyro.sample("z", dist.Normal(3.0, 1.0))
        states.append([p.detach().clone() for p in guide.parameters()])
        # From some step on everything is ten nats worse.
        pyro.factor("late", torch.full_like(z, -10.0 * (len(states) > 60)))

    guide = pf.AutoFlow(model)
    result = fit(guide, steps=100, lr=0.02)
    final = list(guide.parameters())

    def same(state: list[Tensor]) -> bool:
        return all(map(torch.equal, state, final))

    assert result.history.best[0] < 60
    assert any(same(state) for state in states[40:62])
    assert not same(states[-1])


def test_the_fit_registers_and_stays_registered() -> None:
    y = gaussian_data()
    guide = pf.AutoFlow(gaussian)
    fit(guide, y, steps=5)
    store = pyro.get_param_store()
    for name, parameter in guide.flow.named_parameters():
        assert store[f"{guide.name}.flow$$${name}"] is parameter


def test_devices_move_the_guide_and_the_arguments(device: torch.device) -> None:
    y = gaussian_data()
    guide = pf.AutoFlow(gaussian)
    result = fit(guide, y, device=device, steps=2, psis_samples=100)
    assert guide.flow.device.type == device.type
    assert math.isfinite(result.psis.elbo)


# --- what it refuses ------------------------------------------------------------------------------


def test_other_guides_are_refused() -> None:
    with pytest.raises(TypeError, match=r"AutoAmortizedFlow, got AutoNormal.*pyro\.infer\.SVI"):
        fit(AutoNormal(gaussian), gaussian_data())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"estimator": "score"}, "estimator: expected one of 'stl', 'total', .*got 'score'"),
        ({"draws": 0}, "draws: expected at least one"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"lr": -1.0}, "lr: expected a positive"),
        ({"psis_samples": 50}, "psis_samples: expected 0 or at least 100, got 50"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], match: str) -> None:
    """Before the training, not after it."""
    with pytest.raises(ValueError, match=match):
        fit(pf.AutoFlow(gaussian), gaussian_data(), **{"steps": 10**6, **wrong})


def test_a_frozen_guide() -> None:
    y = gaussian_data()
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    guide.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(guide, y)


def test_posteriors_are_found_to_the_covariance() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide, posterior = pf.AutoFlow(gaussian), gaussian_posterior(y)
    result = fit(guide, y, steps=400, lr=0.02, psis_samples=2_000)
    assert result.psis.elbo == pytest.approx(gaussian_evidence(y), abs=0.02)
    draws = guide.sample(20_000)["mean"]
    # A divergence of 0.02 nats allows for deviations that are off by a tenth.
    assert ((draws.mean(0) - posterior.mean).abs() < 0.1 * posterior.stddev).all()
    assert torch.allclose(draws.T.cov(), posterior.covariance_matrix, rtol=0.2)
