"""Autoregressive inverses by sweeps over all features: what they find, and when they are used."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyroflows.layers import AutoregressiveLayer
from pyroflows.testing.tools import redraw_
from pyroflows.transforms import (
    Affine,
    AutoregressiveTransform,
    RationalQuadratic,
    Univariate,
    autoregressive,
)


def transform(univariate: Univariate, features: int = 24, context: int = 0) -> Any:
    layer = AutoregressiveLayer(
        features, context, one_pass="forward", univariate=univariate, hidden_features=(32, 32)
    ).double()
    redraw_(layer, 0.3)
    return layer(torch.randn(5, 1, context, dtype=torch.float64) if context else None)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("univariate", [Affine(), RationalQuadratic(bins=4)], ids=["affine", "rq"])
def test_sweeps_find_what_steps_find(univariate: Univariate, context: int) -> None:
    t = transform(univariate, context=context)
    y = 3 * torch.randn(5, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        swept, stepped = t._by_sweeps(y), t._by_features(y)
    assert swept is not None
    for found, expected in zip(swept, stepped, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def gradients(way: Any, y: Tensor, inputs: list[Tensor], **options: Any) -> Any:
    """Of a function of values and log-determinant that is nowhere flat."""
    x, ladj = way(y)
    loss = (x.square() * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)).sum() + ladj.exp().sum()
    return torch.autograd.grad(loss, inputs, **options)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("univariate", [Affine(), RationalQuadratic(bins=4)], ids=["affine", "rq"])
def test_gradients_by_sweeps_are_those_by_steps(univariate: Univariate, context: int) -> None:
    """Of values, context and parameters, where the context has the larger batch."""
    layer = AutoregressiveLayer(
        24, context, one_pass="forward", univariate=univariate, hidden_features=(32, 32)
    ).double()
    redraw_(layer, 0.3)
    given = torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True) if context else None
    t = layer(given)
    y = (3 * torch.randn(7, 24, dtype=torch.float64)).requires_grad_()
    inputs = [y, *layer.parameters(), *([] if given is None else [given])]
    assert "Implicit" in type(t.inverse_and_ladj(y)[0].grad_fn).__name__
    swept, stepped = (gradients(way, y, inputs) for way in (t.inverse_and_ladj, t._by_features))
    for found, expected in zip(swept, stepped, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_some_gradients_alone() -> None:
    t = transform(Affine())
    y = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)
    for conditioner in (t.conditioner, t.conditioner.detach_params()):
        found = AutoregressiveTransform(t.univariate, conditioner)
        expected = gradients(found._by_features, y, [y])
        torch.testing.assert_close(gradients(found.inverse_and_ladj, y, [y]), expected)
    weight = t.conditioner.tensors()[0]
    expected = gradients(t._by_features, y.detach(), [weight])
    torch.testing.assert_close(gradients(t.inverse_and_ladj, y.detach(), [weight]), expected)


def test_gradients_of_gradients() -> None:
    t = transform(RationalQuadratic(bins=4), features=16)
    y = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    seconds = []
    for way in (t.inverse_and_ladj, t._by_features):
        (first,) = gradients(way, y, [y], create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [y, t.conditioner.tensors()[0]]))
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("univariate", [Affine(), RationalQuadratic(bins=4)], ids=["affine", "rq"])
def test_batches_of_gradients(univariate: Univariate) -> None:
    t = transform(univariate, features=16)
    y = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    given = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    batches = [
        torch.autograd.grad(way(y), y, given, is_grads_batched=True)[0]
        for way in (t.inverse_and_ladj, t._by_features)
    ]
    torch.testing.assert_close(*batches)


def test_a_context_that_is_made_of_the_values() -> None:
    """Each path counts once."""
    layer = AutoregressiveLayer(16, 2, one_pass="forward", hidden_features=(32,)).double()
    redraw_(layer, 0.3)
    y = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    found = []
    for name in ("inverse_and_ladj", "_by_features"):
        t: Any = layer(y[:, :2].square() + layer.network.layers[0].bias[:2])
        found.append(gradients(getattr(t, name), y, [y, *layer.parameters()]))
    torch.testing.assert_close(*found)


# What torch compiles for them is deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_derivatives_go_by_steps() -> None:
    t = transform(Affine())
    y, tangent = torch.randn(2, 4, 24, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        x = t.inv(torch.autograd.forward_ad.make_dual(y, tangent))
        found = torch.autograd.forward_ad.unpack_dual(x).tangent
    expected = torch.func.jvp(t.inv, (y,), (tangent,))[1]
    torch.testing.assert_close(found, expected)


def test_parameters_that_change_before_the_backward_pass_are_an_error() -> None:
    t = transform(Affine())
    x = t.inv(torch.randn(4, 24, dtype=torch.float64))
    with torch.no_grad():
        t.conditioner.tensors()[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


class Chain:
    """Every feature is shifted by a multiple of the one before: a sweep brings one feature."""

    def __init__(self, slope: float) -> None:
        self.slope, self.evaluations = slope, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        shift = self.slope * torch.nn.functional.pad(x[..., :-1], (1, 0))
        return torch.stack([shift, torch.zeros_like(shift)])

    def tensors(self) -> list[Tensor]:
        return []

    def replaced(self, tensors: Any) -> Chain:
        return self

    def unroll(self, value: Tensor) -> tuple[torch.Size, Tensor, Generator[Tensor, Tensor, None]]:
        def steps() -> Generator[Tensor, Tensor, None]:
            x = torch.zeros(value.shape[:-1].numel(), dtype=value.dtype)
            while True:
                x = yield torch.stack([self.slope * x, torch.zeros_like(x)])

        return value.shape[:-1], torch.arange(value.shape[-1]), steps()


def test_where_sweeps_do_not_end_the_steps_are_taken() -> None:
    """Forty features need forty sweeps."""
    chain = Chain(1.0)
    t = AutoregressiveTransform(Affine(), chain)
    x = torch.randn(3, 40, dtype=torch.float64)
    with torch.no_grad():
        y = t(x)
        assert t._by_sweeps(y) is None
        chain.evaluations = 0
        torch.testing.assert_close(t.inv(y), x, rtol=0, atol=1e-12)
    assert chain.evaluations == autoregressive.SWEEPS


def test_sweeps_end_when_nothing_changes() -> None:
    chain = Chain(1e-3)
    t = AutoregressiveTransform(Affine(), chain)
    x = torch.randn(3, 40, dtype=torch.float64)
    with torch.no_grad():
        y = t(x)
        chain.evaluations = 0
        torch.testing.assert_close(t.inv(y), x, rtol=0, atol=1e-12)
    assert chain.evaluations < 8


def test_what_is_not_a_number_stays_so() -> None:
    t = transform(Affine())
    y = torch.randn(4, 24, dtype=torch.float64)
    y[2, 3] = torch.nan
    with torch.no_grad():
        assert t._by_sweeps(y) is None
        x = t.inv(y)
    assert x.isnan().any(-1).tolist() == [False, False, True, False]


def test_when_sweeps_are_used() -> None:
    pay = autoregressive.sweeps_pay
    with torch.no_grad():
        assert pay(torch.zeros(32, 16))
        assert not pay(torch.zeros(33, 16))
        assert pay(torch.zeros(2, 64, 300))
        assert not pay(torch.zeros(3, 64, 300))
        assert not pay(torch.zeros(4, 15))
        assert not pay(torch.zeros(4, 64, device="meta"))
        assert not torch.func.vmap(lambda y: torch.tensor(pay(y)))(torch.zeros(2, 4, 64)).any()
    assert pay(torch.zeros(128, 16))
    assert not pay(torch.zeros(129, 16))
    assert pay(torch.zeros(512, 300))
    assert not pay(torch.zeros(513, 300))


@pytest.mark.gpu
def test_a_gpu_sweeps_any_number_of_events() -> None:
    with torch.no_grad():
        assert autoregressive.sweeps_pay(torch.zeros(10_000, 16, device="cuda"))
