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


class Chain:
    """Every feature is shifted by a multiple of the one before: a sweep brings one feature."""

    def __init__(self, slope: float) -> None:
        self.slope, self.evaluations = slope, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        shift = self.slope * torch.nn.functional.pad(x[..., :-1], (1, 0))
        return torch.stack([shift, torch.zeros_like(shift)])

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
    assert not pay(torch.zeros(4, 64))


@pytest.mark.gpu
def test_a_gpu_sweeps_any_number_of_events() -> None:
    with torch.no_grad():
        assert autoregressive.sweeps_pay(torch.zeros(10_000, 16, device="cuda"))
