"""Compiled steps as CUDA graphs: what is captured, what is refused, and on a GPU the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.training import recorded
from tests.benchmarks.speed.work import schools as eight_schools


class Recorder:
    """Stands for ``torch.cuda``: a replay runs the captured call again, into the same outputs."""

    def __init__(self, step: Callable[..., tuple[Tensor, ...]]) -> None:
        self.run, self.capturing = step, False
        self.given: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.runs = 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.Stream = self.current_stream = lambda: stream
        self.stream = self.device = lambda place: nullcontext()
        self.CUDAGraph = lambda: self

    def step(self, *given: Tensor) -> tuple[Tensor, ...]:
        self.runs += 1
        if not self.capturing:
            return self.run(*given)
        # A capture notes where numbers lie, and computes none.
        self.given = given
        self.outputs = tuple(torch.full((), torch.nan) for _ in range(2))
        return self.outputs

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False

    def replay(self) -> None:
        for place, value in zip(self.outputs, self.run(*self.given), strict=True):
            place.copy_(value)


def descend(weight: Tensor, rate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """One step down the squares of ``weight - x``, in place."""
    loss = (weight - x).square().sum()
    weight.sub_(2 * rate * (weight - x))
    return loss, weight.norm()


def test_replays_update_the_state_and_read_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rate = torch.zeros(3), torch.tensor(0.1)
    first = torch.ones(3)
    cuda = Recorder(descend)
    monkeypatch.setattr(recorded.torch, "cuda", cuda)
    replay = recorded.captured(cuda.step, [weight, rate, first], kept=2)
    assert not weight.any()
    assert cuda.runs == recorded.WARM_UP + 1

    expected, losses = torch.zeros(3), []
    for x in (first, torch.tensor([1.0, -2.0, 4.0]), torch.zeros(3)):
        losses.append((replay(weight, rate, x)[0], descend(expected, rate, x)[0]))
        assert torch.equal(weight, expected)
    # Each is a number of its own, not the place that the next replay writes to.
    assert all(torch.equal(a, b) for a, b in losses)
    assert torch.equal(first, torch.ones(3))
    rate.fill_(0.2)
    replay(weight, rate, first)
    descend(expected, rate, first)
    assert torch.equal(weight, expected)


def test_random_numbers_of_the_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randn(()), weight.norm()

    cuda = Recorder(noisy)
    monkeypatch.setattr(recorded.torch, "cuda", cuda)
    with pytest.raises(RuntimeError, match="random numbers of the CPU"):
        recorded.captured(cuda.step, [torch.zeros(3)], kept=1)


# --- on a GPU -------------------------------------------------------------------------------------


def moons(compile: bool, steps: int = 60) -> tuple[list[float], float]:
    """Losses, and seconds a step."""
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    torch.manual_seed(0)
    flow = pf.NSF(2, transforms=3, hidden_features=(32, 32))
    fit = pf.fit_mle(
        flow, x, device="cuda", steps=steps, compile=compile, seed=0, progress=False, patience=None
    )
    return fit.history.losses, fit.seconds / steps


def schools(compile: bool, steps: int = 60) -> tuple[list[float], float]:
    torch.manual_seed(0)
    guide = pf.AutoFlow(eight_schools("cuda"))
    start = time.perf_counter()
    fit = pf.fit_svi(
        guide,
        device="cuda",
        steps=steps,
        draws=16,
        starts=0,
        compile=compile,
        psis_samples=0,
        seed=0,
        progress=False,
    )
    return fit.history.losses, (time.perf_counter() - start) / steps


@pytest.mark.gpu
@pytest.mark.parametrize("fit", [moons, schools])
def test_graphs_take_the_eager_steps(fit: Any, caplog: Any) -> None:
    eager, graph = fit(False)[0], fit(True)[0]
    assert not [r for r in caplog.records if "no CUDA graph" in r.message]
    torch.testing.assert_close(torch.tensor(graph), torch.tensor(eager), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.slow
def test_graphs_of_small_guides_take_a_fifth_of_the_time() -> None:
    # Compiling is in the time of all steps: the longer fit less the shorter leaves it out.
    def step(compile: bool) -> float:
        short, long = 200, 2200
        schools(compile, short)  # so that both find the cache filled
        return schools(compile, long)[1] * long - schools(compile, short)[1] * short

    assert step(True) < step(False) / 5
