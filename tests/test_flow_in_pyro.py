"""Flows inside Pyro: path gradients under every ELBO, registration, plates, NUTS, Predictive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.distributions import DiagonalNormal, StudentT
from pyroflows.errors import UnregisteredParametersError
from pyroflows.testing import redraw_
from tests.cases import RECIPES

F64 = torch.float64
SMALL = {"transforms": 2, "hidden_features": (8, 8)}

# JitTrace_ELBO is Pyro's, and so is its use of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")

every_recipe = pytest.mark.parametrize(
    ("recipe", "options"),
    [(r, {k: v for k, v in o.items() if k != "note"}) for r, o in RECIPES],
    ids=[r.__name__ + o.get("note", "") for r, o in RECIPES],
)
# Every recipe, and every base under one of them.
every_guide = pytest.mark.parametrize(
    ("recipe", "options"),
    [
        *((r, {k: v for k, v in o.items() if k != "note"}) for r, o in RECIPES),
        (pf.NSF, {"base": lambda: DiagonalNormal(3)}),
        (pf.IAF, {"base": lambda: StudentT(3)}),
    ],
    ids=[*(r.__name__ + o.get("note", "") for r, o in RECIPES), "NSF-diagonal", "IAF-t"],
)


def make(recipe: Any = pf.NSF, *sizes: int, **options: Any) -> Any:
    """A small float64 flow, re-drawn with scale 0.3."""
    base = options.pop("base", None)
    flow = recipe(*(sizes or (3,)), base=base() if base else None, **SMALL, **options)
    redraw_(flow, 0.3)
    return flow.double()


def frozen(flow: pf.Flow) -> pf.Flow:
    return copy.deepcopy(flow).requires_grad_(False)


def gradients(flow: nn.Module, loss: Tensor, *others: Tensor) -> list[Tensor]:
    wanted = [*flow.parameters(), *others]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True, retain_graph=True))


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert any(e.abs().max() > 1e-3 for e in expected)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_differ(got: list[Tensor], other: list[Tensor]) -> None:
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(got, other, strict=True))


# --- path gradients ---------------------------------------------------------------------------


@every_guide
def test_detached_parameters_leave_the_path_through_the_value(
    recipe: Any, options: dict[str, Any]
) -> None:
    flow = make(recipe, 3, **options)
    d = flow()
    x = d.rsample((6,))
    got = d.detach_params().log_prob(x)
    expected = frozen(flow)().log_prob(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    by_path = gradients(flow, expected.sum())
    assert_same(gradients(flow, got.sum()), by_path)
    assert_differ(by_path, gradients(flow, d.log_prob(x).sum()))
    constant = d.detach_params().log_prob(x.detach())
    assert not constant.requires_grad


SHAPED: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda d: d,
    "expand": lambda d: d.expand((4, 5)),
    "to_event": lambda d: d.to_event(1),
    "mask(True)": lambda d: d.mask(True),
    "mask": lambda d: d.mask(torch.tensor([True, False, True, True, False])),
    "expand, to_event, mask": lambda d: d.expand((4, 5)).to_event(1).mask(True),
}


@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED)
@pytest.mark.parametrize("recipe", [pf.NSF, pf.IAF])
@pytest.mark.parametrize("is_draw", [False, True], ids=["context constant", "context drawn"])
def test_score_parts_are_exact_whatever_the_shape(
    shaped: Callable[[Any], Any], recipe: Any, is_draw: bool
) -> None:
    """Value log q, gradient that of log q at constant parameters; a drawn context stays alive."""
    flow = make(recipe, 2, 3)
    leaf = torch.randn(5, 3, dtype=F64, requires_grad=True)
    d = shaped(flow(leaf, context_is_draw=is_draw))
    x = d.rsample()
    parts = d.score_parts(x)
    reference = shaped(frozen(flow)(leaf if is_draw else leaf.detach()))
    expected = reference.log_prob(x)
    torch.testing.assert_close(parts.log_prob, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.entropy_term, expected, rtol=0, atol=1e-9)
    assert isinstance(parts.score_function, int)
    assert parts.score_function == 0
    assert_same(
        gradients(flow, parts.entropy_term.sum(), leaf), gradients(flow, expected.sum(), leaf)
    )


def test_score_parts_of_data_are_those_of_pyro() -> None:
    """Of a value that no gradient led to, there is no path to take."""
    flow = make()
    x = torch.randn(4, 3, dtype=F64)
    parts = flow().score_parts(x)
    expected = flow().log_prob(x)
    torch.testing.assert_close(parts.log_prob, expected)
    torch.testing.assert_close(parts.entropy_term, expected)
    assert_same(gradients(flow, parts.log_prob.sum()), gradients(flow, expected.sum()))


TARGET_LOC, TARGET_SCALE = torch.tensor([1.0, -1.0, 0.5], dtype=F64), 0.7


def target() -> Any:
    return dist.Normal(TARGET_LOC, TARGET_SCALE).to_event(1)


def model() -> None:
    pyro.sample("x", target())


def guide_of(flow: pf.Flow) -> Callable[[], None]:
    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("x", flow())

    return guide


def path_gradient(flow: pf.Flow, draws: int, at_once: bool) -> list[Tensor]:
    """Sticking the landing by hand: the frozen copy scores the draws of the live one."""
    torch.manual_seed(0)
    d = flow()
    x = d.rsample((draws,)) if at_once else torch.stack([d.rsample() for _ in range(draws)])
    return gradients(flow, (frozen(flow)().log_prob(x) - target().log_prob(x)).mean())


ELBOS = {
    "Trace": (Trace_ELBO, {}, 1),
    "Trace, many": (Trace_ELBO, {"num_particles": 7}, 7),
    "Trace, vectorised": (Trace_ELBO, {"num_particles": 7, "vectorize_particles": True}, 7),
    "TraceGraph": (TraceGraph_ELBO, {}, 1),
    "TraceGraph, many": (TraceGraph_ELBO, {"num_particles": 7}, 7),
    "JitTrace": (JitTrace_ELBO, {"ignore_jit_warnings": True}, 1),
    "JitTrace, vectorised": (
        JitTrace_ELBO,
        {"num_particles": 7, "vectorize_particles": True, "ignore_jit_warnings": True},
        7,
    ),
}


@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
@every_guide
def test_elbo_gradient_is_the_path_gradient(
    elbo: Any, recipe: Any, options: dict[str, Any]
) -> None:
    kind, arguments, draws = elbo
    flow = make(recipe, 3, **options)
    expected = path_gradient(flow, draws, arguments.get("vectorize_particles", False))
    estimator, guide = kind(max_plate_nesting=0, **arguments), guide_of(flow)
    if kind is JitTrace_ELBO:
        # The first call traces and draws; the second runs what was compiled for this guide.
        estimator.loss_and_grads(model, guide)
        flow.zero_grad()
    torch.manual_seed(0)
    estimator.loss_and_grads(model, guide)
    got = [torch.zeros_like(p) if p.grad is None else p.grad for p in flow.parameters()]
    assert_same(got, expected, 1e-11)


@pytest.mark.parametrize("elbo", [RenyiELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_other_elbos_run_and_their_losses_agree(elbo: Any) -> None:
    flow = make()
    arguments = {"alpha": 0.0} if elbo is RenyiELBO else {}
    if elbo is TraceEnum_ELBO:
        arguments["strict_enumeration_warning"] = False
    estimator = elbo(num_particles=64, vectorize_particles=True, max_plate_nesting=0, **arguments)
    torch.manual_seed(0)
    loss = estimator.loss_and_grads(model, guide_of(flow))
    torch.manual_seed(0)
    stock = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    reference = stock.loss(model, guide_of(flow))
    # Renyi's bound with alpha 0 is the tighter one.
    assert loss <= reference if elbo is RenyiELBO else loss == pytest.approx(reference, rel=1e-9)
    assert all(p.grad is not None for p in flow.parameters())


# --- training ---------------------------------------------------------------------------------


def data() -> Tensor:
    x = torch.randn(64, 2)
    return torch.stack([x[:, 0] * 2 + 1, x[:, 1] * 0.5 + x[:, 0] ** 2], -1)


def falls(losses: list[float]) -> bool:
    return losses[-1] < losses[0] - 0.1 * abs(losses[0])


def trained(flow: nn.Module, step: Callable[[], float], steps: int = 40) -> None:
    """Every step trains: the loss falls and most parameters move."""
    before = [p.detach().clone() for p in flow.parameters()]
    losses = [step() for _ in range(steps)]
    assert falls(losses)
    moved = [not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)


class Density(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.flow = pf.NSF(2, **SMALL)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", self.flow(), obs=x)


def no_guide(*args: Any) -> None:
    pass


def svi(
    model: Any, guide: Any, *args: Any, lr: float = 1e-2, **options: Any
) -> Callable[[], float]:
    optimiser = pyro.optim.Adam({"lr": lr})
    return lambda: SVI(model, guide, optimiser, Trace_ELBO(**options)).step(*args)


def test_flow_in_a_pyro_module_trains() -> None:
    density = Density()
    trained(density.flow, svi(density, no_guide, data()))


def test_flow_under_pyro_module_trains() -> None:
    flow = pf.MAF(2, **SMALL)

    def density(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(), obs=x)

    trained(flow, svi(density, no_guide, data()))


def test_flow_as_guide_trains() -> None:
    flow = make(pf.NSF, 3)
    elbo = {"num_particles": 16, "vectorize_particles": True, "max_plate_nesting": 0}
    trained(flow, svi(model, guide_of(flow), **elbo))


def test_flow_with_a_torch_optimiser_trains() -> None:
    flow, x = pf.RealNVP(2, **SMALL), data()
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)

    def step() -> float:
        loss = -flow().log_prob(x).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    trained(flow, step)


def test_flow_trains_with_module_local_parameters() -> None:
    x = data()
    with pyro.settings.context(module_local_params=True):
        density = Density()
        loss = Trace_ELBO()(density, no_guide)
        loss(x)
        optimiser = torch.optim.Adam(density.parameters(), lr=1e-2)

        def step() -> float:
            optimiser.zero_grad()
            value = loss(x)
            value.backward()
            optimiser.step()
            return value.item()

        trained(density.flow, step)


# --- registration -----------------------------------------------------------------------------


def assert_unregistered(model: Any, guide: Any, *args: Any) -> None:
    with pytest.raises(UnregisteredParametersError) as caught:
        svi(model, guide, *args)()
    message = str(caught.value)
    assert "pyro.module(" in message
    assert "requires_grad_(False)" in message
    assert "trainable parameter(s) are not in Pyro's param store" in message


def test_unregistered_density_raises_in_svi() -> None:
    flow = pf.NSF(2, **SMALL)
    assert_unregistered(lambda x: pyro.sample("x", flow(), obs=x), no_guide, torch.zeros(2))


@pytest.mark.parametrize("use", ["rsample", "sample", "rsample_and_log_prob"])
def test_unregistered_guide_raises_in_svi(use: str) -> None:
    flow = pf.NSF(3, **SMALL)

    def guide() -> None:
        getattr(flow(), use)()
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))

    assert_unregistered(model, guide)


def test_distribution_stored_on_a_pyro_module_raises() -> None:
    class Stored(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.density = pf.NSF(2, **SMALL)()

        def forward(self, x: Tensor) -> None:
            pyro.sample("x", self.density, obs=x)

    assert_unregistered(Stored(), no_guide, torch.zeros(2))


def test_two_flows_under_one_name_raise() -> None:
    first, second = pf.NSF(3, **SMALL).double(), pf.NSF(3, **SMALL).double()
    svi(model, guide_of(first))()
    assert_unregistered(model, guide_of(second))

    # The way out that the message names.
    def adopting() -> None:
        pyro.module("flow", second, update_module_params=True)
        pyro.sample("x", second())

    svi(model, adopting)()
    pyro.clear_param_store()
    svi(model, guide_of(second))()


def test_shaped_distributions_are_checked_too() -> None:
    flow = pf.NSF(2, 1, **SMALL)
    context = torch.zeros(4, 1)
    for shape in (lambda d: d.expand((4,)), lambda d: d.to_event(1), lambda d: d.mask(True)):
        d = shape(flow(context))
        value = torch.zeros(*d.batch_shape, *d.event_shape)
        assert_unregistered(lambda d=d, v=value: d.log_prob(v), no_guide)


def test_frozen_flow_is_fine_in_svi() -> None:
    flow = pf.NSF(3, **SMALL).double().requires_grad_(False)

    def prior() -> None:
        pyro.sample("x", flow())

    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(3, dtype=F64))
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    svi(prior, guide)()


def test_nuts_over_a_flow_prior() -> None:
    flow = pf.RealNVP(2, **SMALL).double()

    def posterior() -> None:
        x = pyro.sample("x", flow())
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(1.0, dtype=F64))

    mcmc = MCMC(NUTS(posterior), num_samples=100, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    total = mcmc.get_samples()["x"].sum(-1)
    # A flow at its start is standard normal: the sum has prior N(0, 2) and posterior mean 2/2.25.
    assert total.mean().item() == pytest.approx(2 / 2.25, abs=0.3)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    flow = pf.MAF(2, 1, **SMALL)

    def generate(c: Tensor) -> None:
        with pyro.plate("rows", len(c)):
            x = pyro.sample("x", flow(c))
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0))

    draws = Predictive(generate, num_samples=6, parallel=parallel)(torch.zeros(4, 1))
    assert draws["x"].shape == (6, 4, 2)
    assert draws["y"].shape == (6, 4)
    assert draws["x"].reshape(-1, 2).unique(dim=0).shape == (24, 2)


# --- plates and contexts ----------------------------------------------------------------------


def test_plates_expand_a_flow() -> None:
    flow = pf.NSF(2, **SMALL)

    def generate() -> Tensor:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            return pyro.sample("x", flow())

    trace = pyro.poutine.trace(generate).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (3, 4, 2)
    assert trace.nodes["x"]["log_prob"].shape == (3, 4)
    assert trace.nodes["x"]["value"].reshape(-1, 2).unique(dim=0).shape == (12, 2)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, JitTrace_ELBO])
def test_latent_as_context_under_vectorised_particles(elbo: Any) -> None:
    """A guide whose second flow reads the first's draw: its path gradient goes through both.

    But while tracing: there the partial derivative in the context, of mean zero, is left out.
    """
    first, second = make(pf.NSF, 2), make(pf.NSF, 3, 2)
    options: dict[str, Any] = {"num_particles": 7, "vectorize_particles": True}
    if elbo is JitTrace_ELBO:
        options["ignore_jit_warnings"] = True

    def joint() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        with pyro.plate("rows", 4):
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3, dtype=F64)).to_event(1)
            )

    def guide() -> None:
        pyro.module("first", first)
        pyro.module("second", second)
        z = pyro.sample("z", first())
        with pyro.plate("rows", 4):
            pyro.sample("x", second(z, context_is_draw=True))

    def by_hand() -> list[Tensor]:
        torch.manual_seed(0)
        z = first().expand((7, 1)).rsample()
        x = second(z).expand((7, 4)).rsample()
        context = z.detach() if elbo is JitTrace_ELBO else z
        q = frozen(first)().log_prob(z).sum(-1) + frozen(second)(context).log_prob(x).sum(-1)
        p = -0.5 * z.square().sum((-1, -2)) - 0.5 * (x - z.sum(-1, keepdim=True)).square().sum(
            (-1, -2)
        )
        return [*gradients(first, (q - p).mean()), *gradients(second, (q - p).mean())]

    estimator = elbo(max_plate_nesting=1, **options)
    if elbo is JitTrace_ELBO:
        estimator.loss_and_grads(joint, guide)
        first.zero_grad(), second.zero_grad()
    torch.manual_seed(0)
    estimator.loss_and_grads(joint, guide)
    got = [p.grad for p in (*first.parameters(), *second.parameters())]
    assert_same(got, by_hand(), 1e-11)


# --- the transform in Pyro's own classes --------------------------------------------------------


@every_recipe
def test_transform_in_a_stock_transformed_distribution(
    recipe: Any, options: dict[str, Any]
) -> None:
    flow = make(recipe, 3, **options)
    base = dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1)
    d = dist.TransformedDistribution(base, [flow.transform])
    x = d.rsample((5,))
    torch.testing.assert_close(d.log_prob(x), flow().log_prob(x.detach()), rtol=0, atol=1e-9)
    inverted = dist.TransformedDistribution(base, [flow.transform.inv])
    assert inverted.log_prob(x.detach()).shape == (5,)
    composed = dist.TransformedDistribution(base, [flow.transform, dist.transforms.ExpTransform()])
    y = composed.sample((5,))
    assert composed.log_prob(y).isfinite().all()
    assert (y > 0).all()
    assert gradients(flow, d.log_prob(x.detach()).sum())


def test_transform_under_a_context() -> None:
    flow = make(pf.MAF, 2, 3)
    c = torch.randn(5, 3, dtype=F64)
    base = dist.Normal(torch.zeros(5, 2, dtype=F64), 1.0).to_event(1)
    d = dist.TransformedDistribution(base, [flow.transform.condition(c)])
    x = d.sample()
    torch.testing.assert_close(d.log_prob(x), flow(c).log_prob(x))


@pytest.mark.parametrize("recipe", [pf.IAF, pf.MAF, pf.NSF])
def test_transform_in_pyros_own_guide_trains(recipe: Any) -> None:
    def correlated() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(3 + 2 * a, 0.5))

    guide = AutoNormalizingFlow(correlated, lambda size: recipe(size, **SMALL).transform)
    step = svi(correlated, guide, num_particles=16, vectorize_particles=True)
    first = step()
    parameters = list(guide.parameters())
    assert parameters
    before = [p.detach().clone() for p in parameters]
    losses = [step() for _ in range(60)]
    assert sum(losses[-5:]) / 5 < first - 1
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert guide().keys() == {"a", "b"}
    assert copy.deepcopy(guide)().keys() == {"a", "b"}
