"""Conditioner networks: what depends on what, and what an evaluation costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyroflows as pf
from pyroflows.nn import (
    Conditioner,
    MaskedLinear,
    MaskedResidualMLP,
    RecordedModule,
    ResidualMLP,
    ZeroStart,
)
from pyroflows.testing import check_close, jacobian, redraw_

F64 = torch.float64


def redrawn(network: nn.Module) -> Any:
    torch.manual_seed(0)
    redraw_(network, 1.0)
    return network.to(F64)


# --- residual MLP -----------------------------------------------------------------------------


def test_mlp_follows_its_formula() -> None:
    net = redrawn(ResidualMLP(2, 3, out_features=5, hidden_features=(4, 4, 6)))
    x, c, act = torch.randn(7, 2, dtype=F64), torch.randn(7, 3, dtype=F64), nn.functional.silu
    h = net.input(x) + net.context(c)
    h = h + net.layers[0](act(h))
    h = net.layers[1](act(h))
    torch.testing.assert_close(net(x, c), net.layers[2](act(h)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("hidden", [(), (4,), (4, 4)])
@pytest.mark.parametrize("features", [0, 2])
@pytest.mark.parametrize("context", [0, 3])
def test_mlp_starts_at_zero_and_broadcasts(
    hidden: tuple[int, ...], features: int, context: int
) -> None:
    net = ResidualMLP(features, context, 4, hidden)
    x = torch.randn(6, 1, features)
    c = torch.randn(5, context) if context else None
    out = net(x, c)
    assert out.shape == ((6, 5, 4) if context else (6, 1, 4))
    assert (out == 0).all()
    assert net(x[:0], c).shape[0] == 0
    redraw_(net, 1.0)
    one = net(x[0, 0], c[0] if c is not None else None)
    torch.testing.assert_close(net(x, c)[0, 0], one)


@pytest.mark.parametrize("hidden", [(0,), (4, -1), (2.5,)])
def test_bad_widths_are_named(hidden: Any) -> None:
    with pytest.raises(ValueError, match="hidden_features: expected positive integers"):
        ResidualMLP(2, 0, 2, hidden)
    with pytest.raises(ValueError, match="hidden_features: expected positive integers"):
        MaskedResidualMLP(2, 0, 2, hidden)


# --- masked MLP -------------------------------------------------------------------------------


networks = st.fixed_dictionaries(
    {
        "features": st.integers(1, 6),
        "context": st.integers(0, 2),
        "count": st.integers(1, 3),
        "hidden_features": st.lists(st.integers(1, 8), max_size=3).map(tuple),
    }
)


@given(options=networks, data=st.data())
@settings(deadline=None)
def test_masked_network_depends_on_all_earlier_features_and_no_other(
    options: dict[str, Any], data: st.DataObject
) -> None:
    """Also where it is narrower than the features, and for any order."""
    features, context, count = options["features"], options["context"], options["count"]
    order = data.draw(st.permutations(range(features)))
    net = redrawn(MaskedResidualMLP(order=order, **options))
    x = torch.randn(features, dtype=F64)
    c = torch.randn(context, dtype=F64) if context else None
    rank = torch.tensor(order).argsort()
    depends = jacobian(lambda v: net(v, c), x, 1).reshape(count, features, features) != 0
    expected = rank[:, None] > rank[None, :]
    assert torch.equal(depends, expected.expand_as(depends))
    if c is not None:
        assert (jacobian(lambda v: net(x, v), c, 1) != 0).all()


@given(options=networks, batch=st.lists(st.integers(0, 3), max_size=2), data=st.data())
@settings(deadline=None)
def test_unrolled_network_equals_the_network(
    options: dict[str, Any], batch: list[int], data: st.DataObject
) -> None:
    features, context, count = options["features"], options["context"], options["count"]
    order = data.draw(st.permutations(range(features)))
    net = redrawn(MaskedResidualMLP(order=order, **options))
    x = torch.randn(*batch, features, dtype=F64)
    # The context brings a batch dimension of its own.
    c = torch.randn(2, *(1 for _ in batch), context, dtype=F64) if context else None
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            expected = net(x, c)
            shape, features_in_order, steps = net.unroll(x, c)
            values = x.expand(*shape, features).reshape(-1, features)
            assert features_in_order.tolist() == list(order)
            outputs = {order[0]: next(steps)}
            for before, feature in pairwise(order):
                outputs[feature] = steps.send(values[:, before])
        assert shape == expected.shape[:-1]
        got = torch.stack([outputs[i] for i in range(features)], -1)  # (count, N, features)
        got = got.movedim(0, -2).reshape(*shape, count * features)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_masked_network_starts_at_zero_with_and_without_hidden_layers() -> None:
    for hidden in ((), (2,), (8, 8)):
        net = MaskedResidualMLP(4, 2, 3, hidden)
        assert (net(torch.randn(5, 4), torch.randn(5, 2)) == 0).all()


def test_an_order_that_is_no_permutation_is_named() -> None:
    with pytest.raises(ValueError, match="order: expected a permutation of 3 features"):
        MaskedResidualMLP(3, 0, 1, order=[0, 1, 1])


def test_masked_linear_cuts_connections() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    linear = MaskedLinear(mask)
    assert linear.masked_weight()[0, 1] == 0
    torch.testing.assert_close(linear(torch.tensor([0.0, 1.0]))[0], linear.bias[0])
    assert "mask" in linear.state_dict()


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    ("features", "context", "hidden"), [(64, 0, (128, 128)), (16, 3, (32, 64)), (16, 0, (8, 8))]
)
def test_unrolled_network_costs_no_more_arithmetic_than_one_pass(
    features: int, context: int, hidden: tuple[int, ...], recorded: bool
) -> None:
    """Each hidden unit is computed once: the products are those of the masked connections."""
    net = MaskedResidualMLP(features, context, 2, hidden)
    x = torch.randn(10, features)
    c = torch.randn(10, context) if context else None

    def sequential() -> None:
        steps = net.unroll(x, c)[-1]
        next(steps)
        for feature in range(features - 1):
            steps.send(x[:, feature])

    with torch.set_grad_enabled(recorded):
        one_pass, many_steps = flops(lambda: net(x, c)), flops(sequential)
    assert one_pass > 0
    # Something is computed at every step, so the counter does see the products.
    assert 0.3 * one_pass < many_steps <= one_pass


@pytest.mark.parametrize("hidden", [(16, 16), (30, 16, 20)])
def test_direct_connections_of_narrow_networks_are_few(hidden: tuple[int, ...]) -> None:
    """As many as degrees that no hidden unit has lie in a row; the output depends on all before."""
    features = 100
    net = redrawn(MaskedResidualMLP(features, 0, 2, hidden))
    assert net.direct is not None
    in_a_row = sum(features / width for width in set(hidden)) + 1
    few = 2 * features * 2 * in_a_row  # half of a block is masked
    assert net.direct.weight.numel() < few
    rows = torch.zeros(5, features, dtype=F64)
    assert flops(lambda: net.direct(rows)) < 2 * len(rows) * few
    jacobian = torch.func.jacrev(net)(torch.randn(features, dtype=F64))
    for kind in jacobian.unflatten(0, (2, features)):
        assert ((kind != 0) == torch.ones(features, features).tril(-1)).all()


# --- conditioner ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_detached_conditioner_passes_gradients_to_values_alone(keep: bool) -> None:
    net = redrawn(MaskedResidualMLP(3, 2, 4))
    c = torch.randn(5, 2, dtype=F64, requires_grad=True)
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    detached = Conditioner(net, 4, c).detach_params(keep_context=keep)
    torch.testing.assert_close(detached(x), Conditioner(net, 4, c)(x), rtol=0, atol=0)
    detached(x).sum().backward()
    assert x.grad is not None
    assert (c.grad is not None) == keep
    assert all(p.grad is None for p in net.parameters())
    assert next(detached.unroll(x)[-1]).requires_grad == keep


def test_conditioner_puts_parameters_first_and_calls_hooks() -> None:
    net = ResidualMLP(2, 0, out_features=12)
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    assert Conditioner(net, 4)(torch.randn(7, 6, 2)).shape == (4, 7, 6, 3)
    assert calls == [1]


def test_recorded_module_tells_its_arguments() -> None:
    class Example(RecordedModule):
        def __init__(self, size: int, *, scale: float = 1.0) -> None:
            super().__init__()

    assert Example(3, scale=2.0).arguments == {"size": 3, "scale": 2.0}
    assert Example(size=3).arguments == {"size": 3}


# --- widening by the number of rows -------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (ResidualMLP(3, 2, 4, (8, 8)), 5),
        (ResidualMLP(0, 2, 4, (8, 8)), 2),
        (MaskedResidualMLP(3, 2, 2, (8, 8)), 5),
        (MaskedResidualMLP(5, 0, 2, (2,)), 5),
    ],
    ids=["residual", "context alone", "masked", "masked, narrow"],
)
def test_untrained_networks_are_widened_by_the_bandwidth(network: Any, inputs: int) -> None:
    assert isinstance(network, ZeroStart)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.widen_(10_000)
    gain = 10_000 ** (1 / (inputs + 4))
    # The hidden layers, and the outputs, which stay zero, are left alone.
    first = {
        id(p) for linear in network._first() if linear is not None for p in linear.parameters()
    }
    for name, parameter in network.named_parameters():
        expected = before[name] * gain if id(parameter) in first else before[name]
        check_close(name, parameter, expected, 1e-6)
    assert first


def test_trained_networks_are_not_widened() -> None:
    network = ResidualMLP(3, 0, 4)
    redraw_(network, 1.0)
    before = [p.detach().clone() for p in network.parameters()]
    network.widen_(10_000)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_fits_widen_once() -> None:
    flow = pf.RealNVP(2, transforms=1, hidden_features=(4,))
    weight = flow.transform.layers[0].network.input.weight
    before = weight.detach().clone()
    x = torch.randn(400, 2)
    pf.fit_mle(flow, x, validation=0, steps=1, lr=1e-9)
    check_close("first", weight, before * 400 ** (1 / 5), 1e-5)
    pf.fit_mle(flow, x, validation=0, steps=1, lr=1e-9)
    check_close("second", weight, before * 400 ** (1 / 5), 1e-5)
