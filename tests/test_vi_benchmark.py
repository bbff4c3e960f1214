"""The benchmark of guides: its truths, its ruler, its counts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from tests.benchmarks.vi import dims, methods, nasty, report, runs
from tests.benchmarks.vi.__main__ import jobs
from tests.benchmarks.vi.asides import POSTERIORS as ASIDES
from tests.benchmarks.vi.posterior import Draws, Truth, scalars, stacked
from tests.benchmarks.vi.table import POSTERIORS
from tests.benchmarks.vi.truths import bridge_of_chains, hmc, split_rhat

# --- the ruler --------------------------------------------------------------------------------


def test_names_are_those_of_stan() -> None:
    draws = {"tau": torch.zeros(3), "beta": torch.ones(3, 2), "c": torch.zeros(3, 1, 2)}
    assert list(scalars(draws)) == ["tau", "beta[1]", "beta[2]", "c[1,1]", "c[1,2]"]
    back = stacked(scalars({"tau": draws["tau"], "beta": draws["beta"]}))
    assert back["tau"].shape == (3,)
    assert back["beta"].shape == (3, 2)


@pytest.mark.parametrize("quantiles", [False, True])
def test_errors_in_units_of_the_truth(quantiles: bool) -> None:
    x = {"a": 2.0 * torch.randn(200_000) + 3.0, "b": torch.randn(200_000)}
    truth = Truth({"a": 1.0, "b": 0.0}, {"a": 4.0, "b": 1.0}, quantiles=quantiles)
    centre, spread = truth.errors(x)
    assert centre == pytest.approx(0.5, abs=0.01)  # 3 for 1, in spreads of 4
    assert spread == pytest.approx(math.log(2), abs=0.01)  # 2 for 4


@pytest.mark.parametrize("quantiles", [False, True])
def test_weighted_errors(quantiles: bool) -> None:
    """Draws of a wide normal, weighted to a narrow one."""
    x = 2.0 * torch.randn(200_000)
    log_ratio = dist.Normal(0.5, 1.0).log_prob(x) - dist.Normal(0.0, 2.0).log_prob(x)
    truth = Truth({"a": 0.5}, {"a": 1.0}, quantiles=quantiles)
    centre, spread = truth.errors({"a": x}, log_ratio.double().softmax(0))
    assert centre < 0.02
    assert spread < 0.02


def test_a_nan_is_not_lost() -> None:
    truth = Truth({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0})
    errors = truth.errors({"a": torch.full((9,), torch.nan), "b": torch.arange(9.0)})
    assert all(math.isnan(error) for error in errors)


# --- truths -----------------------------------------------------------------------------------


def draw_funnel(n: int) -> Draws:
    v = 3 * torch.randn(n)
    return {"v": v, "x": (v / 2).exp()[:, None] * torch.randn(n, nasty.FUNNEL - 1)}


def draw_modes(n: int) -> Draws:
    which = (torch.rand(n) < nasty.SHARES[1]).long()
    return {"x": torch.tensor(nasty.MODES)[which] + torch.randn(n, 2)}


def draw_banana(n: int) -> Draws:
    a = 2 * torch.randn(n)
    return {"a": a, "b": 0.5 * a**2 + 0.5 * torch.randn(n)}


def draw_ring(n: int) -> Draws:
    """Rejection from a circle thickened by normals, whose density lacks the factor r."""
    radius = nasty.RADIUS + nasty.THICKNESS * torch.randn(3 * n)
    radius = radius[torch.rand(3 * n) < radius / 8][:n]
    angle = 2 * math.pi * torch.rand(len(radius))
    return {"x": radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)}


def draw_student(n: int) -> Draws:
    return {"x": dist.StudentT(2.0, 1.0, 2.0).sample((n, nasty.STUDENT))}


DRAWN = {
    "funnel": draw_funnel,
    "two_modes": draw_modes,
    "banana": draw_banana,
    "ring": draw_ring,
    "student": draw_student,
}


@pytest.mark.parametrize("name", DRAWN)
def test_truth_is_that_of_exact_draws(name: str) -> None:
    centre, spread = POSTERIORS[name].truth().errors(scalars(DRAWN[name](50_000)))
    # The worst of a hundred, in standard errors of 0.0056 (a median) or less than 0.01 (a spread).
    assert centre < 0.03
    assert spread < 0.03


def test_horseshoe_by_importance_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three coefficients, by draws of the prior; so few leave the common scale wide open."""
    monkeypatch.setattr(nasty, "LOG_TAU", (-20.0, 10.0, 400))
    y, n = torch.tensor([0.5, 2.0, -1.0]), 500_000
    truth = nasty.horseshoe_truth(y)
    tau = dist.HalfCauchy(0.1).sample((n,)).double()
    lam = dist.HalfCauchy(1.0).sample((n, 3)).double()
    beta = torch.randn(n, 3) * lam * tau[:, None]
    log_weights = dist.Normal(beta, 1.0).log_prob(y).sum(-1)
    weights = log_weights.exp()
    error = (weights.std() / weights.mean()).item() / n**0.5
    assert error < 0.01
    assert abs(weights.mean().log().item() - truth.log_evidence) < 4 * error
    draws = scalars({"beta": beta, "log_tau": tau.log()})
    centre, spread = truth.errors(draws, weights / weights.sum())
    assert centre < 5 * error
    assert spread < 5 * error


def evidence_and_moments(name: str) -> tuple[Truth, tuple[float, float], tuple[float, float]]:
    """The truth, and what many chains and the bridge say."""
    posterior = POSTERIORS[name]
    args = posterior.args()
    guide = pf.AutoFlow(posterior.model, example_args=args)

    def log_density(u: Tensor) -> Tensor:
        return guide.log_joint(u, *args)

    u = hmc(log_density, torch.randn(64, guide.latent_dim), adapt=80, keep=60)
    assert split_rhat(u).max() < 1.1
    flat = u.flatten(0, 1)
    errors = posterior.truth().errors(posterior.scalars(guide.unpack(flat)))
    return posterior.truth(), bridge_of_chains(log_density, u), errors


@pytest.mark.parametrize("name", ["gamma_poisson", "collinear"])
def test_chains_and_bridge_find_a_closed_form(name: str) -> None:
    truth, (evidence, error), (centre, spread) = evidence_and_moments(name)
    assert truth.log_evidence is not None
    assert error < 0.1
    assert abs(evidence - truth.log_evidence) < 5 * error
    assert centre < 0.1
    assert spread < 0.1


@pytest.mark.parametrize("posterior", ASIDES, ids=lambda p: p.name)
def test_asides_have_a_stored_truth(posterior: object) -> None:
    args = posterior.args()
    guide = pf.AutoFlow(posterior.model, example_args=args)
    draws = posterior.scalars(guide.sample(2, *args))
    truth = posterior.truth()
    assert set(truth.centre) == set(truth.spread) == set(draws)
    assert all(value > 0 for value in truth.spread.values())


# --- methods ----------------------------------------------------------------------------------


def test_ours_counts_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    fit_svi = pf.fit_svi
    monkeypatch.setattr(
        pf, "fit_svi", lambda *a, **k: fit_svi(*a, steps=10, draws=8, psis_samples=500, **k)
    )
    posterior = POSTERIORS["gamma_poisson"]
    answer = methods.ours(posterior, posterior.args(), 0)
    assert answer.count.gradients >= 80
    assert answer.count.densities >= answer.count.gradients + 500
    assert answer.weights is not None
    assert answer.weights.sum().item() == pytest.approx(1.0)
    assert len(answer.draws["rate"]) == 500


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"])
def test_pyro_guides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "STEPS", 20)
    posterior = POSTERIORS["banana"]
    answer = methods.METHODS[name](posterior, posterior.args(), 0)
    assert answer.count.gradients == 20 * methods.PARTICLES
    assert answer.notes["elbo"] < 0.05  # the evidence is zero
    assert answer.draws["a"].shape == (methods.DRAWS,)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_nuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "WARM_UP", 100)
    monkeypatch.setattr(methods, "NUTS_DRAWS", 100)
    posterior = POSTERIORS["ring"]  # has an improper prior, from which Pyro cannot start
    answer = methods.nuts(posterior, (), 0)
    assert answer.draws["x"].shape == (100, 2)
    assert answer.count.gradients > 100
    radius = answer.draws["x"].norm(dim=-1)
    assert radius.mean().item() == pytest.approx(5.02, abs=0.2)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_nuts_stops_at_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "NUTS_CAP", 0.0)
    posterior = POSTERIORS["gamma_poisson"]
    with pytest.raises(TimeoutError, match="0 s of CPU are over"):
        methods.nuts(posterior, posterior.args(), 0)


# --- runs and the page ------------------------------------------------------------------------


def test_a_run_that_fails_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    runs.in_process(runs.run, ("no such posterior", "NUTS", 0), path)
    assert json.loads(path.read_text()) == {"problem": "KeyError: 'no such posterior'"}
    path.write_text("kept")
    runs.in_process(runs.run, ("no such posterior", "NUTS", 0), path)
    assert path.read_text() == "kept"


def test_a_run_that_is_killed_is_a_result(tmp_path: Path) -> None:
    runs.in_process(os.abort, (), tmp_path / "result.json")
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["problem"].startswith("ended by signal 6")


def test_jobs_have_all_seeds_for_ours_alone() -> None:
    assert jobs(["ring", "arK"], ["pyroflows", "NumPyro NUTS"], [3, 4]) == [
        ("ring", "pyroflows", 3),
        ("arK", "pyroflows", 3),
        ("ring", "pyroflows", 4),
        ("arK", "pyroflows", 4),
        ("arK", "NumPyro NUTS", 3),
    ]


def stored_result(**changes: Any) -> dict[str, Any]:
    keys = ("centre_error", "spread_error", "weighted_centre_error", "weighted_spread_error")
    return {
        **dict.fromkeys(keys, 0.1),
        "seconds": 3.0,
        "densities": 5000,
        "gradients": 4000,
        "k_hat": 0.3,
        "ess_fraction": 0.9,
        "log_evidence": 0.02,
        "elbo": -0.1,
        "verdict": "good",
        **changes,
    }


def test_the_page_tells_silent_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    found = {
        ("banana", "pyroflows", 0): stored_result(),
        ("banana", "pyroflows", 1): stored_result(centre_error=0.5),
        ("two_modes", "pyroflows", 0): stored_result(centre_error=0.5, verdict="do not trust"),
        ("student", "pyroflows", 0): stored_result(
            centre_error=math.nan, verdict="use with weights"
        ),
        ("ring", "pyroflows", 0): {"problem": "FitError: nowhere finite"},
        ("banana", "NUTS", 0): {
            "seconds": 9.0,
            "centre_error": 2.0,
            "gradients": 12_000,
        },
    }
    ended = {"centre_error": 0.1, "gradients": 9_000}
    for name, ours, theirs in (("arK", 1.0, 10.0), ("blr", 4.0, 10.0), ("nes", 5.0, 600.0)):
        found[name, "pyroflows", 0] = stored_result(seconds=ours)
        found[name, "NUTS", 0] = {**ended, "seconds": theirs}
    found["nes", "NUTS", 0]["stopped"] = "over 600 s"
    for job, result in found.items():
        runs.path_of(*job).write_text(json.dumps(result))
    page = report.text()
    # Right: the first banana, and Student's t by its weights.
    assert "| nasty | pyroflows | 5 | 2 | 1 | 1 | 3.0 |" in page
    assert "| nasty | NUTS | 1 | 0 | - | - | 9.0 |" in page
    assert "- banana, seed 1: a centre is off by 0.50 spreads" in page
    assert "| banana | 2 | 0.30 (0.50) | 0.10 (0.10) |" in page
    assert "| +0.020 | -0.100 | 3.0 | 5 |" in page  # its evidence is zero
    assert "| banana | 0.30, 3.0 s, 4k | 2.00, 9.0 s, 12k |" in page
    assert "geometric mean of the 2 of\nposteriordb on which NUTS ended: 0.200." in page
    assert "- ring, pyroflows, seed 0: FitError: nowhere finite" in page


def test_cost_by_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dims, "MORE", 20)
    cost = dims.measure(5)
    assert cost["dtype"] == "torch.float32"
    assert cost["finite"]
    assert abs(cost["elbo_gap"]) < 1.0
