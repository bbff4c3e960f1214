"""The training loop's own parts: Adam's update, learning rates, means of iterates."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from pyroflows.training.adam import Adam
from pyroflows.training.loop import Loop


def test_adam_is_torchs() -> None:
    ours = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    unused = torch.randn(2, requires_grad=True)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    mine, reference = Adam([*ours, unused]), torch.optim.Adam(theirs, lr=0.1)
    before = unused.detach().clone()
    for step in range(5):
        if step == 2:  # from a stored state on
            state = {name: [t.clone() for t in tensors] for name, tensors in mine.state().items()}
            mine = Adam([*ours, unused])
            mine.restore(state)
        for optimizer, parameters in ((mine, ours), (reference, theirs)):
            optimizer.zero_grad()
            sum((p**4).sum() + step * p.sum() for p in parameters).backward()
        mine.step(0.1, unless=torch.tensor(False))
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    assert torch.equal(unused, before)
    still = [p.detach().clone() for p in ours]
    mine.step(0.1, unless=torch.tensor(True))
    assert all(map(torch.equal, ours, still))


def noisy(x: Tensor) -> Any:
    """A parabola around one, with noise in its gradient."""
    return lambda: (x - 1).square().sum() + (torch.randn_like(x) * x).sum()


def loop(x: Tensor, **options: Any) -> Loop:
    defaults: dict[str, Any] = {
        "loss": noisy(x),
        "batches": repeat(()),
        "parameters": [x],
        "steps": 600,
        "lr": 0.05,
        "clip_norm": 100.0,
        "check": lambda: (x - 1).square().sum().item(),
        "check_every": 50,
        "patience": None,
        "progress": False,
        "title": "a parabola",
    }
    return Loop(**{**defaults, **options})


def test_a_mean_of_iterates_is_checked_and_kept() -> None:
    x = torch.zeros(200, requires_grad=True)
    iterates: list[Tensor] = []

    def loss() -> Tensor:
        iterates.append(x.detach().clone())
        return noisy(x)()

    run = loop(x, loss=loss, enough=lambda: None)
    assert run.run()[0] == "all steps were done"
    steps = [step for step, _ in run.history.checks]
    assert steps == [0, *range(50, 401, 50), 457, 522, 596, 600]
    # The mean is much closer to the minimum than the iterates, and what was checked last.
    error = (x.detach() - 1).square().sum().item()
    assert error == pytest.approx(run.history.checks[-1][1])
    assert error < 0.1 * (iterates[-1] - 1).square().sum().item()


def test_what_is_enough_ends_the_fit_and_is_kept() -> None:
    x = torch.zeros(3, requires_grad=True)
    values = iter([5.0, 1.0, 2.0])
    answers = iter([None, None, "it is enough"])
    run = loop(x, check=lambda: next(values), enough=lambda: next(answers))
    assert run.run()[0] == "it is enough"
    assert run.history.checks == [(0, 5.0), (50, 1.0), (100, 2.0)]
    assert torch.equal(x, run._mean[0])
    # From the start, where that is enough.
    y = torch.zeros(3, requires_grad=True)
    at_once = loop(y, enough=lambda: "at once")
    assert at_once.run()[0] == "at once"
    assert not at_once.history.losses
    assert torch.equal(y, torch.zeros(3))


def test_rates() -> None:
    x = torch.zeros(3, requires_grad=True)
    cosine = loop(x, steps=100, lr=1.0)
    assert [cosine._rate(step) for step in (1, 51, 101)] == pytest.approx([1.0, 0.5, 0.0])
    held = loop(x, lr=1.0, enough=lambda: None)
    assert [held._rate(s) for s in (1, 5, 10, 400, 1600)] == pytest.approx([0.1, 0.5, 1, 1, 0.5])
