"""What sampling costs: incremental, so a few dense passes and not one per feature."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pyroflows as pf

FEATURES, DRAWS, HIDDEN = 64, 256, (128, 128)


def two_matrices(_out: Any, first: Any, second: Any, *args: Any, **kwargs: Any) -> int:
    """The in-place product is not among those that torch counts by itself."""
    return 2 * first[0] * first[1] * second[1]


def flops(function: Callable[[], Any]) -> int:
    custom: dict[Any, Any] = {torch.ops.aten.addmm_: two_matrices}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        function()
    return counter.get_total_flops()


def large(recipe: Any, **options: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Drawing and scoring the same number of values."""
    flow = recipe(FEATURES, hidden_features=HIDDEN, **options)
    x = torch.randn(DRAWS, FEATURES)
    return lambda: flow().sample((DRAWS,)), lambda: flow().log_prob(x)


CASES = {
    "MAF": (pf.MAF, {}),
    "IAF": (pf.IAF, {}),
    "NSF": (pf.NSF, {"autoregressive": True}),
}


@pytest.mark.parametrize(("recipe", "options"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_sampling_takes_the_arithmetic_of_scoring(recipe: Any, options: dict[str, Any]) -> None:
    """Exact, for products of matrices: without mixing, whose solves are not counted."""
    sample, score = large(recipe, mixing=None, **options)
    sampling, scoring = flops(sample), flops(score)
    slow, fast = (scoring, sampling) if recipe is pf.IAF else (sampling, scoring)
    assert 0.3 * fast < slow <= fast


@torch.no_grad()
def test_sampling_takes_less_time_than_twenty_dense_passes() -> None:
    sample, score = large(pf.MAF)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for function in (sample, score, score):
            function()
        times: dict[Any, list[float]] = {sample: [], score: []}
        for _ in range(9):
            for function, taken in times.items():
                start = time.perf_counter()
                function()
                taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    ratio = statistics.median(times[sample]) / statistics.median(times[score])
    assert ratio < 20, f"{ratio:.1f} dense passes"
