"""Compiled steps against eager ones: the same losses, parameters, checkpoints, and refusals."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.training import compiled, recorded, repay
from pyroflows.training.adam import Adam
from pyroflows.training.compiled import CompiledStep
from pyroflows.training.watch import Watch

pytestmark = [
    # The compiler's own modules use what torch has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning"),
]


@pytest.fixture(autouse=True)
def at_once(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick tests replay what was recorded; slow ones have it compiled."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(compiled, "inductor", lambda graph, inputs: graph)


@pytest.fixture(autouse=True)
def argument_validation() -> Iterator[None]:
    before = torch.distributions.Distribution._validate_args
    yield
    assert torch.distributions.Distribution._validate_args == before


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 3, generator=generator, dtype=torch.float64).cumsum(-1)


def flow_of(recipe: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return recipe(3, transforms=2, hidden_features=(8,), **options).double()


def fit(flow: Any, x: Tensor, **options: Any) -> Any:
    settings = {"steps": 25, "batch_size": 64, "seed": 0, "progress": False}
    return pf.fit_mle(flow, x, **{**settings, **options})


def assert_same_fit(recipe: Any, caplog: Any, tolerance: float = 1e-7, **options: Any) -> None:
    x = rows()
    flows = flow_of(recipe, **options), flow_of(recipe, **options)
    eager, fast = (fit(f, x, compile=c) for f, c in zip(flows, (False, True), strict=True))
    assert not [r for r in caplog.records if r.name.startswith("pyroflows")]
    assert fast.history.losses == pytest.approx(eager.history.losses, abs=tolerance)
    for mine, other in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=0)
        assert mine.untyped_storage().nbytes() == mine.nbytes  # memory of its own


RECIPES = {
    "NSF": (pf.NSF, {"bins": 4}),
    "autoregressive NSF": (pf.NSF, {"bins": 4, "autoregressive": True}),
    "MAF": (pf.MAF, {}),
    "RealNVP": (pf.RealNVP, {"act_norm": True}),
}


@pytest.mark.parametrize(("recipe", "options"), RECIPES.values(), ids=RECIPES)
def test_recorded_steps_are_the_eager_ones(recipe: Any, options: Any, caplog: Any) -> None:
    assert_same_fit(recipe, caplog, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options"), RECIPES.values(), ids=RECIPES)
def test_compiled_steps_are_the_eager_ones(recipe: Any, options: Any, caplog: Any) -> None:
    assert_same_fit(recipe, caplog, **options)


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, waiting, fast = (flow_of(pf.MAF) for _ in range(3))
    fits = [fit(eager, rows()), fit(waiting, rows(), compile="auto")]
    monkeypatch.setattr(repay, "START", 0.0)
    monkeypatch.setattr(repay, "PER_OPERATION", 0.0)
    fits.append(fit(fast, rows(), compile="auto"))
    for other in fits[1:]:
        assert other.history.losses == pytest.approx(fits[0].history.losses, abs=1e-7)
    assert fits[0].compiled == ""
    assert fits[1].compiled.startswith("not compiled: 15 steps would save about")
    assert fits[2].compiled.startswith("compiled in ")
    assert "\nsteps compiled in " in str(fits[2])


def test_auto_in_a_fit_that_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repay, "START", 0.0)
    monkeypatch.setattr(repay, "PER_OPERATION", 0.0)
    options: Any = {"steps": None, "starts": 0, "budget": 30, "enough": 1.0}
    fits = [fit_schools(c, **options)[1] for c in (False, "auto")]
    assert fits[1].compiled.startswith("compiled in ")
    assert fits[1].history.losses == pytest.approx(fits[0].history.losses, abs=5e-3)


def test_what_cannot_be_compiled_is_said_once(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(repay, "START", 0.0)
    _, fitted = fit_schools("auto", model=own_parameter, steps=15)
    assert fitted.compiled == "not compiled: 1 parameters belong to the model, not to the guide"
    assert len([r for r in caplog.records if "compiled" in r.message]) == 1


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="compile: expected True, False or 'auto', got 'always'"):
        fit(flow_of(pf.MAF), rows(), compile="always")


@pytest.mark.slow
def test_what_was_compiled_is_kept() -> None:
    """In Inductor's cache, for other processes too; its own counters tell."""
    from torch._dynamo.utils import counters

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return ((x.sin() + seed).sum(),)

    seed = secrets.randbelow(1_000_000)  # nothing that an earlier run has left
    x = torch.arange(5.0)
    graph = recorded.record(step, [x])
    before = counters["inductor"]["fxgraph_cache_hit"]
    for hits in range(2):
        torch.testing.assert_close(recorded.inductor(graph, [x])(x), step(x))
        assert counters["inductor"]["fxgraph_cache_hit"] == before + hits


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def fit_schools(compile: Any, model: Any = schools, **options: Any) -> tuple[Any, Any]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0])
    guide = pf.AutoFlow(model, lambda d: pf.RealNVP(d, transforms=2, hidden_features=(8,)))
    settings = {"steps": 30, "draws": 32, "seed": 0, "psis_samples": 0, "progress": False}
    settings |= {"compile": compile, **options}
    return guide, pf.fit_svi(guide, torch.full((4,), 10.0), y, **settings)


@pytest.mark.parametrize("estimator", ["stl", "total", "iw", "forward"])
def test_recorded_guides_are_the_eager_ones(estimator: Any, caplog: Any) -> None:
    losses = [fit_schools(c, estimator=estimator)[1].history.losses for c in (False, True)]
    assert not [r for r in caplog.records if "compiled" in r.message]
    # Float32: what rounding does to the first steps, later ones carry on.
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)


@pytest.mark.slow
def test_compiled_guides_are_the_eager_ones(caplog: Any) -> None:
    losses = [fit_schools(c)[1].history.losses for c in (False, True)]
    assert not [r for r in caplog.records if "compiled" in r.message]
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)


def test_a_fit_that_looks_while_it_trains(caplog: Any) -> None:
    """The mean of iterates and the looks at it are those of an eager fit."""
    options: Any = {"steps": None, "starts": 0, "budget": 30, "enough": 1.0}
    fits = [fit_schools(c, **options) for c in (False, True)]
    assert not [r for r in caplog.records if "compiled" in r.message]
    eager, fast = (fitted.history.checks for _, fitted in fits)
    assert [step for step, _ in fast] == [step for step, _ in eager]
    assert [v for _, v in fast] == pytest.approx([v for _, v in eager], abs=5e-3)


def branching(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    scale = 1.0 if (mu + tau).sum() > 0 else 2.0
    with pyro.plate("school", len(y)):
        pyro.sample("y", dist.Normal(mu, scale * sigma), obs=y)


def own_parameter(sigma: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    mu = pyro.sample("mu", dist.Normal(loc, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        pyro.sample("y", dist.Normal(mu, tau + sigma), obs=y)


@pytest.mark.parametrize(
    ("model", "reason"), [(branching, "tracing"), (own_parameter, "belong to the model")]
)
def test_what_cannot_be_recorded_is_eager_and_says_so(model: Any, reason: str, caplog: Any) -> None:
    losses = [fit_schools(c, model=model, steps=5)[1].history.losses for c in (False, True)]
    assert losses[0] == losses[1]
    (message,) = [r.message for r in caplog.records if "compiled" in r.message]
    assert message.startswith("The step cannot be compiled (")
    assert reason in message


def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        def call(*given: Tensor) -> tuple[Tensor, ...]:
            loss, gradient = graph(*given)
            return loss, gradient * 1.01

        return call

    monkeypatch.setattr(compiled, "inductor", wrong)
    with caplog.at_level(logging.WARNING):
        fit(flow_of(pf.MAF), rows(), compile=True, steps=3)
    assert "its gradient is off the eager one by" in caplog.text


@pytest.mark.parametrize(("height", "refused"), [(0.9, True), (0.999, False)])
def test_draws_without_a_density_are_left_to_the_eager_step(
    height: float, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where every step has some, no step can be compared, and all are eager."""

    def with_holes(sigma: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        holes = torch.where(torch.sin(50 * mu) > height, -torch.inf, 0.0)
        pyro.factor("holes", holes)
        with pyro.plate("school", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    fits = [fit_schools(c, model=with_holes, starts=0)[1] for c in (False, True)]
    assert fits[0].dropped == fits[1].dropped > 0
    assert fits[1].history.losses == pytest.approx(fits[0].history.losses, abs=5e-3)
    assert ("not finite" in caplog.text) is refused


def test_batches_of_another_shape_are_eager() -> None:
    flow = flow_of(pf.MAF)
    adam = Adam([p for p in flow.parameters() if p.requires_grad])
    loss = pf.training.NegativeLogLikelihood(flow)
    step = CompiledStep(loss, adam.parameters, 5.0)
    with torch.no_grad():
        expected = loss(rows()[:10])
    before = [p.detach().clone() for p in adam.parameters]
    torch.testing.assert_close(step.take(adam, 1e-3, (rows()[:10], None)), expected)
    assert any(not torch.equal(p, b) for p, b in zip(adam.parameters, before, strict=True))
    after = [p.detach().clone() for p in adam.parameters]
    assert step.take(adam, 1e-3, (rows()[:20], None)) is None
    torch.testing.assert_close(list(adam.parameters), after, atol=0, rtol=0)


def test_an_unwatched_step_that_is_not_finite_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "inductor", lambda graph, inputs: graph)
    flow, watch = flow_of(pf.MAF), Watch(on=False)
    adam = Adam([p for p in flow.parameters() if p.requires_grad])
    loss = pf.training.NegativeLogLikelihood(flow)
    step = CompiledStep(loss, adam.parameters, 5.0, watch=watch)
    assert step.take(adam, 1e-3, (rows()[:10], None)) is not None
    before = [t.clone() for t in (*adam.parameters, *adam.steps)]
    unusable = (torch.full_like(rows()[:10], torch.nan), None)
    left_out = step.take(adam, 1e-3, unusable)
    assert left_out is not None
    assert not left_out.isfinite()
    watch.on = True
    assert step.take(adam, 1e-3, unusable) is None
    torch.testing.assert_close([*adam.parameters, *adam.steps], before, atol=0, rtol=0)


def test_checkpoints_of_compiled_fits(tmp_path: Path) -> None:
    """What a compiled fit has stored, an eager one goes on with."""
    x, path = rows(), tmp_path / "fit"
    whole = fit(flow_of(pf.MAF), x, steps=20)
    flow = flow_of(pf.MAF)

    class Stop(Exception):  # noqa: N818
        pass

    taken = CompiledStep.take

    def stopping(self: Any, adam: Adam, *rest: Any) -> Any:
        if float(adam.steps[0]) == 12:
            raise Stop
        return taken(self, adam, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledStep, "take", stopping)
        with pytest.raises(Stop):
            fit(flow, x, steps=20, compile=True, checkpoint=path)
    rest = fit(flow_of(pf.MAF), x, steps=20, checkpoint=path)
    assert rest.history.losses == pytest.approx(whole.history.losses, abs=1e-9)


def test_random_numbers_are_the_same_in_double_precision() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn(100) + torch.full((100,), 1 / 3, dtype=torch.float32)

    graph = recorded.record(noisy, [torch.zeros(100)])
    torch.manual_seed(0)
    single = graph(torch.zeros(100))
    torch.manual_seed(0)
    double = recorded.in_double(graph, [torch.zeros(100)])
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-6, rtol=0)


def test_an_amortised_guide_is_refused() -> None:
    guide = pf.AutoAmortizedFlow(schools, encoders={"z": nn.Identity()})
    with pytest.raises(ValueError, match="nor compiled steps"):
        pf.fit_svi(guide, torch.ones(4), torch.ones(4), compile=True)
