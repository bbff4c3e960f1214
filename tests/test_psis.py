"""Pareto-smoothed importance sampling against closed forms, and its verdicts."""

from __future__ import annotations

import builtins
import math
from importlib import import_module
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyroflows as pf
from pyroflows.diagnostics.psis import weigh
from tests.models import (
    MIXTURE_DATA,
    exact_gaussian_guide,
    gaussian,
    gaussian_data,
    gaussian_evidence,
    gaussian_posterior,
    mixture,
    mixture_log_joint,
    set_to_normal,
)


def scaled_guide(y: Tensor, scale: float, shift: float = 0.0) -> pf.AutoFlow:
    """The posterior with all deviations scaled, and its mean moved by so many of them."""
    posterior = gaussian_posterior(y)
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    loc = posterior.loc + shift * posterior.stddev
    return set_to_normal(guide, MultivariateNormal(loc, scale**2 * posterior.covariance_matrix))


Y = gaussian_data(dtype=torch.float64)


# --- known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_posterior_itself(dtype: torch.dtype) -> None:
    y = Y.to(dtype)
    report = pf.psis(exact_gaussian_guide(y), y, num_samples=1000, seed=0)
    assert isinstance(report, pf.PSIS)
    assert report.k_hat == -math.inf
    assert report.k_hat_interval == (-math.inf, -math.inf)
    assert report.ess == pytest.approx(1000)
    assert report.verdict == "good"
    precision = 1e-4 if dtype == torch.float32 else 1e-9
    assert report.log_evidence == pytest.approx(gaussian_evidence(Y), abs=precision)
    assert report.elbo == pytest.approx(gaussian_evidence(Y), abs=precision)
    assert report.log_evidence_error < precision
    assert report.log_weights.exp().sum().item() == pytest.approx(1.0)


def test_a_guide_that_is_too_wide() -> None:
    """Bounded weights: fine to use, reweighted. All numbers have a closed form."""
    scale = 2.0
    report = pf.psis(scaled_guide(Y, scale), Y, num_samples=20_000, seed=0)
    divergence = 2 * (math.log(1 / scale) + (scale**2 - 1) / 2)
    second_moment = (scale**2 / math.sqrt(2 * scale**2 - 1)) ** 2  # of each weight over its mean
    assert report.k_hat < 0.3
    assert report.verdict == "use with weights"
    assert report.ess == pytest.approx(20_000 / second_moment, rel=0.05)
    error = math.sqrt((second_moment - 1) / 20_000)
    assert report.log_evidence_error == pytest.approx(error, rel=0.1)
    assert abs(report.log_evidence - gaussian_evidence(Y)) < 4 * error
    assert gaussian_evidence(Y) - report.elbo == pytest.approx(divergence, rel=0.05)


@pytest.mark.parametrize("scale", [0.6, 0.85])
def test_k_hat_of_a_narrow_guide(scale: float) -> None:
    """The weights' tail is Pareto with shape 1 - scale^2, in two dimensions up to logarithms."""
    k_hats = [
        pf.psis(scaled_guide(Y, scale), Y, num_samples=10_000, seed=seed).k_hat for seed in range(5)
    ]
    assert np.mean(k_hats) == pytest.approx(1 - scale**2, abs=0.15)


def test_a_guide_that_is_much_too_narrow() -> None:
    report = pf.psis(scaled_guide(Y, 0.3), Y, seed=0)
    assert report.k_hat > 0.7
    assert report.k_hat_interval[0] < report.k_hat < report.k_hat_interval[1]
    assert report.verdict == "do not trust"
    assert "do not trust: a few draws carry most of the weight: fit longer" in str(report)


def test_a_guide_in_the_wrong_place() -> None:
    report = pf.psis(scaled_guide(Y, 1.0, shift=6.0), Y, seed=0)
    assert report.verdict == "do not trust"
    assert report.ess < 100


def test_a_nearly_exact_guide_is_good_whatever_the_shape_of_its_noise() -> None:
    """Weights within a few percent: k-hat of their bumps is large, and means nothing."""
    log_weights = 0.02 * torch.randn(10_000).double()
    log_weights[:20] = 0.5
    report = weigh(log_weights, torch.zeros(10_000), torch.zeros(10_000, 1), lambda u: {"u": u})
    assert report.k_hat > 0.7
    assert report.ess > 9900
    assert report.verdict == "good"


def test_the_default_number_of_draws_has_a_narrow_spread() -> None:
    reports = [pf.psis(scaled_guide(Y, 0.7), Y, seed=seed) for seed in range(8)]
    k_hats = np.array([report.k_hat for report in reports])
    assert reports[0].num_samples == 10_000
    assert k_hats.std() < 0.12
    widths = [high - low for low, high in (report.k_hat_interval for report in reports)]
    # A 90% interval is 3.3 deviations wide.
    assert np.mean(widths) / 3.3 == pytest.approx(k_hats.std(), abs=0.06)


@pytest.mark.parametrize(
    ("num_samples", "threshold"), [(100, 0.5), (1000, 2 / 3), (10_000, 0.7), (10**6, 0.7)]
)
def test_the_threshold_depends_on_the_number_of_draws(num_samples: int, threshold: float) -> None:
    zeros = torch.zeros(num_samples)
    report = weigh(zeros, zeros, zeros.unsqueeze(-1), lambda u: {"u": u})
    assert report.threshold == pytest.approx(threshold)


# --- resample -------------------------------------------------------------------------------------


def test_resample_corrects_the_moments() -> None:
    posterior = gaussian_posterior(Y)
    guide = scaled_guide(Y, 1.5, shift=1.0)
    report = pf.psis(guide, Y, num_samples=40_000, seed=0)
    raw, draws = guide.sample(40_000)["mean"], report.resample(40_000, seed=1)["mean"]
    assert draws.shape == (40_000, 2)
    error = 5 * posterior.stddev / math.sqrt(min(report.ess, 20_000))
    assert ((raw.mean(0) - posterior.mean).abs() > 0.8 * posterior.stddev).all()
    assert ((draws.mean(0) - posterior.mean).abs() < error).all()
    assert torch.allclose(draws.T.cov(), posterior.covariance_matrix, atol=0.02)


def test_resample_gives_sites_in_their_own_space() -> None:
    def model() -> None:
        pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))

    guide = pf.AutoFlow(model, init_scale=0.5, example_args=())
    draws = pf.psis(guide, num_samples=200, seed=0).resample(7)
    assert {name: tuple(v.shape) for name, v in draws.items()} == {"scale": (7,), "share": (7, 3)}
    assert (draws["scale"] > 0).all()
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        pf.psis(guide, num_samples=200).resample(0)


def test_seeds() -> None:
    guide = scaled_guide(Y, 1.5)
    state = torch.random.get_rng_state()
    first, again, other = (pf.psis(guide, Y, num_samples=200, seed=s) for s in (1, 1, 2))
    same = first.resample(20, seed=3)["mean"], again.resample(20, seed=3)["mean"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(*same)
    assert not torch.equal(first.latents, other.latents)


# --- awkward models -------------------------------------------------------------------------------


def test_draws_that_are_not_a_number_are_dropped_and_counted() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(1.0, 0.5))
        pyro.sample("y", dist.Normal(0.0, z), obs=y)  # no scale below zero

    init = init_to_value(values={"z": torch.tensor(1.0)})
    guide = pf.AutoFlow(model, init_loc_fn=init, init_scale=0.5, example_args=(torch.tensor(0.3),))
    report = pf.psis(guide, torch.tensor(0.3), num_samples=5000, seed=0)
    negative = int((report.latents[:, 0] <= 0).sum())
    assert report.dropped == negative > 50
    assert f"dropped        {negative} draws" in str(report)
    assert (report.resample(500)["z"] > 0).all()
    # The evidence is an integral over positive z alone.
    z = torch.linspace(1e-4, 5, 100_001).double()
    joint = dist.Normal(1.0, 0.5).log_prob(z) + dist.Normal(0.0, z).log_prob(torch.tensor(0.3))
    evidence = torch.trapezoid(joint.exp(), z).log().item()
    assert report.log_evidence == pytest.approx(evidence, abs=5 * report.log_evidence_error)


def test_draws_outside_the_support_weigh_nothing() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(z > 0, 0.0, -torch.inf))

    init = init_to_value(values={"z": torch.tensor(0.0)})
    guide = pf.AutoFlow(model, init_loc_fn=init, init_scale=1.0, example_args=())
    report = pf.psis(guide, num_samples=4000, seed=0)
    assert report.dropped == 0
    assert report.log_evidence == pytest.approx(math.log(0.5), abs=0.08)
    assert report.ess == pytest.approx(2000, rel=0.1)
    assert (report.resample(100)["z"] > 0).all()


def test_hardly_any_usable_draw_is_not_to_be_trusted() -> None:
    log_p = torch.full((1000,), -torch.inf)
    log_p[3] = 0.0
    report = weigh(log_p, torch.zeros(1000), torch.zeros(1000, 1), lambda u: {"u": u})
    assert report.verdict == "do not trust"
    assert report.ess == pytest.approx(1.0)
    assert report.log_evidence == pytest.approx(-math.log(1000))


def test_an_infinite_density_is_dropped() -> None:
    log_p = torch.zeros(1000)
    log_p[:2] = torch.inf
    report = weigh(log_p, torch.zeros(1000), torch.zeros(1000, 1), lambda u: {"u": u})
    assert report.dropped == 2
    assert report.log_weights[:2].tolist() == [-math.inf, -math.inf]
    assert math.isfinite(report.log_evidence)


def test_enumerated_models_have_finite_weights() -> None:
    """Against the hand-written density with the discretes summed out."""
    init = init_to_value(values={"share": torch.tensor(0.5), "loc": torch.tensor([-1.7, 1.7])})
    guide = pf.AutoFlow(mixture, init_loc_fn=init, init_scale=0.5, example_args=(MIXTURE_DATA,))
    report = pf.psis(guide, MIXTURE_DATA, num_samples=2000, seed=0)
    assert math.isfinite(report.k_hat)
    assert report.ess > 100
    u = report.latents
    with torch.no_grad():
        share = u[:, 0].sigmoid()
        jacobian = share.log() + (1 - share).log()
        log_p = mixture_log_joint(guide.unpack(u), MIXTURE_DATA) + jacobian
        log_q = guide.get_posterior().log_prob(u)
    expected = (log_p - log_q).logsumexp(0) - math.log(2000)
    assert report.log_evidence == pytest.approx(expected.item(), abs=1e-4)


def test_subsampled_data_are_warned_of() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    y = torch.randn(50)
    guide = pf.AutoFlow(model, example_args=(y,))
    with pytest.warns(UserWarning, match="scores the same draw differently each time"):
        pf.psis(guide, y, num_samples=200)


def test_the_last_chunk_may_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = scaled_guide(Y, 1.5)
    whole = pf.psis(guide, Y, num_samples=301, seed=0)
    monkeypatch.setitem(weigh.__globals__, "CHUNK", 100)
    chunked = pf.psis(guide, Y, num_samples=301, seed=0)
    assert torch.allclose(chunked.log_weights, whole.log_weights)


def test_psis_leaves_no_trace() -> None:
    guide = pf.AutoFlow(gaussian)
    pf.psis(guide, Y, num_samples=200)
    assert not pyro.get_param_store().keys()
    assert torch.is_grad_enabled()


# --- errors ---------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    guide = scaled_guide(Y, 1.0)
    with pytest.raises(ValueError, match="num_samples: expected at least 100 draws, got 99"):
        pf.psis(guide, Y, num_samples=99)
    with pytest.raises(TypeError, match="guide: expected an AutoFlow, got AutoNormal"):
        pf.psis(AutoNormal(gaussian), Y)  # type: ignore[arg-type]

    def never() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.full_like(z, -torch.inf))

    with pytest.raises(ValueError, match=r"zero or not a number at all 200 draws.*support"):
        pf.psis(pf.AutoFlow(never, example_args=()), num_samples=200)


# --- ArviZ ----------------------------------------------------------------------------------------


def without_arviz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the 1.x line's parts are installed."""
    real = builtins.__import__

    def importer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "arviz":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importer)


@pytest.mark.parametrize("line", ["arviz", "arviz_stats"])
@pytest.mark.parametrize("shape", [0.3, 0.7, 1.2])
def test_it_agrees_with_arviz(shape: float, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact Pareto weights, with the tail on the side where it belongs."""
    raw = shape * np.random.default_rng(0).exponential(size=10_000)
    expected, k_hat = arviz.psislw(raw.copy())
    if line == "arviz_stats":
        import_module("arviz_stats")
        without_arviz(monkeypatch)
        with pytest.raises(ImportError):
            import arviz as _  # noqa: F401
    zeros = torch.zeros(10_000)
    report = weigh(torch.from_numpy(raw), zeros, zeros.unsqueeze(-1), lambda u: {"u": u})
    assert report.k_hat == pytest.approx(shape, abs=0.2)
    assert report.k_hat == pytest.approx(float(k_hat), abs=0.05)
    assert torch.allclose(report.log_weights, torch.from_numpy(expected), atol=0.05)
    assert report.ess == pytest.approx(1 / np.exp(2 * expected).sum(), rel=0.05)
