"""`to_arviz`: the groups of a guide or an MCMC run, their values and the names of their axes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.reparam import LocScaleReparam, NeuTraReparam
from torch import Tensor
from torch.distributions import biject_to

import pyroflows as pf
from pyroflows.diagnostics import to_arviz
from pyroflows.guides import AutoFlow

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(sigma.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_tensor(5.0)))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(sigma.new_tensor(0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


class Posterior(dist.MultivariateNormal):  # type: ignore[misc]
    def rsample_and_log_prob(self, sample_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        x = self.rsample(sample_shape)
        return x, self.log_prob(x)


class StandIn(AutoMultivariateNormal):  # type: ignore[misc]
    """What `to_arviz` asks of a guide, written as plainly as can be."""

    def __init__(self, model: Callable[..., Any], *args: Any) -> None:
        super().__init__(model, init_scale=0.3)
        self.original_model = model
        self(*args)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        return Posterior(self.loc, scale_tril=self.scale[..., None] * self.scale_tril)

    def _parts(self, latents: Tensor) -> list[tuple[str, Any, Tensor]]:
        parts, position = [], 0
        for name, node in self.prototype_trace.iter_stochastic_nodes():
            shape = self._unconstrained_shapes[name]
            part = latents[:, position : position + shape.numel()]
            parts.append((name, biject_to(node["fn"].support), part.reshape(-1, *shape)))
            position += shape.numel()
        return parts

    def unpack(self, latents: Tensor) -> dict[str, Tensor]:
        return {name: transform(part) for name, transform, part in self._parts(latents)}

    def log_joint(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        totals = []
        for row in latents[:, None]:
            total = torch.zeros(())
            for _, transform, u in self._parts(row):
                total = total + transform.log_abs_det_jacobian(u, transform(u)).sum()
            fixed = {name: value[0] for name, value in self.unpack(row).items()}
            trace = poutine.trace(poutine.condition(self.original_model, fixed))
            totals.append(total + trace.get_trace(*args, **kwargs).log_prob_sum())
        return torch.stack(totals)


def guide_of(model: Callable[..., Any], *args: Any) -> StandIn:
    return StandIn(model, *args)


def export(model: Callable[..., Any], *args: Any, **options: Any) -> Any:
    options = {"num_samples": 20, "seed": 0, **options}
    return to_arviz(guide_of(model, *args), *args, **options)


def run_mcmc(model: Any, *args: Any, num_samples: int = 25, kernel: Any = NUTS) -> MCMC:
    mcmc = MCMC(
        kernel(model, max_tree_depth=3) if kernel is NUTS else kernel(model, num_steps=3),
        num_samples=num_samples,
        warmup_steps=20,
        disable_progbar=True,
    )
    mcmc.run(*args)
    return mcmc


def values(idata: Any, group: str, name: str) -> np.ndarray:
    return idata[group][name].values


# -- guides


def test_groups_and_dims_of_a_guide() -> None:
    idata = export(schools, SIGMA, Y)
    shapes = {
        group: {name: (v.dims, v.shape) for name, v in idata[group].data_vars.items()}
        for group in idata.groups()
    }
    draws = ("chain", "draw")
    scalar, by_school = (draws, (1, 20)), ((*draws, "school"), (1, 20, 8))
    latents = {"mu": scalar, "tau": scalar, "eta": by_school, "theta": by_school}
    assert shapes == {
        "posterior": latents,
        "sample_stats": {"lp": scalar, "log_q": scalar, "log_weight": scalar},
        "log_likelihood": {"y": by_school},
        "posterior_predictive": {"y": by_school},
        "prior": latents,
        "prior_predictive": {"y": by_school},
        "observed_data": {"y": (("school",), (8,))},
        "constant_data": {"sigma": (("sigma_dim_0",), (8,))},
    }
    assert list(idata.posterior.data_vars) == ["mu", "tau", "eta", "theta"]
    assert idata.posterior.school.values.tolist() == list(range(8))
    assert idata.posterior.attrs["inference_library"] == "pyro"
    assert idata.posterior.attrs["created_by"] == "pyroflows"


def test_values_of_a_guide() -> None:
    guide = guide_of(schools, SIGMA, Y)
    idata = to_arviz(guide, SIGMA, Y, num_samples=20, seed=0)
    mu, tau, eta = (torch.tensor(values(idata, "posterior", n)[0]) for n in ("mu", "tau", "eta"))
    theta = mu[:, None] + tau[:, None] * eta
    np.testing.assert_allclose(values(idata, "posterior", "theta")[0], theta, rtol=1e-5)
    expected = dist.Normal(theta, SIGMA).log_prob(Y)
    np.testing.assert_allclose(values(idata, "log_likelihood", "y")[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(values(idata, "observed_data", "y"), Y)
    np.testing.assert_array_equal(values(idata, "constant_data", "sigma"), SIGMA)

    latents = torch.cat([mu[:, None], tau.log()[:, None], eta], -1)
    lp = (
        dist.Normal(0.0, 5.0).log_prob(mu)
        + dist.HalfCauchy(5.0).log_prob(tau)
        + tau.log()
        + dist.Normal(0.0, 1.0).log_prob(eta).sum(-1)
        + expected.sum(-1)
    )
    log_q = guide.get_posterior().log_prob(latents).detach()
    stats = {name: values(idata, "sample_stats", name)[0] for name in idata.sample_stats}
    np.testing.assert_allclose(stats["lp"], lp, rtol=1e-4)
    np.testing.assert_allclose(stats["log_q"], log_q, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_q"], rtol=1e-5)


def test_predictions_have_the_right_moments() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(3.0, 2.0))
        with pyro.plate("row", 2):
            pyro.sample("y", dist.Normal(mu, 0.5), obs=y)

    guide = guide_of(model, torch.tensor([10.0, 10.0]))
    idata = to_arviz(guide, torch.tensor([10.0, 10.0]), num_samples=4000, seed=0)
    prior, predicted = values(idata, "prior", "mu")[0], values(idata, "prior_predictive", "y")[0]
    assert abs(prior.mean() - 3.0) < 0.15
    assert abs(prior.std() - 2.0) < 0.1
    noise = (predicted - prior[:, None]) / 0.5
    assert abs(noise.std() - 1.0) < 0.05
    again = values(idata, "posterior_predictive", "y")[0]
    mu = values(idata, "posterior", "mu")[0]
    noise = (again - mu[:, None]) / 0.5
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1.0) < 0.05
    # Two rows, two noises.
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.06


def test_groups_can_be_switched_off() -> None:
    idata = export(schools, SIGMA, Y, log_likelihood=False, posterior_predictive=False, prior=False)
    assert set(idata.groups()) == {
        "posterior",
        "sample_stats",
        "observed_data",
        "constant_data",
    }


def test_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        idata = export(schools, SIGMA.double(), Y.double())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.dtype for v in idata.posterior.data_vars.values()} == {np.dtype("float64")}
    assert values(idata, "log_likelihood", "y").dtype == np.float64


def test_seed_leaves_the_world_alone() -> None:
    network = torch.nn.Linear(1, 1)

    def model(y: Tensor) -> None:
        pyro.module("network", network)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = guide_of(model, torch.tensor(0.3))
    pyro.clear_param_store()
    pyro.param("other", torch.ones(2))
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    rng = torch.get_rng_state()
    first, second = (to_arviz(guide, torch.tensor(0.3), num_samples=5, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), rng)
    for group in first.groups():
        assert first[group].equals(second[group])
    assert list(pyro.get_param_store().keys()) == ["other"]
    assert all(torch.equal(before[n], v) for n, v in guide.state_dict().items())
    assert guide.training
    assert network.training
    assert all(p.grad is None for p in guide.parameters())


def test_auto_flow() -> None:
    guide = AutoFlow(schools, example_args=(SIGMA, Y))
    idata = to_arviz(guide, SIGMA, Y, num_samples=50, seed=0)
    samples = {n: torch.tensor(values(idata, "posterior", n)[0]) for n in ("mu", "tau", "eta")}
    latents = guide.pack(samples)
    stats = idata.sample_stats.isel(chain=0)
    with torch.no_grad():
        log_q = guide.get_posterior().log_prob(latents)
        np.testing.assert_allclose(stats["log_q"], log_q, atol=1e-3)
        np.testing.assert_allclose(stats["lp"], guide.log_joint(latents, SIGMA, Y), rtol=1e-4)
    assert list(idata.posterior) == ["mu", "tau", "eta", "theta"]
    assert guide.training


def test_a_report_goes_along(tmp_path: Path) -> None:
    guide = AutoFlow(schools, example_args=(SIGMA, Y))
    report = pf.psis(guide, SIGMA, Y, num_samples=200, seed=0)
    assert not any(key.startswith("psis") for key in to_arviz(guide, SIGMA, Y).sample_stats.attrs)
    seen = replace(report, missed=0.5)
    for given, named in ((report, "verdict"), (seen, "missed")):
        idata = to_arviz(guide, SIGMA, Y, num_samples=50, report=given)
        idata.sample_stats.to_netcdf(tmp_path / f"{named}.nc")
        attrs = xr.load_dataset(tmp_path / f"{named}.nc").attrs
        figures = given.figures()
        assert named in figures
        for name, value in figures.items():
            assert np.array_equal(attrs[f"psis_{name}"], value)
    assert attrs["psis_verdict"] == "do not trust"
    assert attrs["psis_advice"].startswith("about 33% of the posterior lies")


# -- MCMC


def test_mcmc_agrees_with_az() -> None:
    mcmc = run_mcmc(schools, SIGMA, Y)
    idata, other = to_arviz(mcmc, seed=0, num_samples=10), az.from_pyro(mcmc)
    for name in ("mu", "tau", "eta"):
        np.testing.assert_array_equal(
            values(idata, "posterior", name), values(other, "posterior", name)
        )
    for group in ("log_likelihood", "observed_data"):
        np.testing.assert_allclose(values(idata, group, "y"), values(other, group, "y"), rtol=1e-6)
        assert list(idata[group]) == ["y"]
    np.testing.assert_array_equal(
        values(idata, "sample_stats", "diverging"), values(other, "sample_stats", "diverging")
    )
    assert len(idata.sample_stats.attrs["acceptance_rate"]) == 1
    assert idata.prior.sizes["draw"] == 10


def test_mcmc_keeps_chains_apart() -> None:
    mcmc = run_mcmc(schools, SIGMA, Y)
    # Two chains as Pyro stores them, without the processes.
    mcmc._samples = {name: torch.cat([v, 2 * v]) for name, v in mcmc._samples.items()}
    mcmc._diagnostics = [{"divergences": [3], "acceptance rate": 0.8}, mcmc._diagnostics[0]]
    mcmc.num_chains = 2
    idata = to_arviz(mcmc)
    mu = values(idata, "posterior", "mu")
    assert mu.shape == (2, 25)
    np.testing.assert_array_equal(mu[1], 2 * mu[0])
    loc = torch.tensor(values(idata, "posterior", "theta"))
    expected = dist.Normal(loc, SIGMA).log_prob(Y)
    np.testing.assert_allclose(values(idata, "log_likelihood", "y"), expected, rtol=1e-5)
    assert np.flatnonzero(values(idata, "sample_stats", "diverging")[0]).tolist() == [3]


def test_mcmc_at_other_arguments() -> None:
    mcmc = run_mcmc(schools, SIGMA, Y)
    idata = to_arviz(mcmc, SIGMA, model_kwargs={"y": Y + 1})
    np.testing.assert_array_equal(values(idata, "observed_data", "y"), Y + 1)
    idata = to_arviz(mcmc, model_kwargs={"sigma": SIGMA, "y": Y + 2})
    np.testing.assert_array_equal(values(idata, "observed_data", "y"), Y + 2)


@pytest.mark.parametrize("as_guide", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_neutra_speaks_the_models_language(ours: bool, as_guide: bool) -> None:
    guide = guide_of(schools, SIGMA, Y)
    if not ours:
        guide = AutoMultivariateNormal(schools)
        guide(SIGMA, Y)
    neutra = NeuTraReparam(guide)
    mcmc = run_mcmc(poutine.reparam(schools, config=lambda _: neutra), SIGMA, Y)
    idata = to_arviz(mcmc, neutra=guide if as_guide else neutra)
    assert list(idata.posterior) == ["mu", "tau", "eta", "theta"]
    assert list(idata.observed_data) == ["y"]
    latent = mcmc.get_samples()["mu_shared_latent"]
    expected = guide.get_transform()(latent).detach()
    np.testing.assert_allclose(values(idata, "posterior", "mu")[0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(values(idata, "posterior", "tau")[0], expected[:, 1].exp(), 1e-5)
    np.testing.assert_allclose(values(idata, "posterior", "eta")[0], expected[:, 2:], rtol=1e-5)
    loc = torch.tensor(values(idata, "posterior", "theta"))
    scores = dist.Normal(loc, SIGMA).log_prob(Y)
    np.testing.assert_allclose(values(idata, "log_likelihood", "y"), scores, rtol=1e-4)
    # The prior is the model's, not the guide's: tau has the median of a half-Cauchy.
    assert 4 < np.median(values(idata, "prior", "tau")) < 6.2


def test_forgotten_neutra_is_noticed() -> None:
    neutra = NeuTraReparam(guide_of(schools, SIGMA, Y))
    mcmc = run_mcmc(neutra.reparam(schools), SIGMA, Y, num_samples=4)
    with pytest.raises(ValueError, match="neutra="):
        to_arviz(mcmc)


def test_neutra_of_a_plain_run_is_refused() -> None:
    mcmc = run_mcmc(schools, SIGMA, Y, num_samples=4)
    with pytest.raises(ValueError, match="none in the space of this guide"):
        to_arviz(mcmc, neutra=guide_of(schools, SIGMA, Y))
    with pytest.raises(TypeError, match=r"NeuTraReparam or its guide, got str"):
        to_arviz(mcmc, neutra="guide")


def test_reparametrised_sites_are_posterior() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    decentred = poutine.reparam(model, config={"x": LocScaleReparam(0.0)})
    idata = to_arviz(run_mcmc(decentred, torch.ones(2)))
    assert list(idata.posterior) == ["x_decentered", "x"]
    assert list(idata.observed_data) == ["y"]
    np.testing.assert_allclose(
        values(idata, "posterior", "x"), 2 * values(idata, "posterior", "x_decentered"), rtol=1e-5
    )


def test_neutra_takes_supports_at_the_draw() -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("y", dist.Normal(b, 0.1), obs=y)

    neutra = NeuTraReparam(guide_of(model, torch.tensor(0.5)))
    mcmc = run_mcmc(neutra.reparam(model), torch.tensor(0.5))
    idata = to_arviz(mcmc, neutra=neutra)
    a, b = values(idata, "posterior", "a"), values(idata, "posterior", "b")
    u = neutra.guide.get_transform()(mcmc.get_samples()["a_shared_latent"]).detach().sigmoid()
    np.testing.assert_allclose(a[0], u[:, 0], rtol=1e-5)
    np.testing.assert_allclose(b[0], u[:, 0] * u[:, 1], rtol=1e-5)


def test_a_run_without_a_model() -> None:
    kernel = HMC(potential_fn=lambda z: (z["x"] ** 2).sum() / 2, num_steps=2)
    initial = {"x": torch.zeros(8)}
    mcmc = MCMC(kernel, 20, 5, initial_params=initial, disable_progbar=True)
    mcmc.run()
    with pytest.warns(UserWarning, match="has no model"):
        idata = to_arviz(mcmc)
    assert set(idata.groups()) == {"posterior", "sample_stats"}
    assert idata.posterior["x"].dims == ("chain", "draw", "x_dim_0")
    assert idata.posterior["x"].shape == (1, 20, 8)


# -- plates and shapes


def test_two_plates_and_padding() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("group", 3, dim=-2):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            twice = pyro.deterministic("twice", 2 * loc)
            with pyro.plate("item", 4, dim=-1):
                slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.deterministic("total", slope.sum(-1, keepdim=True) + loc[..., None], 1)
                pyro.sample("y", dist.Normal(twice + slope[..., 0], 1.0), obs=y)

    y = torch.randn(3, 4)
    idata = export(model, y)
    dims = {name: v.dims[2:] for name, v in idata.posterior.data_vars.items()}
    assert dims == {
        "loc": ("group",),
        "twice": ("group",),
        "slope": ("group", "item", "slope_dim_2"),
        "total": ("group", "item", "total_dim_2"),
    }
    loc, slope = (torch.tensor(values(idata, "posterior", n)[0]) for n in ("loc", "slope"))
    expected = dist.Normal(2 * loc[..., None] + slope[..., 0], 1.0).log_prob(y)
    assert idata.log_likelihood["y"].dims == ("chain", "draw", "group", "item")
    np.testing.assert_allclose(values(idata, "log_likelihood", "y")[0], expected, rtol=1e-4)


def test_event_dims_and_observed_events() -> None:
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("row", 5):
            pyro.sample("x", dist.Normal(weights, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 3)
    idata = export(model, x, dims={"x": ["observation", "axis"]}, coords={"axis": ["a", "b", "c"]})
    assert idata.posterior["weights"].dims == ("chain", "draw", "weights_dim_0")
    np.testing.assert_allclose(values(idata, "posterior", "weights").sum(-1), 1, rtol=1e-5)
    assert idata.observed_data["x"].dims == ("observation", "axis")
    assert idata.posterior_predictive["x"].dims == ("chain", "draw", "observation", "axis")
    assert idata.posterior_predictive.axis.values.tolist() == ["a", "b", "c"]
    # A log density has no event axes; the user's names still fit.
    assert idata.log_likelihood["x"].dims == ("chain", "draw", "observation")
    weights = torch.tensor(values(idata, "posterior", "weights")[0])
    expected = dist.Normal(weights[:, None], 1.0).to_event(1).log_prob(x)
    np.testing.assert_allclose(values(idata, "log_likelihood", "x")[0], expected, rtol=1e-4)


def test_coords_override() -> None:
    names = [f"school {letter}" for letter in "ABCDEFGH"]
    idata = export(schools, SIGMA, Y, coords={"school": names}, dims={"sigma": ["school"]})
    assert idata.posterior.school.values.tolist() == names
    assert idata.constant_data["sigma"].dims == ("school",)


@pytest.mark.parametrize("dims", [{"tehta": ["school"]}, {"mu": ["school"]}, {"eta": "school"}])
def test_dims_that_do_not_fit(dims: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(dims))!r}"):
        export(schools, SIGMA, Y, dims=dims)


def test_plate_named_draw() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("draw", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    idata = export(model, torch.zeros(3))
    assert idata.posterior["mu"].dims == ("chain", "draw", "draw_plate")


def test_subsampled_plate_exports_one_minibatch() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y), subsample_size=4) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    y = torch.randn(20)
    with pytest.warns(UserWarning, match="left out|subsampled") as record:
        idata = export(model, y)
    random, part = (str(warning.message) for warning in record)
    assert "'row' is subsampled: the export holds 4 of its 20 rows" in part
    # Each score takes a minibatch of its own, so that it is no log weight.
    assert "lp and log_weight are left out" in random
    assert list(idata.sample_stats) == ["log_q"]
    rows = torch.tensor(idata.observed_data.row.values)
    assert len(rows.unique()) == 4
    np.testing.assert_array_equal(values(idata, "observed_data", "y"), y[rows])
    np.testing.assert_array_equal(idata.log_likelihood.row.values, rows)
    mu = torch.tensor(values(idata, "posterior", "mu")[0])
    expected = dist.Normal(mu[:, None], 1.0).log_prob(y[rows])
    np.testing.assert_allclose(values(idata, "log_likelihood", "y")[0], expected, rtol=1e-4)
    assert "constant_data" not in idata.groups()


def test_data_wider_than_their_distribution(caplog: pytest.LogCaptureFixture) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.randn(20)  # as many as there are draws
    idata = export(model, y)
    mu = torch.tensor(values(idata, "posterior", "mu")[0])
    expected = dist.Normal(mu[:, None], 1.0).log_prob(y)
    np.testing.assert_allclose(values(idata, "log_likelihood", "y")[0], expected, rtol=1e-4)
    noise = values(idata, "posterior_predictive", "y")[0] - mu[:, None].numpy()
    assert len(np.unique(noise.round(4))) > 380
    assert not caplog.records  # no loop over draws


def test_scalar_data_stay_scalar() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    idata = export(model, torch.tensor(0.5))
    assert idata.observed_data["y"].dims == ()
    assert idata.log_likelihood["y"].shape == (1, 20)


def test_one_draw() -> None:
    idata = export(schools, SIGMA, Y, num_samples=1)
    assert idata.posterior["eta"].shape == (1, 1, 8)
    assert idata.log_likelihood["y"].shape == (1, 1, 8)


# -- masks, missing data, factors, sites without draws


def test_masks_and_factors() -> None:
    mask = torch.tensor([True, False, True])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("pull", -mu.abs())
        with pyro.plate("row", 3), poutine.scale(scale=0.1):
            with poutine.mask(mask=mask):
                pyro.sample("a", dist.Normal(mu, 1.0), obs=y)
            pyro.sample("b", dist.Normal(mu, 1.0).mask(mask), obs=y)

    y = torch.tensor([0.1, float("nan"), 0.3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idata = to_arviz(guide_of(model, torch.zeros(3)), y, num_samples=6)
    mu = torch.tensor(values(idata, "posterior", "mu")[0])
    expected = dist.Normal(mu[:, None], 1.0).log_prob(y.nan_to_num()) * mask
    for name in ("a", "b"):
        np.testing.assert_allclose(values(idata, "log_likelihood", name)[0], expected, rtol=1e-4)
    for group in ("log_likelihood", "observed_data", "posterior_predictive", "posterior"):
        assert "pull" not in idata[group]


def test_obs_mask_imputes() -> None:
    seen = torch.tensor([True, False, True])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    y = torch.tensor([0.1, 0.0, 0.3])
    idata = export(model, y)
    assert list(idata.posterior) == ["mu", "y_unobserved", "y"]
    assert idata.posterior["y"].dims == ("chain", "draw", "row")
    imputed = values(idata, "posterior", "y")[0]
    np.testing.assert_array_equal(imputed[:, [0, 2]], np.tile([0.1, 0.3], (20, 1)).astype("f4"))
    np.testing.assert_array_equal(
        imputed[:, 1], values(idata, "posterior", "y_unobserved")[0, :, 1]
    )
    scores = values(idata, "log_likelihood", "y_observed")[0]
    assert (scores[:, 1] == 0).all()
    assert (scores[:, [0, 2]] != 0).all()


def test_nan_data_are_reported() -> None:
    y = Y.clone()
    y[2] = float("nan")
    guide = guide_of(schools, SIGMA, Y)
    with pytest.warns(UserWarning, match=r"'y' is NaN at 1 of 8 data points"):
        idata = to_arviz(guide, SIGMA, y, num_samples=5)
    assert np.isnan(values(idata, "log_likelihood", "y")).sum() == 5


def mixture(x: Tensor) -> None:
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))
    pyro.deterministic("gap", loc[..., 1] - loc[..., 0])
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        centre = pyro.deterministic("centre", loc[..., z])
        pyro.sample("x", dist.Normal(centre, 0.5), obs=x)


@pytest.mark.parametrize("blocked", [False, True])
def test_discrete_sites_that_were_summed_out(blocked: bool) -> None:
    x = torch.tensor([-2.1, -1.9, 2.0])
    if blocked:
        fitted: Any = guide_of(poutine.block(mixture, hide=["z"]), x)
    else:
        fitted = run_mcmc(mixture, x, num_samples=10)
    with pytest.warns(UserWarning, match="left out") as record:
        idata = to_arviz(fitted, x, num_samples=10)
    messages = [str(warning.message) for warning in record]
    assert "log_likelihood of ['x'] is left out: it may depend on ['z']" in messages[-1]
    # The stand-in scores with a random z.
    assert [m.startswith("lp and log_weight") for m in messages[:-1]] == [True] * blocked
    # What comes after z is not a posterior draw; what comes before is.
    assert list(idata.posterior) == ["loc", "gap"]
    assert "log_likelihood" not in idata.groups()
    assert list(idata.posterior_predictive) == ["z", "x"]
    assert idata.posterior_predictive["x"].dims == ("chain", "draw", "row")
    assert list(idata.observed_data) == ["x"]


def test_prediction_at_new_inputs() -> None:
    guide = guide_of(schools, SIGMA, Y)
    with pytest.warns(UserWarning, match="lp and log_weight are left out"):
        idata = to_arviz(guide, SIGMA, num_samples=20)
    assert list(idata.sample_stats) == ["log_q"]
    assert list(idata.posterior_predictive) == ["y"]
    assert list(idata.posterior) == ["mu", "tau", "eta", "theta"]
    assert not {"log_likelihood", "observed_data"} & set(idata.groups())


def test_improper_prior_leaves_the_prior_out() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def proper(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mcmc = run_mcmc(proper, torch.tensor(1.0), num_samples=10)
    with pytest.warns(UserWarning, match="prior is left out"):
        idata = to_arviz(mcmc, model=model)
    assert "prior" not in idata.groups()
    assert idata.log_likelihood["y"].shape == (1, 10)


# -- evaluation at all draws, or one by one


def stacking(y: Tensor) -> None:
    """Fails at all draws at once: the stack puts the draws in the middle."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    w = pyro.deterministic("w", torch.stack([a, b]))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(torch.tensor([[1.0, 0], [0, 1], [1, 1]]) @ w, 1.0), obs=y)


def flattening(y: Tensor) -> None:
    """Runs at all draws at once when there are as many as rows, and is wrong."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.deterministic("w", a.reshape(-1).squeeze() + b.reshape(-1).squeeze())
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(a.reshape(-1) + b.reshape(-1), 1.0), obs=y)


@pytest.mark.parametrize("model", [stacking, flattening])
def test_models_that_do_not_broadcast(
    model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    y = torch.tensor([1.0, -1.0, 2.0])
    with caplog.at_level(logging.WARNING, logger="pyroflows"):
        idata = export(model, y, num_samples=3)
    assert [r.message.startswith("The model does not broadcast") for r in caplog.records] == [True]
    a, b = (torch.tensor(values(idata, "posterior", n)[0]) for n in ("a", "b"))
    loc = torch.stack([a, b, a + b], -1) if model is stacking else (a + b)[:, None].expand(3, 3)
    expected = dist.Normal(loc, 1.0).log_prob(y)
    np.testing.assert_allclose(values(idata, "log_likelihood", "y")[0], expected, rtol=1e-4)
    assert idata.posterior_predictive["y"].shape == (1, 3, 3)
    assert idata.prior_predictive["y"].shape == (1, 3, 3)


def test_a_model_that_broadcasts_runs_few_times(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def model(*args: Tensor) -> None:
        calls.append(1)
        schools(*args)

    mcmc = run_mcmc(schools, SIGMA, Y)
    to_arviz(mcmc, SIGMA, Y, model=model)
    assert len(calls) == 10  # structure, and three runs with two draws checked in each
    assert not caplog.records


# -- the two lines of ArviZ


def test_arviz_functions_and_files(tmp_path: Any) -> None:
    idata = export(schools, SIGMA, Y, num_samples=200)
    summary = az.summary(idata, var_names=["mu", "eta"])
    assert list(summary.index) == ["mu", *[f"eta[{i}]" for i in range(8)]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-hat of a crude guide
        loo = az.loo(idata, pointwise=True)
    assert loo.n_data_points == 8
    assert np.isfinite(loo.elpd_loo)
    idata.to_netcdf(str(tmp_path / "posterior.nc"))
    again = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert set(again.groups()) == set(idata.groups())
    for group in idata.groups():
        assert again[group].equals(idata[group])


def test_data_tree(tmp_path: Any) -> None:
    import_module("arviz_base")
    stats = import_module("arviz_stats")
    xarray = import_module("xarray")
    guide = guide_of(schools, SIGMA, Y)
    options: Any = {"num_samples": 200, "seed": 0}
    idata = to_arviz(guide, SIGMA, Y, backend="arviz", **options)
    tree = to_arviz(guide, SIGMA, Y, backend="arviz-base", **options)
    assert isinstance(idata, az.InferenceData)
    assert isinstance(tree, xarray.DataTree)
    assert set(tree.children) == set(idata.groups())
    for group in idata.groups():
        assert tree[group].to_dataset().equals(idata[group])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert stats.loo(tree).elpd == pytest.approx(az.loo(idata).elpd_loo, abs=0.3)
        assert "eta[0]" in stats.summary(tree).index
    tree.to_netcdf(str(tmp_path / "tree.nc"), engine="h5netcdf")
    with xarray.open_datatree(str(tmp_path / "tree.nc"), engine="h5netcdf") as again:
        assert again.posterior["eta"].equals(tree.posterior["eta"])


@pytest.mark.parametrize(
    ("missing", "backend", "kind"),
    [
        (["arviz"], "auto", "DataTree"),
        (["arviz_base"], "auto", "InferenceData"),
    ],
)
def test_backend_follows_what_is_installed(
    missing: list[str], backend: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "arviz" in missing:
        import_module("arviz_base")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert type(export(schools, SIGMA, Y, backend=backend)).__name__ == kind


def test_arviz_1_makes_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(az, "__version__", "1.0.0")
    assert type(export(schools, SIGMA, Y)).__name__ == "DataTree"


def test_without_arviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(ImportError, match=r"pip install arviz"):
        export(schools, SIGMA, Y)


# -- bad input


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*'arviz-base'.*, got 'xarray'"):
        export(schools, SIGMA, Y, backend="xarray")


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_num_samples(number: Any) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {number}"):
        export(schools, SIGMA, Y, num_samples=number)


def test_what_is_neither_guide_nor_mcmc() -> None:
    with pytest.raises(TypeError, match=r"AutoFlow guide or a pyro.infer.MCMC object, got dict"):
        to_arviz({"mu": torch.zeros(3)})
    with pytest.raises(TypeError, match="got NUTS"):
        to_arviz(NUTS(schools))


def test_missing_arguments_name_the_model() -> None:
    guide = guide_of(schools, SIGMA, Y)
    with pytest.raises(TypeError, match=r"model\(sigma.*missing a required argument: 'sigma'"):
        to_arviz(guide)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        to_arviz(guide, SIGMA, model_kwargs={"z": Y})


def test_mcmc_that_has_not_run() -> None:
    with pytest.raises(ValueError, match=r"no draws yet. Call its run\(\)"):
        to_arviz(MCMC(NUTS(schools), 10))


def test_neutra_with_a_guide() -> None:
    guide = guide_of(schools, SIGMA, Y)
    with pytest.raises(TypeError, match="leave neutra out"):
        to_arviz(guide, SIGMA, Y, neutra=guide)


def test_leave_one_out_corrects_for_the_guide() -> None:
    """ArviZ's correction for approximate posteriors takes the scores that are exported."""
    stats = pytest.importorskip("arviz_stats")
    base = pytest.importorskip("arviz_base")
    estimates = {}
    for name, length in {"rough": {"budget": 0}, "trained": {"steps": 600}}.items():
        guide = AutoFlow(schools, name=name)
        pf.fit_svi(guide, SIGMA, Y, **length, seed=0, progress=False, psis_samples=0)
        parts = {"posterior_predictive": False, "prior": False}
        idata = to_arviz(guide, SIGMA, Y, num_samples=40_000, seed=0, **parts)
        tree = base.convert_to_datatree(idata)
        scores = {key: tree.sample_stats[key].values.ravel() for key in ("lp", "log_q")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large Pareto shapes, which a rough guide has
            estimates[name] = float(stats.loo(tree).elpd)
            corrected = stats.loo_approximate_posterior(tree, scores["lp"], scores["log_q"])
            estimates[f"{name}, corrected"] = float(corrected.elpd)
    assert estimates["trained, corrected"] == pytest.approx(estimates["trained"], abs=0.02)
    assert estimates["rough, corrected"] == pytest.approx(estimates["trained"], abs=0.05)
    # Far off, if it is a number at all.
    assert not abs(estimates["rough"] - estimates["trained"]) < 10
