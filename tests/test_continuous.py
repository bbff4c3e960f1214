"""Continuous flows against closed forms; the estimate of the trace; adjoints; flow matching."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.errors import IntegrationError
from pyroflows.layers import ContinuousLayer
from pyroflows.numerics import integrate
from pyroflows.testing import check_close, check_nan, redraw_
from pyroflows.training import FlowMatchingLoss
from pyroflows.transforms import ContinuousTransform

SMALL: dict[str, Any] = {"hidden_features": (16, 16)}


def drawn(features: int = 2, context: int = 0, scale: float = 1.0, **options: Any) -> pf.CNF:
    flow = pf.CNF(features, context, **{**SMALL, **options}).double()
    redraw_(flow, scale)
    return flow


def transform_of(flow: pf.CNF) -> ContinuousTransform:
    part = flow.transform.condition().parts[0]
    assert isinstance(part, ContinuousTransform)
    return part


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"solver": "dopri5"}, 1e-7),
        ({"solver": "dopri8"}, 1e-7),
        ({"solver": "dopri8", "tolerance": 1e-12}, 1e-11),
        ({"solver": "rk4", "steps": 40}, 1e-6),
    ],
)
def test_linear_velocity_is_a_matrix_exponential(options: Any, error: float) -> None:
    matrix = torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    transform = ContinuousTransform(lambda t, x: x @ matrix.mT, **options)
    for got, power in (
        (transform.call_and_ladj(x), torch.matrix_exp(matrix)),
        (transform.inverse_and_ladj(x), torch.matrix_exp(-matrix)),
    ):
        check_close("value", got[0], x @ power.mT, error * got[0].abs().max())
        check_close("ladj", got[1], power.slogdet()[1].expand(5), error)


def test_velocity_that_depends_on_the_time() -> None:
    """dx/dt = 2 t x carries x to e x."""
    transform = ContinuousTransform(lambda t, x: 2 * t * x)
    x = torch.ones(1, dtype=torch.float64)
    y, ladj = transform.call_and_ladj(x)
    check_close("value", y, math.e * x, 1e-7)
    check_close("ladj", ladj, torch.tensor(1.0, dtype=torch.float64), 1e-7)


def test_order_of_the_grid() -> None:
    """Twice the steps, a sixteenth of the error."""
    errors = []
    for steps in (4, 8):
        y = integrate(
            lambda t, y: y * t.cos(), torch.ones(1).double(), 0, 1, solver="rk4", steps=steps
        )
        errors.append(abs(y.item() - math.exp(math.sin(1.0))))
    assert 12 < errors[0] / errors[1] < 20


def test_the_tolerance_holds_for_one_row_among_many() -> None:
    """A mean over rows would hide it."""
    rates = torch.zeros(10_000, 1, dtype=torch.float64)
    rates[77] = 5.0
    y = integrate(lambda t, y: (rates * t).cos() * rates, rates * 0, 0.0, 1.0, tolerance=1e-6)
    check_close("row", y[77], torch.tensor([5.0]).double().sin(), 1e-5)


# --- the trace --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(noise: Any) -> None:
    flow = drawn(64, trace="exact", solver="rk4", steps=2, scale=2.0)
    x = torch.randn(1, 64, dtype=torch.float64)
    exact = transform_of(flow).inverse_and_ladj(x)[1]
    twin = pf.CNF(64, trace="hutchinson", noise=noise, solver="rk4", steps=2, **SMALL).double()
    twin.load_state_dict(flow.state_dict())
    with torch.no_grad():
        many = transform_of(twin).inverse_and_ladj(x.expand(2000, 64))[1]
    deviation = many.std()
    assert deviation > 1e-3
    assert (many.mean() - exact).abs() < 4 * deviation / 2000**0.5


def test_auto_is_exact_for_few_features() -> None:
    kinds = [ContinuousLayer(n).trace for n in (1, 16, 17, 64)]
    assert kinds == ["exact", "exact", "hutchinson", "hutchinson"]


def test_draws_alone_take_no_trace() -> None:
    """One vector-Jacobian product less for every feature."""
    calls = []

    class Counting(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(torch._C._functorch.peek_interpreter_stack() is not None)
            return super().forward(x)

    flow = pf.CNF(2, activation=Counting, solver="rk4", steps=2, **SMALL)
    flow().sample((3,))
    assert calls
    assert not any(calls)


# --- the solver -------------------------------------------------------------------------------


def test_cost_of_a_direction() -> None:
    flow = drawn(solver="dopri5")
    loose = drawn(solver="dopri5", tolerance=1e-3)
    x = torch.randn(5, 2, dtype=torch.float64)
    assert 20 < transform_of(loose).evaluations(x) < transform_of(flow).evaluations(x) < 500
    # Four stages a step, and one look at the batch of the velocity.
    assert transform_of(drawn(solver="rk4", steps=7)).evaluations(x, inverse=True) == 29


def test_many_dimensions_and_single_precision() -> None:
    flow = pf.CNF(64, trace="exact", **SMALL)
    redraw_(flow, 1.0)
    x = torch.randn(4, 64)
    with torch.no_grad():
        single, double = flow().log_prob(x), flow.double()().log_prob(x.double())
    check_close("float32", single.double(), double, 1e-3)


def test_adaptive_steps_give_way_where_values_are_hidden() -> None:
    flow = drawn(solver="dopri5", steps=30)
    x = torch.randn(5, 2, dtype=torch.float64)
    check_close("vmap", torch.func.vmap(flow().log_prob)(x), flow().log_prob(x), 1e-6)
    moved = drawn(solver="dopri5").to("meta")
    assert moved().log_prob(x.to("meta")).is_meta
    assert drawn(solver="dopri5")().log_prob(x[:0]).shape == (0,)


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_a_row_that_is_not_a_number_leaves_the_others_alone(solver: Any) -> None:
    flow = drawn(2, 1, solver=solver)
    context = torch.randn(3, 1, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    check_nan(flow, x, context)
    x[2] = math.inf
    context[1] = math.nan
    density = flow(context).log_prob(x)
    assert density.isfinite().tolist() == [True, False, False]
    assert density[1].isnan()


def test_what_cannot_be_solved_is_an_error() -> None:
    transform = ContinuousTransform(lambda t, x: x**2)  # infinite at time 1 / x
    with pytest.raises(
        IntegrationError, match="dopri5 did not reach the tolerance 1e-08 over 1 row"
    ):
        transform(torch.tensor([3.0], dtype=torch.float64))


@pytest.mark.parametrize("solver", ["dopri5", "dopri8"])
def test_adjoint_gradients(solver: Any) -> None:
    """The adjoint equation reaches inputs, context and parameters as backpropagation does."""
    plain = drawn(2, 3, solver=solver, tolerance=1e-10)
    adjoint = drawn(2, 3, solver=solver, tolerance=1e-10, adjoint=True)
    adjoint.load_state_dict(plain.state_dict())
    gradients = []
    for flow in (plain, adjoint):
        torch.manual_seed(1)
        x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
        context = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        flow(2 * context).log_prob(x).sum().backward()
        gradients.append([x.grad, context.grad, *(p.grad for p in flow.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert b.abs().max() > 0
        check_close("gradient", b, a, 2e-6)


def test_adjoint_gradients_of_a_functional_call() -> None:
    """The backward pass evaluates the network when its own parameters are back in place."""
    flow = drawn(2, adjoint=True)
    x = torch.randn(4, 2, dtype=torch.float64)
    expected = torch.autograd.grad(flow().log_prob(x).sum(), list(flow.parameters()))
    state = {name: p.detach().clone().requires_grad_() for name, p in flow.named_parameters()}
    redraw_(flow, 1.0)

    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self) -> Tensor:
            return self.flow().log_prob(x)

    named = {f"flow.{name}": p for name, p in state.items()}
    density = torch.func.functional_call(Density(), named, ())
    for got, want in zip(
        torch.autograd.grad(density.sum(), list(state.values())), expected, strict=True
    ):
        check_close("gradient", got, want, 1e-6)


def test_adjoint_path_gradient_spares_the_parameters() -> None:
    flow = drawn(2, adjoint=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    flow().detach_params().log_prob(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in flow.parameters())


def test_without_torchdiffeq(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'pyroflows\[ode\]'"):
        pf.CNF(2)
    assert pf.CNF(2, solver="rk4")().log_prob(torch.zeros(2)).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "euler"}, "solver: expected one of .*'rk4'.*, got 'euler'"),
        ({"tolerance": 0.0}, "tolerance: expected a positive number or None, got 0.0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"solver": "rk4", "adjoint": True}, "adjoint: needs an adaptive solver .*, got 'rk4'"),
        ({"trace": "none"}, "trace: expected 'auto', 'exact' or 'hutchinson', got 'none'"),
        ({"noise": "uniform"}, "noise: expected one of .*, got 'uniform'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pf.CNF(2, **options)


def test_saved_and_loaded(tmp_path: Path) -> None:
    flow = pf.CNF(3, 2, trace="exact", solver="rk4", steps=3, activation=nn.SiLU, **SMALL)
    redraw_(flow, 0.5)
    pf.save(flow, tmp_path / "flow.pf")
    x, c = torch.randn(4, 3), torch.randn(4, 2)
    loaded = pf.load(tmp_path / "flow.pf")
    assert torch.equal(loaded(c).log_prob(x), flow(c).log_prob(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")
def test_compiled_density() -> None:
    flow = drawn(2, solver="rk4", steps=2)
    x = torch.randn(8, 2, dtype=torch.float64)
    validation = torch.distributions.Distribution._validate_args
    got = torch.compile(lambda v: flow().log_prob(v), fullgraph=True)(x)
    # Dynamo switches it off for good.
    torch.distributions.Distribution.set_default_validate_args(validation)
    check_close("density", got, flow().log_prob(x), 1e-10)


# --- flow matching ----------------------------------------------------------------------------


def moons(rows: int, seed: int) -> Tensor:
    return torch.tensor(make_moons(rows, noise=0.1, random_state=seed)[0], dtype=torch.float32)


def test_the_loss_is_least_at_the_true_velocity() -> None:
    """Data N(0, 1) from N(0, 1): v = (2 t - 1) x / ((1 - t)^2 + t^2) and no loss is lower."""

    class Exact(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, xt: Tensor, context: Tensor | None) -> Tensor:
            x, t = xt.unbind(-1)
            return (self.factor * (2 * t - 1) * x / ((1 - t) ** 2 + t**2)).unsqueeze(-1)

    flow = pf.CNF(1, **SMALL)
    loss = FlowMatchingLoss(flow, draws=4)
    x = torch.randn(20_000, 1)
    values = []
    for factor in (0.5, 1.0, 1.5):
        flow.transform.layers[0].network = Exact(factor)  # type: ignore[assignment]
        torch.manual_seed(0)
        values.append(loss(x).item())
    # Var(x1 - x0 | x_t) = 1 / ((1 - t)^2 + t^2), whose mean is pi / 2.
    assert values[1] == pytest.approx(math.pi / 2, abs=0.03)
    assert values[1] < min(values[0], values[2]) - 0.05


def test_optimal_coupling_shortens_the_ways() -> None:
    flow = pf.CNF(2, **SMALL)
    x = moons(600, 0)
    torch.manual_seed(0)
    # At velocity zero the loss is the mean square of the ways.
    assert FlowMatchingLoss(flow, "optimal")(x) < 0.5 * FlowMatchingLoss(flow)(x)


def test_a_conditional_flow_learns_from_its_context() -> None:
    context = torch.rand(1000, 1) * 4
    x = 10 * context + 5 + torch.randn(1000, 1)
    flow = pf.CNF(1, 1, **SMALL)
    fit = pf.fit_flow_matching(flow, x, context, steps=400, lr=1e-2, batch_size=128, seed=0)
    assert fit.history.best[1] < fit.history.checks[0][1]
    draws = flow(torch.tensor([[1.0], [3.0]])).sample((500,)).mean(0)
    check_close("means", draws, torch.tensor([[15.0], [35.0]]), 1.5)


def test_flow_matching_beside_maximum_likelihood() -> None:
    """Two moons: within 0.15 nats of maximum likelihood, in less than half its time."""
    train, test = moons(2000, 0), moons(2000, 1)

    def nats(flow: pf.CNF) -> float:
        with torch.no_grad():
            return -flow().log_prob(test).mean().item()

    torch.manual_seed(0)
    likelihood, matching = (
        pf.CNF(2, solver="rk4", steps=8, hidden_features=(32, 32)) for _ in "ab"
    )
    start = nats(matching)
    slow = pf.fit_mle(likelihood, train, steps=80, lr=2e-2, batch_size=128, seed=0)
    fast = pf.fit_flow_matching(matching, train, steps=800, lr=2e-2, batch_size=128, seed=0)
    assert nats(matching) < min(start, 2.0)
    assert nats(matching) < nats(likelihood) + 0.15
    assert fast.seconds < slow.seconds / 2
    assert "flow matching loss" in str(fast)


def test_flow_matching_repeats_with_a_seed_and_leaves_the_global_state() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        flow = pf.CNF(2, **SMALL)
        state = torch.random.get_rng_state()
        fit = pf.fit_flow_matching(flow, moons(100, 0), steps=10, seed=3)
        assert torch.equal(torch.random.get_rng_state(), state)
        losses.append((fit.history.losses, fit.history.checks))
    assert losses[0] == losses[1]


def test_what_flow_matching_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 2)
    with pytest.raises(TypeError, match=r"expected a CNF, .* got RealNVP of \['CouplingLayer'"):
        pf.fit_flow_matching(pf.RealNVP(2), x)
    with pytest.raises(ValueError, match="coupling: expected 'independent' or 'optimal', got 'ot'"):
        pf.fit_flow_matching(pf.CNF(2), x, coupling="ot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with a context 'optimal' would pair base draws"):
        pf.fit_flow_matching(pf.CNF(2, 1), x, x[:, :1], coupling="optimal")
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        FlowMatchingLoss(pf.CNF(2), draws=0)
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="'optimal' needs scipy"):
        FlowMatchingLoss(pf.CNF(2), "optimal")(x)
