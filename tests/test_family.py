"""What holds for every recipe of the catalogue alike."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.distributions import StandardNormal
from pyroflows.errors import DataError
from pyroflows.testing import redraw_
from tests.recipes import NAMES, small, takes

every_recipe = pytest.mark.parametrize("name", NAMES)
every_context = pytest.mark.parametrize("context", [0, 2], ids=["", "context"])


def redrawn(name: str, features: int, context: int = 0, scale: float = 0.3) -> pf.Flow:
    """A recipe in float64 away from its start."""
    torch.manual_seed(3)
    flow = small(name, features, context).double()
    redraw_(flow, scale)
    return flow


# --- draws and density agree ------------------------------------------------------------------


def moments_matched(draws: Tensor, shrunk: float) -> torch.distributions.Distribution:
    """A normal within the draws: their moments, narrower."""
    return torch.distributions.MultivariateNormal(draws.mean(0), shrunk * draws.mT.cov())


def wave(x: Tensor) -> Tensor:
    """A density on the torus."""
    return (1 + 0.5 * x.sum(-1).cos() + 0.5 * x[..., 0].sin()) / (2 * math.pi) ** x.shape[-1]


@every_recipe
@pytest.mark.parametrize("features", [2, 8])
@every_context
def test_draws_follow_the_density(name: str, features: int, context: int) -> None:
    """Importance sampling: the mean of g/q over draws of q is the integral of g, here one.

    It is not where the density is another's than the draws', or does not integrate to one.
    """
    flow = redrawn(name, features, context)
    given = torch.randn(context, dtype=torch.float64) if context else None
    # Roots of quadratures take long; block flows bend the space most.
    count, shrunk = 1024 if name == "UNAF" else 4096, 0.3 if name == "BNAF" else 0.6
    with torch.no_grad():
        q = flow(given)
        pilot, x = q.sample((2 * count,)).chunk(2)
        g = wave(x) if name == "NCSF" else moments_matched(pilot, shrunk).log_prob(x).exp()
        weights = g / q.log_prob(x).exp()
    error = weights.std() / count**0.5
    assert error < (0.2 if name == "BNAF" else 0.05), "g is not covered: nothing would be seen"
    assert abs(weights.mean() - 1) < 4 * error


# --- files and copies -------------------------------------------------------------------------


@every_recipe
@every_context
def test_files_and_copies_keep_the_density(name: str, context: int, tmp_path: Path) -> None:
    flow = redrawn(name, 3, context)
    given = torch.randn(5, context, dtype=torch.float64) if context else None
    with torch.no_grad():
        x = flow(given).sample() if context else flow().sample((5,))
        expected = flow(given).log_prob(x)
        pf.save(flow, tmp_path / "flow")
        for other in (pf.load(tmp_path / "flow"), copy.deepcopy(flow)):
            assert torch.equal(other(given).log_prob(x), expected)
        fresh = small(name, 3, context).double()
        fresh.load_state_dict(flow.state_dict())
        assert torch.equal(fresh(given).log_prob(x), expected)


# --- bad arguments ----------------------------------------------------------------------------

# Option, value, what the message says; every recipe that has the option is tried.
IMPOSSIBLE: list[tuple[str, Any, str]] = [
    ("features", 0, "expected features >= 1, got features=0"),
    ("features", -1, "expected features >= 1, got features=-1"),
    ("features", 2.5, "expected features to be an integer, got 2.5"),
    ("features", True, "expected features to be an integer, got True"),
    ("context", -1, "expected context >= 0, got context=-1"),
    ("context", "3", "expected context to be an integer, got '3'"),
    ("transforms", 0, "expected transforms >= 1, got transforms=0"),
    ("transforms", -1, "expected transforms >= 1, got transforms=-1"),
    ("hidden_features", (0,), "hidden_features: expected positive integers"),
    ("hidden_features", (8, -1), "hidden_features: expected positive integers"),
    ("hidden_features", (2.5,), "hidden_features: expected positive integers"),
    ("hidden_features", 8, "hidden_features: expected positive integers, .* got 8"),
    ("activation", "relu", r"activation: expected a module class .* mean torch\.nn\.ReLU "),
    ("activation", nn.ReLU(), "activation: expected a module class"),
    ("univariate", "affine", "univariate: expected a recipe .* got 'affine'"),
    ("bins", 0, "at least one bin"),
    ("bound", 0.0, "a positive bound"),
    ("bound", math.nan, "a positive bound"),
    ("bound", math.inf, "a positive bound"),
    ("max_log_scale", 0.0, "max_log_scale: expected a positive bound"),
    ("max_log_scale", math.nan, "max_log_scale: expected a positive bound"),
    ("units", 0, "at least one unit"),
    ("depth", 0, "one layer, got units=4, depth=0"),
    ("degree", 0, "expected a degree of at least"),
    ("components", 0, "components: expected at least one"),
    ("rank", 0, "rank: expected 1 to 3"),
    ("rank", 4, r"rank: expected 1 to 3 \(the features\), got 4"),
    ("lipschitz", 1.0, "lipschitz: expected a number between 0 and 1, got 1.0"),
    ("heads", 3, "heads that divide the width; got width=8, heads=3"),
    ("width", 0, "expected positive width"),
    ("blocks", 0, "expected positive width, heads and blocks"),
    ("steps", 0, "steps: expected at least 1"),
    ("tolerance", 0.0, "tolerance: expected a positive number"),
    ("mixing", "luu", "mixing: expected 'lu', 'orthogonal'"),
    ("spline", "cubic", "spline: expected 'quadratic' or 'linear', got 'cubic'"),
    ("one_pass", "both", "one_pass: expected 'forward' or 'inverse', got 'both'"),
    ("log_det", "none", "log_det: expected 'auto', 'exact' or 'unbiased'"),
    ("trace", "none", "trace: expected 'auto', 'exact' or 'hutchinson'"),
    ("solver", "euler", "solver: expected one of .*'rk4'"),
    ("noise", "normal", "noise: expected one of .*'gaussian'"),
    ("base", "normal", "base: expected an instance .* got 'normal'"),
    ("base", StandardNormal, "base: expected an instance"),
    ("base", StandardNormal(2), r"base: expected event shape \(3,\), got \(2,\)"),
    ("support", "positive", "support: expected a constraint"),
]


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        pytest.param(name, option, value, message, id=f"{name}-{option}-{value}")
        for option, value, message in IMPOSSIBLE
        for name in NAMES
        if takes(name, option)
    ],
)
def test_impossible_arguments(name: str, option: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        small(**{"name": name, "features": 3, option: value})


def test_impossible_arguments_cover_every_option() -> None:
    """But for switches, which Python takes as true or false."""
    tried = {option for option, _, _ in IMPOSSIBLE}
    options = {o for name in NAMES for o in inspect.signature(pf.get_flow(name)).parameters}
    assert options - tried == {"act_norm", "adjoint", "autoregressive"}


@every_recipe
def test_near_names_are_offered(name: str) -> None:
    assert pf.get_flow(name.lower()) is pf.get_flow(name)
    with pytest.raises(ValueError, match=f"got '{name}x'. Did you mean .*{name}"):
        pf.get_flow(f"{name}x")


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "support")])
def test_violations_name_the_column_and_the_first_row(name: str) -> None:
    rows = torch.rand(100, 3)
    rows[[7, 40], 1] = -1.0
    supports = [constraints.unit_interval, constraints.positive, constraints.real]
    message = "column 1 must be greater than 0.0, but row 7 has -1; 2 of 100 rows"
    with pytest.raises(DataError, match=message):
        pf.fit_mle(small(name, 3, support=supports), rows, steps=1)


def test_angles_beyond_the_circle_are_named() -> None:
    rows = torch.zeros(100, 3)
    rows[3, 2] = 4.0
    with pytest.raises(DataError, match=r"column 2 must be in .*, but row 3 has 4"):
        pf.fit_mle(small("NCSF", 3), rows, steps=1)
