"""`run_mcmc`: exact draws, under the model's own names, and what refuses to start."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

import pyroflows as pf
from pyroflows.mcmc.compiled import compiled
from pyroflows.mcmc.fisher import Learner, diagonal, fisher_divergence
from pyroflows.mcmc.imh import _Sampler
from pyroflows.mcmc.kernels import stacked
from pyroflows.mcmc.target import Target
from pyroflows.testing import redraw_
from tests.models import (
    MIXTURE_DATA,
    SCHOOL_ERRORS,
    SCHOOLS,
    eight_schools,
    exact_gaussian_guide,
    gaussian,
    gaussian_data,
    gaussian_posterior,
    mixture,
)

needs_nutpie = pytest.mark.skipif(find_spec("nutpie") is None, reason="needs the nutpie extra")
NUTPIE = pytest.param("nutpie", marks=needs_nutpie)
every_kernel = pytest.mark.parametrize("kernel", ["nuts", NUTPIE, "imh"])

SMALL = partial(pf.RealNVP, transforms=2, hidden_features=(8,), mixing="lu")
SHORT: dict[str, Any] = {"chains": 2, "draws": 60, "warmup": 40, "seed": 0}


def rough_guide(model: Callable[..., Any], *args: Any) -> pf.AutoFlow:
    """One that has seen a few steps: its flow is far from exact, and not the identity."""
    guide = pf.AutoFlow(model, SMALL)
    pf.fit_svi(guide, *args, steps=60, lr=0.02, psis_samples=0, seed=0)
    return guide


def within_error(idata: Any, name: str, truth: Tensor, sigmas: float = 4.0) -> bool:
    """Whether the posterior mean is within Monte Carlo error of the truth, in every entry."""
    error = az.mcse(idata, var_names=[name])[name].values
    apart = np.abs(idata.posterior[name].mean(("chain", "draw")).values - truth.numpy())
    return bool((apart < sigmas * error).all())


# --- draws ------------------------------------------------------------------------------------


def wrong_guide(y: Tensor, scales: list[float]) -> pf.AutoFlow:
    """Off by half a standard deviation, and too wide or too narrow."""
    guide = rough_guide(gaussian, y)
    with torch.no_grad():
        guide.flow.transform.standardization.loc += 0.25
        guide.flow.transform.standardization.scale *= torch.tensor(scales)
    return guide


@pytest.mark.parametrize("kernel", ["nuts", NUTPIE])
def test_draws_of_nuts_are_those_of_the_posterior(kernel: str) -> None:
    y = gaussian_data()
    options = {"chains": 2, "draws": 300, "warmup": 150, "seed": 0}
    idata = pf.run_mcmc(gaussian, y, guide=wrong_guide(y, [0.7, 1.5]), kernel=kernel, **options)
    posterior = gaussian_posterior(y)
    assert float(az.rhat(idata)["mean"].max()) < 1.05  # of 600 draws
    assert within_error(idata, "mean", posterior.loc)
    draws = idata.posterior["mean"].values.reshape(-1, 2)
    # Three standard errors of a variance from 300 effective draws.
    np.testing.assert_allclose(np.cov(draws.T), posterior.covariance_matrix, atol=0.055)


@pytest.mark.parametrize("local_steps", [0, 2])
def test_draws_of_many_chains_are_those_of_the_posterior(local_steps: int) -> None:
    """The last draws of all chains are independent, so that a test of goodness of fit holds.

    The guide is too wide: chains forget their start at a steady rate, which they would not do where
    it is too narrow.
    """
    y = gaussian_data()
    kernel = pf.mcmc.IMH(local_steps=local_steps)
    options = {"chains": 1000, "draws": 10, "warmup": 60, "seed": 0}
    idata = pf.run_mcmc(gaussian, y, guide=wrong_guide(y, [1.2, 1.5]), kernel=kernel, **options)
    last = idata.posterior["mean"].values[:, -1]
    posterior = gaussian_posterior(y)
    scales = posterior.covariance_matrix.diagonal().sqrt()
    for x, loc, scale in zip(last.T, posterior.loc, scales, strict=True):
        assert stats.kstest(x, stats.norm(float(loc), float(scale)).cdf).pvalue > 0.01
    assert (
        abs(
            np.corrcoef(last.T)[0, 1]
            - float(posterior.covariance_matrix[0, 1]) / float(scales.prod())
        )
        < 0.1
    )
    assert 0.1 < float(idata.sample_stats["acceptance_rate"].mean()) < 0.9


def test_local_moves_alone_leave_the_posterior_as_it_is() -> None:
    y = gaussian_data()
    target = Target(exact_gaussian_guide(y), (y,), {})
    sampler = _Sampler(target, gradients=True)
    sampler.log_step = 0.3  # so long that many moves are refused
    state = start = sampler.states(target.base.sample((2000,)))
    for _ in range(10):
        state = sampler.local(state, adapt=False)
    moved = (state.z != start.z).all(-1)
    assert float(moved.double().mean()) > 0.1
    for x in state.z.T.numpy():
        assert stats.kstest(x, stats.norm.cdf).pvalue > 0.01


def test_an_exact_guide_makes_the_target_a_standard_normal() -> None:
    y = gaussian_data()
    target = Target(exact_gaussian_guide(y), (y,), {})
    z = torch.randn(50, 2)
    constant = target.log_density(z) - target.base.log_prob(z)
    assert float(constant.detach().std()) < 1e-4
    _, grads = target.values_and_grads(z)
    torch.testing.assert_close(grads, -z, atol=1e-3, rtol=1e-3)


NUTS_STATS = {"diverging", "acceptance_rate", "n_steps", "step_size"}
NUTPIE_STATS = {*NUTS_STATS, "tree_depth", "reached_max_treedepth", "energy"}
KERNEL_STATS = {"nuts": NUTS_STATS, "nutpie": NUTPIE_STATS, "imh": {"acceptance_rate"}}


@every_kernel
def test_names_dims_and_groups_of_the_export(kernel: str) -> None:
    guide = rough_guide(eight_schools, SCHOOL_ERRORS, SCHOOLS)
    idata = pf.run_mcmc(eight_schools, SCHOOL_ERRORS, SCHOOLS, guide=guide, kernel=kernel, **SHORT)
    by_school = ("chain", "draw", "schools")
    assert {name: v.dims for name, v in idata.posterior.data_vars.items()} == {
        "mu": by_school[:2],
        "tau": by_school[:2],
        "eta": by_school,
        "theta": by_school,
    }
    assert idata.posterior["eta"].shape == (2, 60, 8)
    assert bool((idata.posterior["tau"] > 0).all())
    assert idata.log_likelihood["y"].dims == by_school
    assert "y" in idata.observed_data
    found = idata.sample_stats
    assert set(found.data_vars) == {"lp", *KERNEL_STATS[kernel]}
    assert all(v.shape == (2, 60) for v in found.data_vars.values())
    assert bool(((found["acceptance_rate"] >= 0) & (found["acceptance_rate"] <= 1)).all())
    if kernel == "imh":
        assert found.attrs["density_evaluations"] == 2 * (1 + 60 + 40)
    else:
        assert found.attrs["gradient_evaluations"] > int(found["n_steps"].sum())


def test_lp_is_the_log_density_of_the_latents() -> None:
    y = torch.tensor(0.7)

    def model() -> None:
        scale = pyro.sample("scale", dist.Exponential(1.0))
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    idata = pf.run_mcmc(model, guide=rough_guide(model), kernel="imh", **SHORT)
    scale = torch.tensor(idata.posterior["scale"].values)
    expected = dist.Exponential(1.0).log_prob(scale) + dist.Normal(0.0, scale).log_prob(y)
    # In the unconstrained space, log(scale) or whatever Pyro takes for it.
    expected = expected + scale.log()
    np.testing.assert_allclose(idata.sample_stats["lp"].values, expected, rtol=1e-4, atol=1e-4)


def test_constrained_sites() -> None:
    counts = torch.tensor([3.0, 1.0, 0.0])

    def model() -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        pyro.factor("counts", (counts * shares.log()).sum(-1))

    options = {"kernel": "imh", "chains": 50, "draws": 40, "seed": 0}
    idata = pf.run_mcmc(model, guide=rough_guide(model), **options)
    shares = idata.posterior["shares"]
    np.testing.assert_allclose(shares.sum("shares_dim_0"), 1.0, rtol=1e-5)
    assert within_error(idata, "shares", (counts + 1) / (counts + 1).sum())


def test_enumerated_sites_are_summed_out() -> None:
    guide = rough_guide(mixture, MIXTURE_DATA)
    with pytest.warns(UserWarning, match="log_likelihood of"):
        idata = pf.run_mcmc(mixture, MIXTURE_DATA, guide=guide, kernel="imh", **SHORT)
    assert set(idata.posterior.data_vars) == {"share", "loc"}


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_model(dtype: torch.dtype, kernel: str) -> None:
    y = gaussian_data(dtype=dtype)
    options: dict[str, Any] = {"kernel": kernel, "chains": 1, "draws": 5, "warmup": 5}
    idata = pf.run_mcmc(gaussian, y, guide=rough_guide(gaussian, y), **options)
    assert idata.posterior["mean"].dtype == np.dtype(str(dtype).split(".")[1])


@every_kernel
def test_seeds(kernel: str) -> None:
    y = gaussian_data()
    guide = rough_guide(gaussian, y)
    state = torch.get_rng_state()
    options: dict[str, Any] = {"kernel": kernel, "chains": 3, "draws": 10, "warmup": 10}
    one, two, three = (
        pf.run_mcmc(gaussian, y, guide=guide, **options, seed=seed).posterior["mean"].values
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (one == two).all()
    assert (one != three).any()


def test_without_a_guide_one_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    y = gaussian_data()
    pf_fit = partial(pf.fit_svi, steps=50)
    monkeypatch.setattr("pyroflows.mcmc.run.fit_svi", pf_fit)
    idata = pf.run_mcmc(gaussian, y, **SHORT)
    assert idata.sample_stats.attrs["guide_k_hat"] < 10
    assert not pyro.get_param_store().keys(), "the guide leaves nothing in the param store"


def test_without_preconditioning() -> None:
    y = gaussian_data()
    idata = pf.run_mcmc(gaussian, y, precondition=False, chains=2, draws=300, warmup=100, seed=0)
    assert idata.sample_stats.attrs["preconditioned"] == 0
    assert within_error(idata, "mean", gaussian_posterior(y).loc)


def test_the_1_x_line_of_arviz() -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("arviz_base")
    y = gaussian_data()
    options = {**SHORT, "kernel": "imh", "draws": 10, "backend": "arviz-base"}
    tree = pf.run_mcmc(gaussian, y, guide=rough_guide(gaussian, y), **options)
    assert isinstance(tree, xarray.DataTree)
    assert tree["posterior"]["mean"].shape == (2, 10, 2)


def test_a_guide_of_a_model_with_the_same_sites_preconditions_this_one() -> None:
    """The density is that of the model that was given, not of the guide's."""
    y = gaussian_data()
    guide = rough_guide(gaussian, y)

    def other(y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(y.new_zeros(2) + 3, 0.1).to_event(1))

    idata = pf.run_mcmc(other, y, guide=guide, chains=2, draws=60, warmup=100, seed=0)
    assert within_error(idata, "mean", torch.full((2,), 3.0))


def test_an_interrupted_run_returns_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyroflows.mcmc.nuts import _Run

    y = gaussian_data()
    calls = 0
    after_draw = _Run._after_draw

    def interrupted(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 150:
            raise KeyboardInterrupt
        after_draw(self, *args)

    monkeypatch.setattr(_Run, "_after_draw", interrupted)
    with pytest.warns(UserWarning, match="interrupted: 1 chains of 60 draws"):
        idata = pf.run_mcmc(gaussian, y, guide=rough_guide(gaussian, y), **SHORT)
    assert idata.posterior["mean"].shape == (1, 60, 2)


def test_chains_of_unequal_length_keep_as_many_draws_as_can_be() -> None:
    chains = [[torch.tensor(float(c))] * n for c, n in enumerate((100, 3, 90))]
    assert stacked(chains).shape == (2, 90)
    assert stacked(chains[:2]).shape == (1, 100)
    assert stacked(chains)[1, 0] == 2


# --- a flow learned in the warm-up ------------------------------------------------------------


def banana(u: Tensor) -> Tensor:
    """A curved density in the plane, ``(S, 2)`` to ``(S,)``."""
    x, y = u.unbind(-1)
    return -(x**2) / 2 - (y - x**2) ** 2


def score(u: Tensor) -> Tensor:
    u = u.detach().requires_grad_()
    return torch.autograd.grad(banana(u).sum(), u)[0]


def test_fisher_divergence_is_the_difference_of_scores() -> None:
    """Pulled back through the Jacobian, which a loop over its rows confirms."""
    flow = pf.RealNVP(2, transforms=2, hidden_features=(8,)).double()
    redraw_(flow, 0.3)
    u = torch.randn(4, 2).double()
    transform = flow.transform.condition()
    found = fisher_divergence(transform, u, score(u))
    for point, value in zip(u, found, strict=True):
        z = transform.inv(point).detach()
        jacobian = torch.autograd.functional.jacobian(transform, z)
        point = point.clone().requires_grad_()
        (of_flow,) = torch.autograd.grad(flow().log_prob(point), point)
        torch.testing.assert_close(
            value, ((score(point[None])[0] - of_flow) @ jacobian).square().sum()
        )


def test_the_diagonal_map_of_a_normal_is_exact() -> None:
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([0.1, 5.0])
    u = loc + scale * torch.randn(50, 2)
    found = diagonal(u, (loc - u) / scale**2)
    for one, other in zip(found, (loc, scale), strict=True):
        torch.testing.assert_close(one, other)


@needs_nutpie
def test_the_maps_of_an_adapter_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """By nutpie's contract: one point, seen from the straightened space and from outside."""

    def curved() -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("curve", -((u[..., 1] - u[..., 0] ** 2) ** 2))

    monkeypatch.setattr("pyroflows.mcmc.fisher.STEPS", 40)
    target = Target(pf.AutoFlow(curved, SMALL, example_args=()), (), {}, precondition=False)
    probes = torch.randn(9, 2)
    learner = Learner(target, None, probes, seed=0)
    u = torch.randn(120, 2)
    _, grads = target.values_and_grads(u)
    adapter = learner.new_adapter(0, u[0].numpy(), grads[0].numpy(), 0)
    diagonal_map = adapter.init_from_transformed_position(np.array([0.3, -0.2]))
    adapter.update(0, list(u.double().numpy()), list(grads.double().numpy()), [0.0] * 120)
    assert (adapter.transformation_id, learner.trained) == (1, True)
    learned_map = adapter.init_from_transformed_position(np.array([0.3, -0.2]))
    assert not np.allclose(diagonal_map[2], learned_map[2])
    value, log_det, position, grad, pulled = learned_map
    back = adapter.init_from_untransformed_position(position)
    for one, other in zip(back, (value, log_det, grad, [0.3, -0.2], pulled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(
        adapter.inv_transform(position, grad), (log_det, [0.3, -0.2], pulled), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    # The pulled-back gradient is that of log density and log-determinant together.
    step = 1e-2
    for axis in range(2):
        ends = []
        for sign in (1, -1):
            z = np.array([0.3, -0.2])
            z[axis] += sign * step
            ends.append(sum(adapter.init_from_transformed_position(z)[:2]))
        np.testing.assert_allclose(
            (ends[0] - ends[1]) / (2 * step), pulled[axis], rtol=0.05, atol=0.02
        )


@needs_nutpie
def test_a_learned_flow_leaves_the_posterior_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyroflows.mcmc.fisher.STEPS", 40)
    y = gaussian_data()
    kernel = pf.mcmc.Nutpie(adapt=True)
    options = {"chains": 2, "draws": 150, "warmup": 150, "seed": 0}
    idata = pf.run_mcmc(gaussian, y, kernel=kernel, precondition=False, **options)
    assert within_error(idata, "mean", gaussian_posterior(y).loc)
    assert int(idata.sample_stats["diverging"].sum()) == 0


@pytest.mark.slow
@needs_nutpie
def test_a_funnel_in_a_hundred_dimensions() -> None:
    """Nutpie's own flows need 42,527 gradients for 1,836 effective draws of this funnel."""

    def funnel() -> None:
        log_sigma = pyro.sample("log_sigma", dist.Normal(0.0, 1.0))
        with pyro.plate("dims", 100):
            pyro.sample("x", dist.Normal(0.0, (log_sigma / 2).exp()))

    kernel = pf.mcmc.Nutpie(adapt=True)
    options = {"chains": 2, "draws": 1500, "posterior_predictive": False, "seed": 0}
    idata = pf.run_mcmc(funnel, kernel=kernel, precondition=False, **options)
    effective = az.ess(idata)
    assert min(float(effective[name].min()) for name in effective) >= 1800
    assert idata.sample_stats.attrs["gradient_evaluations"] <= 42_500
    assert int(idata.sample_stats["diverging"].sum()) == 0
    assert within_error(idata, "log_sigma", torch.tensor(0.0))
    assert abs(float(idata.posterior["log_sigma"].std()) - 1) < 0.1


# --- recorded densities -----------------------------------------------------------------------


def quadratic(z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = -(z**2).sum() * torch.linspace(1, 2, 3).exp().sum()
        (grad,) = torch.autograd.grad(value, z)
    return value.detach(), grad


def test_a_recorded_function_is_the_function(caplog: pytest.LogCaptureFixture) -> None:
    probes = torch.randn(5, 3)
    record = compiled(quadratic, probes)
    assert record is not quadratic
    for z in torch.randn(5, 3):
        for found, expected in zip(record(z), quadratic(z), strict=True):
            torch.testing.assert_close(found, expected)
    assert not caplog.records


def branches(z: Tensor) -> tuple[Tensor, Tensor]:
    return quadratic(z) if z.sum() > 0 else quadratic(2 * z)


def outside_torch(z: Tensor) -> tuple[Tensor, Tensor]:
    value, grad = quadratic(z)
    return torch.tensor(float(value.numpy())), grad


@pytest.mark.parametrize("function", [branches, outside_torch])
def test_what_cannot_be_recorded_is_called(function: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert compiled(function, torch.randn(5, 3)) is function
    assert "cannot be recorded" in caplog.text


# --- errors -----------------------------------------------------------------------------------


def test_no_latents() -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="expected latent variables"):
        pf.run_mcmc(model, seed=0)


def test_discrete_latents_are_named() -> None:
    def model() -> None:
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("member", dist.Bernoulli(share))

    with pytest.raises(ValueError, match="discrete sample site 'member'"):
        pf.run_mcmc(model, seed=0)


def test_a_guide_of_other_sites_is_refused() -> None:
    y = gaussian_data()

    def other(y: Tensor) -> None:
        pyro.sample("centre", dist.Normal(y.new_zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guide: expected one of this model.*centre.*mean"):
        pf.run_mcmc(other, y, guide=rough_guide(gaussian, y), seed=0)
    with pytest.raises(TypeError, match="guide: expected an AutoFlow, got function"):
        pf.run_mcmc(other, y, guide=other, seed=0)  # type: ignore[arg-type]


def test_a_start_without_density_names_the_site() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("flat", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=True):
            pyro.sample("broken", dist.Normal(y * scale, 1.0), obs=torch.tensor(0.0))

    guide = pf.AutoFlow(model, SMALL, example_args=(torch.tensor(1.0),))
    with pytest.raises(ValueError, match=r"cannot start.*not finite is that of \['broken'\]"):
        pf.run_mcmc(model, torch.tensor(torch.nan), guide=guide, **SHORT)


def test_a_random_density_is_refused() -> None:
    data = torch.randn(20)

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20, subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=data[rows])

    with pytest.raises(ValueError, match="differently each time"):
        pf.run_mcmc(model, guide=pf.AutoFlow(model, SMALL, example_args=()), **SHORT)


def test_a_base_that_is_no_whole_space_is_refused() -> None:
    y = gaussian_data()
    box = pf.distributions.UniformBox(2, 0.0, 1.0)
    guide = pf.AutoFlow(gaussian, pf.Flow([], 2, base=box), example_args=(y,))
    with pytest.raises(ValueError, match="base covers the whole space"):
        pf.run_mcmc(gaussian, y, guide=guide, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "hmc"}, r"kernel: expected one of \['imh', 'nutpie', 'nuts'\]"),
        ({"kernel": 3}, "kernel: expected one of"),
        ({"chains": 0}, "chains: expected an integer of at least 1, got 0"),
        ({"draws": 2.5}, "draws: expected an integer"),
        ({"warmup": True}, "warmup: expected an integer"),
        ({"kernel": "imh", "precondition": False}, "proposes from the guide"),
        pytest.param(
            {"kernel": pf.mcmc.Nutpie(low_rank=True, adapt=True)},
            "expected one of them",
            marks=needs_nutpie,
        ),
        ({"kernel": pf.mcmc.IMH(-1)}, "local_steps: expected at least 0"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    y = gaussian_data()
    with pytest.raises(ValueError, match=message):
        pf.run_mcmc(gaussian, y, guide=exact_gaussian_guide(y), **options)


def test_without_nutpie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nutpie", None)
    y = gaussian_data()
    with pytest.raises(ImportError, match=r"needs the package nutpie.*pyroflows\[nutpie\]"):
        pf.run_mcmc(gaussian, y, guide=exact_gaussian_guide(y), kernel="nutpie")


def test_a_guide_whose_proposals_are_refused() -> None:
    y = gaussian_data()
    guide = exact_gaussian_guide(y)
    with torch.no_grad():
        guide.flow.transform.standardization.loc += 20
    with pytest.warns(UserWarning, match=r"proposals 0\.\d% are accepted"):
        pf.run_mcmc(gaussian, y, guide=guide, kernel="imh", **SHORT)


def test_arguments_that_the_model_does_not_take() -> None:
    with pytest.raises(TypeError, match="does not accept the arguments given"):
        pf.run_mcmc(gaussian)
