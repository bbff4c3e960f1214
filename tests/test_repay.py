"""Whether the steps to come repay compiling them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyroflows.training import repay
from pyroflows.training.repay import Repay, count_operations


class Clock:
    """Every step takes the same time; every fifth is followed by a check of ten seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.now = seconds, 0, 0.0

    def __call__(self) -> float:
        self.steps += 1
        self.now += self.seconds + (10.0 if self.steps % 5 == 0 else 0.0)
        return self.now


def compiled_at(
    monkeypatch: pytest.MonkeyPatch, sure: bool, steps: int, seconds: float, operations: int
) -> tuple[int | None, str]:
    """The step before which it is compiled, and what is said where it is not."""
    monkeypatch.setattr(repay.time, "perf_counter", Clock(seconds))
    decision = Repay(sure)
    for step in range(steps):
        if decision.due(steps - step, lambda: operations):
            return step, decision.reason
    return None, decision.reason


def test_a_long_fit_is_compiled_when_its_steps_are_timed(monkeypatch: Any) -> None:
    """1,000 operations in 5 ms: 30 s to compile, 3 ms saved a step."""
    assert compiled_at(monkeypatch, True, 11_000, 0.005, 1000)[0] == repay.TIMED


def test_a_short_fit_is_not_and_says_why(monkeypatch: Any) -> None:
    step, reason = compiled_at(monkeypatch, True, 3000, 0.006, 1000)
    assert step is None
    assert reason == "2990 steps would save about 9 s, and that takes 30 s"


def test_no_more_is_saved_than_a_step_takes(monkeypatch: Any) -> None:
    assert compiled_at(monkeypatch, True, 9000, 0.001, 1000)[0] is None


def test_large_batches_save_a_share(monkeypatch: Any) -> None:
    assert compiled_at(monkeypatch, True, 2000, 0.1, 1000)[0] == repay.TIMED


def test_a_fit_that_may_end_is_compiled_when_it_has_lasted(monkeypatch: Any) -> None:
    """19.5 s to compile, a quarter saved, 1 ms a step: after as many steps as would repay it."""
    step, _ = compiled_at(monkeypatch, False, 100_000, 0.004, 300)
    assert step == pytest.approx(19.5 / 0.001, rel=0.01)
    step, reason = compiled_at(monkeypatch, False, 2800, 0.004, 300)
    assert step is None
    assert reason.startswith("2790 steps would save about")


def test_a_fit_that_ended_before(monkeypatch: Any) -> None:
    reason = compiled_at(monkeypatch, True, 5, 0.004, 300)[1]
    assert reason == "the fit ended before it was known whether that pays"


def test_operations_of_the_backward_pass_count() -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert count_operations(lambda: x.exp().sum()) == 2
    forward = count_operations(lambda: x.exp().sum())
    assert count_operations(lambda: x.exp().sum().backward()) > forward
