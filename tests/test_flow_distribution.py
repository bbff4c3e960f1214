"""Flows as Pyro distributions: shapes, the remembered draw, path gradients, registration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.distributions import DiagonalNormal, FlowDistribution, StandardNormal, StudentT
from pyroflows.errors import ContextError, ShapeError
from pyroflows.testing import redraw_
from tests.cases import RECIPES

F64 = torch.float64
SMALL = {"transforms": 2, "hidden_features": (8, 8)}

every_recipe = pytest.mark.parametrize(
    ("recipe", "options"),
    [(r, {k: v for k, v in o.items() if k != "note"}) for r, o in RECIPES],
    ids=[r.__name__ + o.get("note", "") for r, o in RECIPES],
)


def make(recipe: Any = pf.NSF, *sizes: int, scale: float = 0.3, **options: Any) -> Any:
    """A small float64 flow, re-drawn."""
    flow = recipe(*(sizes or (3,)), **SMALL, **options)
    redraw_(flow, scale)
    return flow.double()


def gradients(flow: nn.Module, loss: Tensor, *others: Tensor) -> list[Tensor]:
    wanted = [*flow.parameters(), *others]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_differ(got: list[Tensor], other: list[Tensor]) -> None:
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(got, other, strict=True))


# --- the remembered draw ----------------------------------------------------------------------


class Passes:
    """Counts the evaluations of every conditioner of a flow, by kind."""

    def __init__(self, flow: pf.Flow) -> None:
        self.networks = [m for m in flow.modules() if hasattr(m, "hidden_features")]
        self.once = self.unrolled = 0
        for network in self.networks:
            self._count(network, "forward", "once")
            if hasattr(network, "unroll"):
                self._count(network, "unroll", "unrolled")

    def _count(self, network: nn.Module, method: str, kind: str) -> None:
        original = getattr(network, method)

        def counted(*args: Any) -> Any:
            setattr(self, kind, getattr(self, kind) + 1)
            return original(*args)

        # Beside the module's own attributes: a module given as attribute would be registered.
        network.__dict__[method] = counted

    def of(self, function: Callable[[], Any]) -> tuple[int, int]:
        self.once = self.unrolled = 0
        function()
        return self.once, self.unrolled


@every_recipe
def test_conditioner_evaluations(recipe: Any, options: dict[str, Any]) -> None:
    """One pass of each network, whatever is asked; feature by feature counts as one."""
    flow = make(recipe, 3, **options)
    passes = Passes(flow)
    many = len(passes.networks)
    assert many == SMALL["transforms"]
    slow_forward = recipe is pf.MAF or bool(options.get("autoregressive"))
    forward = (0, many) if slow_forward else (many, 0)
    inverse = (0, many) if recipe is pf.IAF else (many, 0)
    x = torch.randn(4, 3, dtype=F64)
    assert passes.of(flow) == (0, 0)
    assert passes.of(lambda: flow().log_prob(x)) == inverse
    assert passes.of(lambda: flow().sample((4,))) == forward
    assert passes.of(lambda: flow().rsample((4,))) == forward
    assert passes.of(lambda: flow().rsample_and_log_prob((4,))) == forward

    def draw_and_score() -> None:
        d = flow()
        d.log_prob(d.rsample((4,)))

    assert passes.of(draw_and_score) == forward

    def guide_step() -> None:
        d = flow()
        d.score_parts(d.rsample((4,)))

    both = (forward[0] + inverse[0], forward[1] + inverse[1])
    assert passes.of(guide_step) == both


@every_recipe
def test_fresh_log_prob_of_values_the_flow_did_not_produce(
    recipe: Any, options: dict[str, Any]
) -> None:
    """And a draw scored in one pass agrees with the draw scored as data."""
    flow = make(recipe, 3, **options)
    d = flow()
    x, score = d.rsample_and_log_prob((50,))
    torch.testing.assert_close(flow().log_prob(x.detach()), score, rtol=0, atol=1e-9)
    assert flow().log_prob(torch.randn(7, 3, dtype=F64)).isfinite().all()


def test_draw_is_remembered_for_the_same_object_and_version_only() -> None:
    flow = make()
    passes = Passes(flow)
    d = flow()
    x = d.rsample((4,))
    fresh = len(passes.networks)
    assert passes.of(lambda: d.log_prob(x))[0] == 0
    assert passes.of(lambda: d.log_prob(x.clone()))[0] == fresh
    assert passes.of(lambda: d.log_prob(x.detach()))[0] == fresh
    assert passes.of(lambda: d.log_prob(x[...]))[0] == fresh
    assert passes.of(lambda: flow().log_prob(x))[0] == fresh
    edited = x.detach()
    with torch.no_grad():
        x.add_(1.0)
    assert passes.of(lambda: d.log_prob(x))[0] == fresh
    torch.testing.assert_close(d.log_prob(x), flow().log_prob(edited))


def test_only_the_last_draw_is_remembered() -> None:
    flow = make()
    passes = Passes(flow)
    d = flow()
    first, second = d.rsample(), d.rsample()
    assert passes.of(lambda: d.log_prob(second))[0] == 0
    assert passes.of(lambda: d.log_prob(first))[0] == len(passes.networks)


def test_sample_and_no_grad_never_remember() -> None:
    flow = make()
    d = flow()
    x = d.sample((4,))
    assert not x.requires_grad
    assert d.log_prob(x).requires_grad
    with torch.no_grad():
        x = d.rsample((4,))
    assert d.log_prob(x).requires_grad
    passes = Passes(flow)
    assert passes.of(lambda: d.log_prob(x))[0] == len(passes.networks)


def test_remembered_score_has_the_total_derivative_and_a_clone_the_partial_one() -> None:
    flow = make(pf.MAF, 2, base=DiagonalNormal(2))
    torch.manual_seed(0)
    d = flow()
    x = d.rsample((5,))
    total = gradients(flow, d.log_prob(x).sum())
    torch.manual_seed(0)
    by_hand, score = flow().rsample_and_log_prob((5,))
    assert_same(total, gradients(flow, score.sum()))
    # The score of the value, the value depending on the parameters: the same derivative.
    torch.manual_seed(0)
    d = flow()
    x = d.rsample((5,))
    assert_same(gradients(flow, d.log_prob(x.clone()).sum()), total, 1e-9)
    torch.manual_seed(0)
    d = flow()
    x = d.rsample((5,))
    partial = gradients(flow, d.log_prob(x.detach().clone()).sum())
    assert_differ(partial, total)
    torch.testing.assert_close(by_hand, x)


@pytest.mark.parametrize("drawn", [True, False], ids=["clone of a draw", "data"])
def test_gradient_with_respect_to_the_value(drawn: bool) -> None:
    flow = make()
    d = flow()
    x = d.rsample((4,)).clone() if drawn else torch.randn(4, 3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(d.log_prob(x).sum(), x)
    step = 1e-6
    for i in range(3):
        shift = torch.zeros(3, dtype=F64)
        shift[i] = step
        value = x.detach()
        difference = (flow().log_prob(value + shift) - flow().log_prob(value - shift)) / (2 * step)
        torch.testing.assert_close(slope[:, i], difference.detach(), rtol=1e-6, atol=1e-6)


@every_recipe
def test_training_twice_on_one_tensor_after_evaluation_without_gradients(
    recipe: Any, options: dict[str, Any]
) -> None:
    flow = make(recipe, 3, **options)
    x = torch.randn(20, 3, dtype=F64)
    with torch.no_grad():
        before = flow().log_prob(x).mean()
        flow().sample((3,))
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = -flow().log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(-before.item(), rel=1e-12)
    assert losses == sorted(losses, reverse=True)


def test_in_place_edits_of_data_and_parameters_are_seen() -> None:
    flow = make()
    d, x = flow(), torch.randn(4, 3, dtype=F64)
    first = d.log_prob(x)
    x.add_(1.0)
    assert (d.log_prob(x) - first).abs().min() > 1e-6
    with torch.no_grad():
        second = d.log_prob(x)
        for parameter in flow.parameters():
            parameter.mul_(1.5)
        assert (flow().log_prob(x) - second).abs().min() > 1e-6


def test_a_distribution_can_be_copied_after_use() -> None:
    flow = make()
    d = flow()
    x = d.rsample((4,))
    clone = copy.deepcopy(d)
    torch.testing.assert_close(clone.log_prob(x.detach()), d.log_prob(x), rtol=0, atol=1e-9)


# --- shapes -----------------------------------------------------------------------------------


@every_recipe
def test_contexts_make_a_batch_with_noise_of_its_own(recipe: Any, options: dict[str, Any]) -> None:
    flow = recipe(2, 3, **SMALL, **options).double()
    d = flow(torch.zeros(5, 3, dtype=F64))
    assert (d.batch_shape, d.event_shape) == ((5,), (2,))
    assert d.sample().unique(dim=0).shape == (5, 2)
    assert d.sample((4,)).reshape(-1, 2).unique(dim=0).shape == (20, 2)
    x, score = d.rsample_and_log_prob((4,))
    assert (x.shape, score.shape) == ((4, 5, 2), (4, 5))
    assert d.log_prob(x[0, 0].detach()).shape == (5,)
    wide = flow(torch.zeros(5, 1, 3, dtype=F64))
    assert wide.batch_shape == (5, 1)
    assert wide.log_prob(torch.zeros(6, 2, dtype=F64)).shape == (5, 6)
    assert flow(torch.zeros(3, dtype=F64)).batch_shape == ()
    assert flow(torch.zeros(0, 3, dtype=F64)).sample((4,)).shape == (4, 0, 2)


@every_recipe
@pytest.mark.parametrize("features", [1, 3])
def test_empty_batches(recipe: Any, options: dict[str, Any], features: int) -> None:
    flow = make(recipe, features, **options)
    for shape in ((0,), (0, 4), (4, 0)):
        x = torch.zeros(*shape, features, dtype=F64, requires_grad=True)
        score = flow().log_prob(x)
        assert score.shape == shape
        (slope,) = torch.autograd.grad(score.sum(), x)
        assert slope.shape == x.shape
        draws, score = flow().rsample_and_log_prob(shape)
        assert (draws.shape, score.shape) == (x.shape, shape)
    assert flow().expand((0,)).log_prob(torch.zeros(features, dtype=F64)).shape == (0,)


@pytest.mark.parametrize("base", [None, lambda: StudentT(3), lambda: DiagonalNormal(3)])
def test_expand_keeps_everything(base: Any) -> None:
    flow = make(pf.NSF, 3, base=base() if base else None)
    d = flow().expand((4, 2))
    assert isinstance(d, FlowDistribution)
    assert (d.batch_shape, d.event_shape) == ((4, 2), (3,))
    assert d.module is flow
    x = d.rsample((5,))
    assert x.shape == (5, 4, 2, 3)
    assert x.reshape(-1, 3).unique(dim=0).shape == (40, 3)
    torch.testing.assert_close(d.log_prob(x), flow().log_prob(x.detach()), rtol=0, atol=1e-9)
    assert d.expand((6, 4, 2)).batch_shape == (6, 4, 2)
    assert d.has_rsample


def test_expand_of_contexts() -> None:
    flow = make(pf.MAF, 2, 3)
    c = torch.randn(5, 3, dtype=F64)
    d = flow(c).expand((4, 5))
    x = d.sample()
    assert x.shape == (4, 5, 2)
    torch.testing.assert_close(d.log_prob(x), flow(c).log_prob(x))


def test_to_event_and_mask_keep_the_flow() -> None:
    flow = make(pf.NSF, 2, 3)
    c = torch.randn(4, 5, 3, dtype=F64)
    d = flow(c).to_event(1)
    assert isinstance(d, FlowDistribution)
    assert (d.batch_shape, d.event_shape) == ((4,), (5, 2))
    x = d.rsample((3,))
    assert x.shape == (3, 4, 5, 2)
    expected = flow(c).log_prob(x.detach()).sum(-1)
    torch.testing.assert_close(d.log_prob(x), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(d.log_prob(x.detach()), expected, rtol=0, atol=1e-12)
    assert flow(c).to_event().event_shape == (4, 5, 2)
    assert flow(c).to_event(0).batch_shape == (4, 5)
    twice = d.to_event(1)
    torch.testing.assert_close(twice.log_prob(x.detach()), expected.sum(-1))
    assert d.mask(True) is d
    mask = torch.tensor([True, False, True, False])
    masked = d.mask(mask).log_prob(x.detach())
    torch.testing.assert_close(masked, expected * mask)
    assert (d.mask(False).log_prob(x) == 0).all()
    with pytest.raises(ValueError, match="to_event: expected 0 to 2 batch dimensions, got 3"):
        flow(c).to_event(3)


def test_support_and_class() -> None:
    d = make()()
    assert isinstance(d, dist.TransformedDistribution)
    assert isinstance(d, torch.distributions.TransformedDistribution)
    assert d.support.event_dim == 1
    assert d.support.check(torch.zeros(3)).all()
    with torch.no_grad():
        assert d.log_prob(torch.full((3,), torch.nan, dtype=F64)).isnan()


@every_recipe
def test_one_feature(recipe: Any, options: dict[str, Any]) -> None:
    for sizes in ((1,), (1, 2)):
        flow = make(recipe, *sizes, **options)
        d = flow(torch.randn(4, 2, dtype=F64)) if len(sizes) == 2 else flow()
        x, score = d.rsample_and_log_prob((6,))
        torch.testing.assert_close(d.log_prob(x.detach()), score, rtol=0, atol=1e-10)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "act"),
    [
        (
            ShapeError,
            r"value: expected shape \(\*batch, 3\), got \(4, 2\)",
            lambda f, g: f().log_prob(torch.zeros(4, 2)),
        ),
        (
            ShapeError,
            r"value: expected shape \(\*batch, 3\), got \(\)",
            lambda f, g: f().log_prob(torch.zeros(())),
        ),
        (
            TypeError,
            r"value: expected torch.float32.*got torch.float64",
            lambda f, g: f().log_prob(torch.zeros(3, dtype=F64)),
        ),
        (
            TypeError,
            r"value: expected torch.float32.*got torch.int64. Convert .*\(torch.float32\)\.$",
            lambda f, g: f().log_prob(torch.zeros(3).long()),
        ),
        (ContextError, "but the flow has none", lambda f, g: f(torch.zeros(2))),
        (ContextError, r"expected a context of shape \(\*batch, 2\), got none", lambda f, g: g()),
        (ContextError, "got none", lambda f, g: g.transform(torch.zeros(3))),
        (
            ShapeError,
            r"context: expected shape \(\*batch, 2\), got \(4, 5\)",
            lambda f, g: g(torch.zeros(4, 5)),
        ),
        (
            TypeError,
            r"context: expected torch.float32.*got torch.float64",
            lambda f, g: g(torch.zeros(4, 2, dtype=F64)),
        ),
        (
            ValueError,
            r"base: expected event shape \(3,\), got \(2,\)",
            lambda f, g: pf.NSF(3, base=StandardNormal(2)),
        ),
        (ValueError, "expected features >= 1", lambda f, g: pf.NSF(0)),
        (ValueError, "context >= 0", lambda f, g: pf.MAF(2, -1)),
        (
            ValueError,
            "mixing: expected 'lu', 'orthogonal', 'householder', 'permutation' or None, got 'qr'",
            lambda f, g: pf.MAF(2, mixing="qr"),
        ),
        (ValueError, "bins=0", lambda f, g: pf.NSF(2, bins=0)),
        (ValueError, "positive bound", lambda f, g: pf.NSF(2, bound=-1.0)),
        (ValueError, "df: expected more than 1.0, got 0.5", lambda f, g: StudentT(2, df=0.5)),
    ],
)
def test_errors_name_what_was_expected(
    error: type[Exception], message: str, act: Callable[[Any, Any], Any]
) -> None:
    with pytest.raises(error, match=message):
        act(pf.NSF(3, **SMALL), pf.NSF(3, 2, **SMALL))


def test_shapes_are_checked_on_meta_tensors_too() -> None:
    flow = pf.NSF(3, **SMALL).to("meta")
    with pytest.raises(ShapeError, match="value"):
        flow().log_prob(torch.zeros(4, 2, device="meta"))
