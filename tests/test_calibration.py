"""Calibration: right posteriors pass, wrong ones do not, at the rates that are stated."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.diagnostics import SBC, LocalC2ST
from pyroflows.errors import DataError, ShapeError
from pyroflows.layers import CouplingLayer

NOISE = 0.5


def model() -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mean, NOISE).to_event(1))


def linear(features: int, context: int) -> pf.Flow:
    """Normal with a mean linear in the context: the posterior is one of these."""
    layer = CouplingLayer(features, context, mask=[True] * features, hidden_features=())
    return pf.Flow([layer], features, context)


def exact_ranks(seed: int, width: float, simulations: int = 500, draws: int = 99) -> Tensor:
    """Of the conjugate posterior of a normal mean, as wide as it should be or not."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(simulations, generator=generator)
    y = z + NOISE * torch.randn(simulations, generator=generator)
    precision = 1 + 1 / NOISE**2
    noise = torch.randn(draws, simulations, generator=generator)
    posterior = y / NOISE**2 / precision + width * precision**-0.5 * noise
    return (posterior < z).sum(0)


def test_error_rates_over_twenty_seeds() -> None:
    """One false alarm in twenty is the stated rate: more than four have a chance of 0.3%."""
    right = [SBC({"z": exact_ranks(seed, 1.0)}, draws=99).passed for seed in range(20)]
    assert right.count(False) <= 4
    narrow = [SBC({"z": exact_ranks(seed, 0.7)}, draws=99).passed for seed in range(20)]
    assert not any(narrow)
    wide = [SBC({"z": exact_ranks(seed, 1.5)}, draws=99).passed for seed in range(20)]
    assert not any(wide)


def test_alarms_of_several_quantities_add_up_to_the_rate() -> None:
    alarms = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.randint(0, 20, (5, 200), generator=generator)
        test = SBC(dict(zip("abcde", ranks, strict=True)), draws=19, error=0.2)
        alarms += not test.passed
    # At most 8 expected; more than 14 have a chance of 0.8%.
    assert alarms <= 14


def test_the_band_holds_what_passes() -> None:
    test = SBC({"z": exact_ranks(1, 1.0)}, draws=99)
    points, low, high = test.band()
    distribution = (test.ranks["z"].numpy()[:, None] < np.round(points * 100)).mean(0)
    assert test.passed
    assert ((low <= distribution) & (distribution <= high)).all()
    wrong = SBC({"z": exact_ranks(1, 0.5)}, draws=99)
    distribution = (wrong.ranks["z"].numpy()[:, None] < np.round(points * 100)).mean(0)
    assert not ((low <= distribution) & (distribution <= high)).all()
    assert (low <= points).all()
    assert (points <= high).all()


@pytest.fixture(scope="module")
def fitted() -> Any:
    torch.manual_seed(0)
    guide = pf.AutoAmortizedFlow(model, observed=["y"], flow=linear)
    pf.fit_npe(guide, simulations=20_000, steps=1000, lr=0.01, seed=0, progress=False)
    return guide


def narrowed(guide: Any) -> Any:
    """The same guide with every posterior narrower by a third about its centre."""
    narrow = pf.AutoAmortizedFlow(model, observed=["y"], flow=linear)
    narrow.read()
    narrow.load_state_dict(guide.state_dict())
    with torch.no_grad():
        narrow.flow().transform.layers[0].network.context.bias[2:] -= 0.4
    return narrow


def test_a_fitted_guide_and_one_that_is_too_sure(fitted: Any) -> None:
    test = pf.sbc(fitted, simulations=500, seed=0)
    assert list(test.ranks) == ["density", "mean[0]", "mean[1]"]
    assert test.simulations == 500
    assert test.passed, str(test)
    assert "calibrated as far as can be seen" in str(test)
    assert test.coverage([0.9])[0.9] == pytest.approx(0.9, abs=0.05)
    narrow = pf.sbc(narrowed(fitted), simulations=500, seed=0)
    assert not narrow.passed
    assert narrow.coverage([0.9])[0.9] < 0.85
    assert "not calibrated" in str(narrow)


def test_local_test_at_one_observation(fitted: Any) -> None:
    y = torch.tensor([0.5, -0.5])
    options = {"simulations": 2000, "trials": 19, "seed": 0}
    right = pf.local_c2st(fitted, y, **options)
    wrong = pf.local_c2st(narrowed(fitted), y, **options)
    assert isinstance(right, LocalC2ST)
    assert right.p_value > 0.05
    assert wrong.p_value == 0.05
    assert wrong.statistic > 2 * right.statistic
    assert wrong.statistic > 2 * wrong.null.max()


def test_classifier_accuracy_between_normals() -> None:
    """Of two unit normals two apart the best classifier is right with probability Phi(1)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1500, 2, generator=generator)
    assert pf.c2st(x, y, folds=2) == pytest.approx(0.5, abs=0.05)
    shift = torch.tensor([2.0, 0.0])
    assert pf.c2st(x, y + shift, folds=2) == pytest.approx(0.841, abs=0.025)
    # Units and constant columns do not matter.
    constant = torch.ones(1500, 1)
    again = pf.c2st(
        1e3 * torch.cat([x, constant], 1), 1e3 * torch.cat([y + shift, constant], 1), folds=2
    )
    assert again == pytest.approx(0.841, abs=0.025)


def test_plot() -> None:
    matplotlib.use("agg")
    ax = SBC({"z": exact_ranks(0, 1.0), "w": exact_ranks(1, 1.0)}, draws=99).plot()
    assert len(ax.lines) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SBC({"z": torch.zeros(3, 2)}, draws=9), ShapeError, r"got \(3, 2\)"),
        (lambda: SBC({"z": torch.tensor([10])}, draws=9), DataError, "integers from 0 to 9"),
        (lambda: SBC({"z": torch.tensor([1])}, draws=9, error=0.0), ValueError, "error: expected"),
        (
            lambda: SBC({"z": torch.tensor([1])}, draws=9).coverage(),
            ValueError,
            "ranks of the density",
        ),
        (lambda: pf.c2st(torch.zeros(3, 2), torch.zeros(4, 2)), ShapeError, r"\(3, 2\).*\(4, 2\)"),
        (
            lambda: pf.c2st(torch.zeros(3, 1), torch.full((3, 1), torch.nan)),
            DataError,
            "finite numbers",
        ),
        (lambda: pf.sbc(pf.AutoFlow(model)), TypeError, "expected an AutoAmortizedFlow"),  # type: ignore[arg-type]
        (
            lambda: pf.sbc(pf.AutoAmortizedFlow(model, observed=["y"]), draws=0),
            ValueError,
            "draws: expected at least 1",
        ),
        (
            lambda: pf.local_c2st(
                pf.AutoAmortizedFlow(model, observed=["y"]), torch.zeros(2), trials=0
            ),
            ValueError,
            "trials: expected at least 1",
        ),
    ],
)
def test_errors(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
