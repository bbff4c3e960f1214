"""Neural posterior estimation: simulations, the posterior of any observation, what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pyroflows as pf
from pyroflows.errors import DataError, FitError, ShapeError
from pyroflows.nn import DeepSet

NOISE = 0.5


def conjugate() -> None:
    """A mean of two columns, its posterior normal; four rows of data."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(mean, NOISE).to_event(1))


def fitted(model: Callable[..., Any] = conjugate, **options: Any) -> Any:
    guide = pf.AutoAmortizedFlow(model, **{"observed": ["y"], **options})
    fit = pf.fit_npe(guide, simulations=4000, steps=500, seed=0, progress=False)
    return guide, fit


@pytest.fixture(scope="module")
def npe() -> Any:
    torch.manual_seed(0)
    return fitted()


def observation(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, generator=generator)
    return mean + NOISE * torch.randn(4, 2, generator=generator)


def test_any_observation_has_its_posterior(npe: Any) -> None:
    guide, fit = npe
    assert fit.history.best[1] < fit.history.checks[0][1]
    assert len(fit.simulations) == 4000
    assert fit.simulations.vectorized
    assert "4000 simulations" in str(fit)
    precision = 1 + 4 / NOISE**2
    for seed in range(3):
        y = observation(seed)
        posterior = guide.posterior(y)
        draws = posterior.sample(4000)["mean"]
        exact = y.sum(0) / NOISE**2 / precision
        assert ((draws.mean(0) - exact).abs() * precision**0.5).max() < 0.3
        assert (draws.std(0) * precision**0.5 - 1).abs().max() < 0.15
        report = pf.psis(posterior, num_samples=2000, seed=0)
        assert report.verdict == "good"
        # The weights correct what the flow missed.
        weighted = (
            report.log_weights.exp().unsqueeze(-1) * report.unpack(report.latents)["mean"]
        ).sum(0)
        assert ((weighted - exact).abs() * precision**0.5).max() < 0.1


def test_batches_of_observations_are_encoded_alike(npe: Any) -> None:
    guide, _ = npe
    y = torch.stack([observation(0), observation(1)])
    contexts = guide.encode({"y": y})
    assert contexts.shape == (2, 8)
    torch.testing.assert_close(contexts[1], guide.posterior(y[1]).get_context())
    assert guide.flow()(contexts).sample((3,)).shape == (3, 2, 2)


def test_refined_posterior_is_better_and_the_guide_as_before(npe: Any) -> None:
    guide, _ = npe
    y = observation(5) + 1.0
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    raw = pf.psis(guide.posterior(y), num_samples=2000, seed=0)
    posterior, fit = pf.refine(guide, y, steps=100, psis_samples=2000, seed=0, progress=False)
    assert fit.psis.ess > raw.ess
    assert fit.psis.ess > 0.95 * 2000
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert pf.to_arviz(posterior, num_samples=20, seed=0).posterior["mean"].shape == (1, 20, 2)


def test_refining_that_does_harm_is_undone(npe: Any) -> None:
    guide, _ = npe
    y = observation(5)
    raw = guide.posterior(y)
    refined, fit = pf.refine(guide, y, steps=20, lr=10.0, psis_samples=1000, progress=False)
    assert "no better" in fit.stop_reason
    assert fit.psis.num_samples == 1000
    for name, value in raw.state_dict().items():
        assert torch.equal(value, refined.state_dict()[name])


def test_an_encoder_of_sets() -> None:
    """Also with Pyro's SVI, on one data set: the guide is amortised all the same."""
    guide = pf.AutoAmortizedFlow(conjugate, encoder=DeepSet(2, 4), observed=["y"])
    pf.fit_npe(guide, simulations=200, steps=20, seed=0, progress=False)
    assert guide.flow().context_size == 4
    data = pyro.poutine.condition(conjugate, data={"y": observation()})
    svi = SVI(data, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step())


def test_constrained_latents_and_two_observed_sites() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(0.0, scale))
        pyro.sample("counts", dist.Multinomial(20, share))

    guide = pf.AutoAmortizedFlow(model, observed=["y", "counts"])
    fit = pf.fit_npe(guide, simulations=500, steps=50, seed=0, progress=False)
    assert fit.simulations.values["share"].shape == (500, 3)
    assert guide.flow().event_shape == (3,)
    data = {"y": torch.tensor(0.3), "counts": torch.tensor([10.0, 5.0, 5.0])}
    draws = guide.posterior(data).sample(7)
    assert draws["share"].shape == (7, 3)
    assert (draws["scale"] > 0).all()
    with pytest.raises(ValueError, match="values of the sites 'y', 'counts', got none"):
        guide.posterior(torch.tensor(0.3))
    with pytest.raises(ShapeError, match=r"'counts': expected data of shape \(3,\).*\(4,\)"):
        guide.posterior({**data, "counts": torch.ones(4)})


def test_uniform_priors_are_normal_to_the_flow() -> None:
    """Also beside another latent; so an untrained guide is the prior exactly."""

    def model() -> None:
        pyro.sample("loc", dist.Normal(1.0, 2.0))
        theta = pyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1))

    guide = pf.AutoAmortizedFlow(model, observed=["y"])
    reading = guide.read()
    flow = guide.flow()
    scale = math.pi / 3**0.5
    flow.transform.standardization.set_(
        torch.tensor([1.0, 0, 0]), torch.tensor([2.0, scale, scale])
    )
    flow.to(torch.float64)
    values = pf.simulate(model, sites=["loc", "theta"], count=100, seed=0).values
    u = guide.pack(values, reading).double()
    jacobian = (values["theta"].double() / 3).square().neg().log1p().add(math.log(1.5)).sum(-1)
    prior = dist.Normal(1.0, 2.0).log_prob(values["loc"].double()) - 2 * math.log(6) + jacobian
    score = flow(torch.zeros(100, 2).double()).log_prob(u)
    torch.testing.assert_close(score, prior, rtol=1e-4, atol=1e-4)


def test_truncated_rounds_narrow_the_prior() -> None:
    y = observation()
    guide = pf.AutoAmortizedFlow(conjugate, observed=["y"])
    fit = pf.fit_npe(
        guide, simulations=1000, observation=y, rounds=2, steps=300, seed=0, progress=False
    )
    (share,) = fit.accepted
    assert share < 0.7
    assert "kept" in str(fit)
    assert len(fit.simulations) == 2000
    second = fit.simulations.values["mean"][1000:]
    assert (second.std(0) < 0.7).all()
    precision = 1 + 4 / NOISE**2
    draws = guide.posterior(y).sample(4000)["mean"]
    assert ((draws.mean(0) - y.sum(0) / NOISE**2 / precision).abs() * precision**0.5).max() < 0.3


# --- simulators -----------------------------------------------------------------------------------


def simulator(share: float = 0.0) -> None:
    """Of NumPy: it does not broadcast, fails for some draws and is not finite for others."""
    z = pyro.sample("z", dist.Uniform(0.0, 1.0))
    if float(z) < share:
        raise ArithmeticError("no convergence")
    noise = np.random.standard_normal() + random.random()  # noqa: NPY002
    value = float("nan") if float(z) > 1 - share else float(z) + 0.1 * noise
    pyro.deterministic("y", torch.tensor(value))


def test_workers_change_nothing() -> None:
    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    alone = pf.simulate(simulator, 0.02, sites=["z", "y"], count=120, seed=3)
    several = pf.simulate(simulator, 0.02, sites=["z", "y"], count=120, seed=3, workers=2)
    assert before == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert not alone.vectorized
    assert alone.failures == several.failures
    for name, value in alone.values.items():
        assert torch.equal(value, several.values[name])
    other = pf.simulate(simulator, 0.02, sites=["z", "y"], count=120, seed=4)
    assert not torch.equal(other.values["z"][:50], alone.values["z"][:50])


def test_failures_cost_only_themselves() -> None:
    done = pf.simulate(simulator, 0.03, sites=["z", "y"], count=400, seed=0, max_failed=0.2)
    everything = pf.simulate(simulator, sites=["z", "y"], count=400, seed=0)
    z = everything.values["z"]
    assert done.failures == {
        "site 'y' is not finite": int((z > 0.97).sum()),
        "ArithmeticError: no convergence": int((z < 0.03).sum()),
    }
    usable = (z >= 0.03) & (z <= 0.97)
    assert torch.equal(done.values["y"], everything.values["y"][usable])
    assert "failed: ArithmeticError: no convergence" in str(done)
    with pytest.raises(FitError, match=r"of 400 simulations failed, and max_failed=0.1 allows 40"):
        pf.simulate(simulator, 0.3, sites=["z", "y"], count=400, seed=0)
    with pytest.raises(FitError, match="of 20 simulations failed"):
        pf.simulate(simulator, 2.0, sites=["z", "y"], count=20, seed=0)


def test_a_vectorized_model_loses_only_its_failures() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.clamp(min=-1.5).add(1.5).log().clamp(min=-1e30), 1.0))
        pyro.deterministic("root", (z + 1.8).sqrt())

    done = pf.simulate(model, sites=["z", "root"], count=1000, seed=0)
    assert done.vectorized
    assert list(done.failures) == ["site 'root' is not finite"]
    assert done.failed == 1000 - len(done) > 0
    assert (done.values["z"] > -1.8).all()


def noisy() -> None:
    """Broadcasts, with random numbers of its own."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", z + torch.randn(z.shape), event_dim=0)


def test_a_simulator_with_noise_of_its_own_is_trusted_where_one_says_so() -> None:
    alone = pf.simulate(noisy, sites=["z", "y"], count=50, seed=0)
    assert not alone.vectorized
    trusted = pf.simulate(noisy, sites=["z", "y"], count=2000, vectorized=True, seed=0)
    assert trusted.vectorized
    noise = trusted.values["y"] - trusted.values["z"]
    assert noise.std() == pytest.approx(1.0, abs=0.1)
    assert torch.corrcoef(torch.stack([noise, trusted.values["z"]]))[0, 1].abs() < 0.1
    one_by_one = pf.simulate(conjugate, sites=["mean"], count=20, vectorized=False, seed=0)
    assert not one_by_one.vectorized
    with pytest.raises(ValueError, match="only one element tensors"):
        pf.simulate(wrong, sites=["y"], count=20, vectorized=True)


def wrong() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", torch.tensor(math.sin(z)))


def test_fit_to_a_simulator() -> None:
    """It fails at a tenth of the draws, also of those that tell where the prior is."""
    guide = pf.AutoAmortizedFlow(simulator, observed=["y"])
    options: Any = {"steps": 20, "seed": 0, "progress": False, "max_failed": 0.4}
    fit = pf.fit_npe(guide, 0.1, simulations=200, **options)
    assert fit.simulations.failed > 0
    posterior = guide.posterior(torch.tensor(0.5))
    draws = posterior.sample(10)["z"]
    assert ((draws > 0) & (draws < 1)).all()
    with pytest.raises(NotImplementedError, match="'y' is a simulation without a density"):
        pf.psis(posterior, num_samples=100)
    again = pf.AutoAmortizedFlow(simulator, observed=["y"])
    pf.fit_npe(again, simulations=fit.simulations, steps=20, seed=0, progress=False)
    only_z = pf.simulate(simulator, sites=["z"], count=50, seed=0)
    with pytest.raises(DataError, match="'y' is missing"):
        pf.fit_npe(again, simulations=only_z, progress=False)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"rounds": 2}, "give observation="),
        ({"validation": 1.0}, r"validation: expected a share in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"simulations": 0}, "count: expected at least 1 simulation, got 0"),
        ({"max_failed": 1.0}, r"max_failed: expected a share in \[0, 1\), got 1.0"),
        ({"simulations": 5}, "simulations: expected at least 10, got 5"),
        (
            {"rounds": 2, "observation": torch.zeros(4, 2), "truncation": 0.0, "steps": 1},
            r"truncation: expected a share in \(0, 1\), got 0.0",
        ),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    guide = pf.AutoAmortizedFlow(conjugate, observed=["y"])
    with pytest.raises(ValueError, match=message):
        pf.fit_npe(guide, **{"simulations": 20, "progress": False, **options})


def test_supports_that_move() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(a - 1, a))
        pyro.sample("y", dist.Normal(b, 1.0))

    guide = pf.AutoAmortizedFlow(model, observed=["y"])
    with pytest.raises(DataError, match="support that depends on other latents"):
        pf.fit_npe(guide, simulations=50, seed=0, progress=False)


def test_other_guides_are_refused() -> None:
    with pytest.raises(TypeError, match="guide: expected an AutoAmortizedFlow, got AutoFlow"):
        pf.fit_npe(pf.AutoFlow(conjugate))  # type: ignore[arg-type]
