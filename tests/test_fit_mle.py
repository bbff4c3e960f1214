"""Maximum likelihood: what it reaches, what it leaves alone, how it ends."""

from __future__ import annotations

import copy
import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows.errors import FitError
from pyroflows.training import History, MLEFit, NegativeLogLikelihood


def small(features: int = 2, context: int = 0, **kwargs: Any) -> pf.Flow:
    return pf.RealNVP(features, context, transforms=2, hidden_features=(16,), **kwargs)


def correlated(rows: int = 600, dtype: torch.dtype = torch.float32) -> Tensor:
    """Far from the origin, in units that differ by a thousand."""
    factor = torch.tensor([[1.0, 0.0], [2000.0, 3000.0]], dtype=dtype)
    return torch.tensor([50.0, -1e4], dtype=dtype) + torch.randn(rows, 2, dtype=dtype) @ factor.T


def fit(flow: pf.Flow, *data: Any, **kwargs: Any) -> MLEFit:
    return pf.fit_mle(flow, *data, **{"steps": 100, "seed": 0, "progress": False, **kwargs})


def as_loader(*tensors: Tensor) -> DataLoader[Any]:
    rows = TensorDataset(*tensors) if len(tensors) > 1 else tensors[0]
    return DataLoader(rows, batch_size=64, shuffle=True)  # type: ignore[arg-type]


def normal_nats(train: Tensor, test: Tensor) -> float:
    normal = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    return -normal.log_prob(test).mean().item()


# --- what it reaches ------------------------------------------------------------------------------


def test_it_finds_a_normal_in_the_users_units() -> None:
    x = correlated(4000)
    flow = small()
    result = fit(flow, x[:2000], steps=200, lr=3e-3)
    held_out = -flow().log_prob(x[2000:]).mean().item()
    assert held_out == pytest.approx(normal_nats(x[:2000], x[2000:]), abs=0.05)
    assert result.history.best[1] == pytest.approx(held_out, abs=0.25)  # of 200 validation rows


def test_densities_are_those_of_the_users_units() -> None:
    x = correlated(dtype=torch.float64)
    flow = small().double()
    fit(flow, x, lr=3e-3)
    axes = [torch.linspace(-8, 8, 401).double() * x[:, i].std() + x[:, i].mean() for i in (0, 1)]
    grid = torch.cartesian_prod(*axes).reshape(401, 401, 2)
    with torch.no_grad():
        density = flow().log_prob(grid).exp()
    mass = torch.trapezoid(torch.trapezoid(density, axes[1]), axes[0])
    assert mass.item() == pytest.approx(1.0, abs=1e-4)


def curved(rows: int) -> Tensor:
    z = torch.randn(rows, 2)
    return torch.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], -1)


def test_it_beats_a_normal_on_a_curved_set() -> None:
    x = curved(3000)
    flow = pf.NSF(2, transforms=3, hidden_features=(32,))
    fit(flow, x[:2000], steps=300, lr=5e-3)
    held_out = -flow().log_prob(x[2000:]).mean().item()
    truth = math.log(2 * math.pi) + 1 + math.log(0.3)  # the entropy of two normals
    assert held_out < normal_nats(x[:2000], x[2000:]) - 0.8
    assert held_out == pytest.approx(truth, abs=0.2)


def test_a_conditional_density() -> None:
    context = 3.0 + torch.randn(2000, 1)
    x = 100.0 + 10.0 * context + torch.randn(2000, 1)
    flow = small(1, 1)
    fit(flow, x, context, steps=300, lr=0.01)
    with torch.no_grad():
        draws = flow(torch.tensor([[2.0], [4.0]])).sample((2000,)).squeeze(-1)
    assert draws.mean(0).tolist() == pytest.approx([120.0, 140.0], abs=0.6)
    assert draws.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.3)


# --- validation, stopping, the best state ---------------------------------------------------------


def test_validation_rows_may_be_given() -> None:
    x, held_out = torch.randn(100, 2), torch.randn(37, 2)
    flow = small()
    result = fit(flow, x, validation=held_out.numpy())
    step, best = result.history.best
    assert -flow().log_prob(held_out).mean().item() == pytest.approx(best, abs=1e-5)
    assert step in {s for s, _ in result.history.checks}
    assert torch.allclose(flow.transform.standardization.loc, x.mean(0))  # of all training rows


def test_validation_pairs_may_be_given() -> None:
    x, context = torch.randn(60, 2), torch.randn(60, 1)
    flow = small(2, 1)
    result = fit(flow, x[:40], context[:40], validation=(x[40:], context[40:]), steps=10)
    score = -flow(context[40:]).log_prob(x[40:]).mean().item()
    assert score == pytest.approx(result.history.best[1], abs=1e-5)


def test_a_loader_may_be_validated() -> None:
    x = torch.randn(100, 2)
    flow = small()
    result = fit(flow, as_loader(x[:80]), validation=x[80:], steps=10)
    assert -flow().log_prob(x[80:]).mean().item() == pytest.approx(result.history.best[1], abs=1e-5)


def test_without_validation_all_rows_train_and_nothing_stops() -> None:
    x = torch.randn(20, 2)
    flow = small()
    result = fit(flow, x, validation=0, steps=60, lr=0.05, patience=1)
    assert result.stop_reason == "all steps were done"
    assert torch.allclose(flow.transform.standardization.loc, x.mean(0))
    # The mean loss since the last check stands in.
    assert result.history.checks[0] == (1, pytest.approx(result.history.losses[0]))


def test_the_start_and_the_first_steps_are_checked() -> None:
    x = torch.randn(100, 2)
    result = fit(small(), x, steps=500, patience=None)
    steps = [step for step, _ in result.history.checks]
    assert steps == [0, 1, 2, 4, 8, *range(10, 501, 10)]


def test_a_fit_that_only_does_harm_leaves_the_start() -> None:
    x, held_out = torch.randn(12, 10), torch.randn(500, 10)
    flow = pf.NSF(10)
    result = fit(flow, x, validation=held_out, steps=100, lr=0.5, standardize=False)
    assert result.history.best[0] == 0
    assert torch.equal(flow().log_prob(held_out), pf.NSF(10)().log_prob(held_out))


def test_it_stops_early_and_says_why() -> None:
    x = torch.randn(30, 2)
    flow = pf.NSF(2, transforms=2)
    result = fit(flow, x, steps=1000, lr=0.02, patience=3)
    assert result.stop_reason == "the loss has not improved for 3 checks"
    assert len(result.history.losses) < 1000
    # Those of the first steps are no reason to stop.
    assert result.history.best[0] < result.history.checks[-3][0]
    assert "3 checks" in str(result)


def test_the_best_state_is_restored() -> None:
    """Overfitting on few rows: the last state is far worse."""
    x, held_out = torch.randn(15, 2), torch.randn(200, 2)
    flow = pf.NSF(2, transforms=2)
    result = fit(flow, x, validation=held_out, steps=200, lr=0.02, patience=None)
    score = -flow().log_prob(held_out).mean().item()
    assert score == pytest.approx(result.history.best[1], abs=1e-5)
    assert score < result.history.checks[-1][1] - 0.3
    assert result.stop_reason == "all steps were done"


def test_interrupted_it_returns_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 2)
    flow = small()
    forward, calls = NegativeLogLikelihood.forward, []

    def interrupted(self: Any, *args: Any) -> Tensor:
        calls.append(len(args[0]))
        if len(calls) == 60:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(NegativeLogLikelihood, "forward", interrupted)
    result = fit(flow, x, lr=0.01, patience=None)
    assert result.stop_reason == "it was interrupted"
    assert 0 < len(result.history.losses) < 60
    monkeypatch.undo()
    order = -flow().log_prob(x).mean()
    assert order.isfinite()
    assert math.isfinite(result.history.best[1])


def test_interrupted_before_the_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, *args: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(NegativeLogLikelihood, "forward", interrupted)
    result = fit(small(), torch.randn(100, 2))
    assert result.stop_reason == "it was interrupted"
    assert "no steps" in str(result)
    assert result.history.best[0] == 0


# --- random numbers -------------------------------------------------------------------------------


def test_a_seed_reproduces_the_fit_and_leaves_the_global_state_alone() -> None:
    x = torch.randn(100, 2)
    start = small()
    state = torch.random.get_rng_state()
    flows = [copy.deepcopy(start) for _ in range(3)]
    results = [
        fit(f, x, seed=s, steps=20, batch_size=16) for f, s in zip(flows, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = (result.history.losses for result in results)
    assert first == again
    assert first != other
    assert torch.equal(flows[0]().log_prob(x), flows[1]().log_prob(x))


def test_a_shuffling_loader_follows_the_seed() -> None:
    x = torch.randn(100, 2)
    start = small()
    histories = []
    for _ in range(2):
        torch.rand(1)
        histories.append(fit(copy.deepcopy(start), as_loader(x), seed=3, steps=6).history.losses)
    assert histories[0] == histories[1]


def test_without_a_seed_the_global_state_decides() -> None:
    x = torch.randn(100, 2)
    start = small()
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(
            fit(copy.deepcopy(start), x, seed=None, steps=4, batch_size=16).history.losses
        )
    assert losses[0] == losses[1] != losses[2]


# --- the flow's own state -------------------------------------------------------------------------


def test_act_norm_is_initialised_once_by_the_fit_and_never_by_forward() -> None:
    x = torch.tensor([3.0, -1.0]) + torch.randn(200, 2)
    flow = small(act_norm=True)
    norms = [m for m in flow.modules() if isinstance(m, pf.layers.ActNorm)]
    flow().log_prob(x)
    flow().rsample((3,))
    assert not any(norm.initialized for norm in norms)
    fit(flow, x, steps=1, lr=1e-12, validation=0)
    assert all(norm.initialized for norm in norms)
    base = flow.transform.inv(x)
    assert torch.allclose(base.mean(0), torch.zeros(2), atol=1e-3)
    assert torch.allclose(base.std(0, correction=0), torch.ones(2), atol=1e-3)
    before = [norm.shift.clone() for norm in norms]
    fit(flow, x + 5.0, steps=1, lr=1e-12, validation=0)
    assert all(
        torch.allclose(norm.shift, shift, atol=1e-6)
        for norm, shift in zip(norms, before, strict=True)
    )


def test_fitting_twice_goes_on_where_it_was() -> None:
    x = correlated()
    flow = small()
    first = fit(flow, x, lr=3e-3)
    place = flow.transform.standardization.loc.clone()
    second = fit(flow, x + 0.01, lr=1e-4, steps=20)
    assert torch.equal(flow.transform.standardization.loc, place)
    assert second.history.checks[0][1] < first.history.best[1] + 0.01
    afresh = fit(small(), x + 0.01, lr=1e-4, steps=20)
    assert afresh.history.checks[0][1] > first.history.best[1] + 0.1


def test_without_standardisation_the_buffers_stay() -> None:
    flow = small()
    fit(flow, correlated() / 1e4, standardize=False, steps=3)
    assert flow.transform.standardization.is_identity()


def test_frozen_parameters_stay() -> None:
    flow = small()
    frozen = flow.transform.layers[0].requires_grad_(False)
    before = [p.clone() for p in frozen.parameters()]
    fit(flow, torch.randn(50, 2), steps=5, lr=0.1)
    assert all(torch.equal(p, q) for p, q in zip(frozen.parameters(), before, strict=True))
    assert all(p.grad is None for p in frozen.parameters())


def test_a_frozen_flow_is_an_error_and_stays_as_it_is() -> None:
    flow = small().requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*flow\.requires_grad_\(True\)"):
        fit(flow, 5.0 + torch.randn(50, 2))
    assert flow.transform.standardization.is_identity()


# --- steps that fail ------------------------------------------------------------------------------


class Spoiled(pf.RealNVP):
    """Not a number at the steps that ``bad`` tells."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.bias = torch.tensor(float("nan") if self.bad(self.calls) else 1.0)
        result = super().forward(*args, **kwargs)
        log_prob = result.log_prob
        result.log_prob = lambda x: log_prob(x) * self.bias
        return result


def spoiled(bad: Any) -> Spoiled:
    flow = Spoiled(2, transforms=1, hidden_features=(4,))
    flow.bad = bad
    return flow


def test_steps_without_a_finite_gradient_are_left_out() -> None:
    flow = spoiled(lambda call: call in (1, 5))
    result = fit(flow, torch.randn(50, 2), validation=0, steps=20)
    assert result.history.skipped == 2
    assert "2 steps skipped" in str(result)
    assert all(p.isfinite().all() for p in flow.parameters())
    assert math.isfinite(result.history.best[1])


def test_it_gives_up_where_no_step_is_finite_and_restores_the_best() -> None:
    flow = spoiled(lambda call: call > 10)
    with pytest.raises(FitError, match=r"step 30: .*not been finite for 20 steps.*best state"):
        fit(flow, torch.randn(50, 2), validation=0, steps=100)
    assert all(p.isfinite().all() for p in flow.parameters())


# --- the result -----------------------------------------------------------------------------------


def test_history_is_in_nats_of_the_batch() -> None:
    x = correlated(50)
    flow = small()
    before = copy.deepcopy(flow)
    result = fit(flow, x, validation=0, steps=2, batch_size=50)
    before.transform.standardization.set_(x.mean(0), x.std(0, correction=0))
    expected = -before().log_prob(x).mean().item()
    assert result.history.losses[0] == pytest.approx(expected, rel=1e-4)
    assert "nats" in str(result)
    assert result.seconds > 0


def test_plot_gives_axes() -> None:
    pyplot = import_module("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    result = fit(small(), torch.randn(100, 2))
    ax = result.plot()
    low, high = ax.get_ylim()
    late = [loss for step, loss in result.history.checks if step > len(result.history.losses) // 20]
    assert all(low < loss < high for loss in late)
    assert ax.get_ylabel() == "negative log likelihood (nats)"
    assert ax.get_xlabel() == "step"
    _, given = pyplot.subplots()
    assert result.plot(given) is given
    pyplot.close("all")


def test_an_empty_history_has_no_best() -> None:
    assert History().best[0] == 0
    assert math.isnan(History().best[1])
    assert History(checks=[(1, float("nan")), (2, 3.0), (3, 4.0)]).best == (2, 3.0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"lr": 0.0}, "lr: expected a positive"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"validation": 1.0}, r"validation: expected a share in \[0, 1\)"),
        ({"validation": -0.1}, r"validation: expected a share in \[0, 1\)"),
        ({"patience": 0}, "patience: expected at least 1"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], match: str) -> None:
    flow = small()
    with pytest.raises(ValueError, match=match):
        fit(flow, 3.0 + torch.randn(50, 2), **wrong)
    assert flow.transform.standardization.is_identity()
