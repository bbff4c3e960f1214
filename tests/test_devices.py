"""Where tensors are: everything on one device, which the host seldom waits for.

On a device that is not there, in processes of their own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

import pyro
import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.training import NegativeELBO, NegativeLogLikelihood
from pyroflows.training.adam import Adam
from pyroflows.training.loop import Loop
from tests import elsewhere
from tests.models import SCHOOL_ERRORS, SCHOOLS, eight_schools

pytestmark = pytest.mark.skipif(
    not elsewhere.IS_POSSIBLE, reason="this torch cannot have a device in Python"
)
SIZES: dict[str, Any] = {"transforms": 2, "hidden_features": (8,)}


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """Runs functions in another process."""
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def rows(device: torch.device | str = "cpu") -> torch.Tensor:
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), device="cpu")
    return x.cumsum(-1).to(device)


# --- the device itself ----------------------------------------------------------------------------


def two_devices(function: Callable[..., Any]) -> str:
    with elsewhere.elsewhere() as there:
        try:
            function(torch.ones(3, device=there))
        except (RuntimeError, TypeError) as error:
            return str(error)
    return ""


def add(x: torch.Tensor) -> None:
    x + torch.ones(3)


def draw(x: torch.Tensor) -> None:
    torch.randn(3, generator=torch.Generator(), device=x.device)


def read(x: torch.Tensor) -> None:
    x.numpy()


@pytest.mark.parametrize(
    ("function", "message"),
    [(add, "two devices"), (draw, "generator of the CPU"), (read, "NumPy")],
)
def test_two_devices_are_an_error(apart: Any, function: Any, message: str) -> None:
    assert message in apart(two_devices, function)


def learned_there() -> tuple[list[float], list[int]]:
    with elsewhere.elsewhere() as there:
        weight = nn.Parameter(torch.ones(3, device=there))
        rows = (weight * torch.arange(3.0).to(there) + 1.0).unsqueeze_(0)
        loss = rows.square().sum((0, 1))
        counts = [elsewhere.reads(loss.backward), elsewhere.reads(loss.item)]
        return weight.grad.tolist(), counts  # type: ignore[union-attr]


def test_gradients_are_those_of_the_cpu_and_reading_counts(apart: Any) -> None:
    gradient, counts = apart(learned_there)
    assert gradient == [0.0, 4.0, 12.0]
    assert counts == [0, 1]


# --- steps and fits -------------------------------------------------------------------------------


def reads_of_a_step(recipe: Any) -> int:
    """How often a step waits."""
    with elsewhere.elsewhere() as there, torch.device(there):
        if recipe is None:
            guide = pf.AutoFlow(eight_schools)
            data = SCHOOL_ERRORS.to(there), SCHOOLS.to(there)
            guide.register(*data)
            loss: nn.Module = NegativeELBO(guide, 8)
            loss.watch.on = False  # as in a fit there
            batch: tuple[Any, ...] = (data,)
        else:
            loss, batch = NegativeLogLikelihood(recipe(3, **SIZES)), (rows(there),)
        adam = Adam([p for p in loss.parameters() if p.requires_grad])

        def step() -> None:
            adam.zero_grad()
            loss(*batch).backward()
            torch.nn.utils.clip_grad_norm_(adam.parameters, 5.0)

        step()
        return elsewhere.reads(step)


@pytest.mark.parametrize("recipe", [pf.NSF, pf.MAF, pf.IAF, pf.RealNVP, None])
def test_a_step_waits_for_nothing(apart: Any, recipe: Any) -> None:
    assert apart(reads_of_a_step, recipe) == 0


def loop_there(bad: range) -> tuple[list[bool], int, int]:
    """Whether each step of a loop was watched, how many were left out, and how often it waited."""
    watched: list[bool] = []
    with elsewhere.elsewhere() as there:
        x = torch.zeros(3, device=there, requires_grad=True)

        def loss() -> torch.Tensor:
            watched.append(loop.watch.on)
            return (x - 1).square().sum() * (torch.nan if len(watched) in bad else 1.0)

        loop = Loop(
            loss=loss,
            batches=repeat(()),
            parameters=[x],
            steps=60,
            lr=0.1,
            clip_norm=5.0,
            check=None,
            check_every=60,
            patience=None,
            progress=False,
            title="a parabola",
        )
        with pytest.MonkeyPatch.context() as patch:
            # Torch's own update reads, but not the fused one of a GPU.
            patch.setattr(Adam, "step", lambda self, lr, unless: None)
            reads = elsewhere.reads(loop.run)
        return watched, loop.history.skipped, reads


@pytest.mark.parametrize("bad", [range(0), range(5, 6), range(1, 21)])
def test_steps_are_watched_once_one_was_left_out(apart: Any, bad: range) -> None:
    watched, skipped, reads = apart(loop_there, bad)
    assert watched == [False] * 20 + [bool(bad)] * 40
    assert skipped == len(bad)
    assert reads <= 6  # three times the losses of twenty steps


def fitted_rows(by_default: bool) -> list[float]:
    with elsewhere.elsewhere() as there:
        torch.manual_seed(0)
        flow = pf.NSF(3, **SIZES)
        options: dict[str, Any] = {"steps": 10, "batch_size": 64, "seed": 0, "progress": False}
        if by_default:
            with torch.device(there):
                fit = pf.fit_mle(flow.to(there), rows(there), **options)
        else:
            fit = pf.fit_mle(flow, rows(), device=there, **options)
        if flow().sample((2,)).device != there:
            raise RuntimeError("draws of a flow are where it is")
        return fit.history.losses


@pytest.mark.parametrize("by_default", [False, True])
def test_fits_of_rows(apart: Any, by_default: bool) -> None:
    torch.manual_seed(0)
    flow = pf.NSF(3, **SIZES)
    fit = pf.fit_mle(flow, rows(), steps=10, batch_size=64, seed=0, progress=False)
    assert apart(fitted_rows, by_default) == pytest.approx(fit.history.losses, abs=1e-4)


def fitted_guide(estimator: Any) -> str:
    """By a model with numbers of its own, which are where torch puts them by default."""
    pyro.clear_param_store()
    with elsewhere.elsewhere() as there, torch.device(there):
        guide = pf.AutoFlow(eight_schools)
        data = SCHOOL_ERRORS.to(there), SCHOOLS.to(there)
        options: dict[str, Any] = {"steps": 3, "draws": 32, "starts": 4, "estimator": estimator}
        fit = pf.fit_svi(guide, *data, psis_samples=1000, seed=0, progress=False, **options)
        pf.to_arviz(guide, *data, num_samples=100)
        return fit.stop_reason


@pytest.mark.parametrize("estimator", ["stl", "forward"])
def test_fits_of_guides(apart: Any, estimator: str) -> None:
    assert apart(fitted_guide, estimator) == "all steps were done"
