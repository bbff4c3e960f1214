"""A fit that is killed goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf


class Killed(BaseException):
    """What no handler of the fit catches."""


def banana(calls: list[int], killed_at: int | None) -> Callable[[], None]:
    def model() -> None:
        calls.append(1)
        if len(calls) == killed_at:
            raise Killed
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        pyro.sample("b", dist.Normal(0.5 * a**2, 0.5))

    return model


def fit(
    path: Path | None, killed_at: int | None = None, estimator: Any = "stl"
) -> tuple[Any, dict[str, Any], int]:
    pyro.clear_param_store()
    calls: list[int] = []
    guide = pf.AutoFlow(banana(calls, killed_at))
    # Nothing is enough: the budget is spent, with looks after 25, 50 and 60 steps.
    options: dict[str, Any] = {
        "starts": 4,
        "budget": 60,
        "enough": 1.0,
        "draws": 16,
        "psis_samples": 500,
    }
    options |= {"estimator": estimator, "checkpoint": path}
    result = pf.fit_svi(guide, seed=0, progress=False, **options)
    return result, {k: v.clone() for k, v in guide.state_dict().items()}, len(calls)


@pytest.mark.parametrize(
    ("share", "estimator"),
    [(0.05, "stl"), (0.75, "stl"), (0.9, "stl"), (0.75, "fab")],
    ids=["start", "first", "second", "annealed"],
)
def test_a_killed_fit_goes_on_to_the_same_result(
    tmp_path: Path, share: float, estimator: str
) -> None:
    whole, state, calls = fit(None, estimator=estimator)
    assert [step for step, _ in whole.history.checks] == [0, 25, 50, 60]
    path = tmp_path / "fit.pt"
    with pytest.raises(Killed):
        fit(path, killed_at=int(share * calls), estimator=estimator)
    again, state_again, _ = fit(path, estimator=estimator)
    assert again.history == whole.history
    assert state.keys() == state_again.keys()
    assert all(torch.equal(value, state_again[name]) for name, value in state.items())
    assert again.psis.log_evidence == whole.psis.log_evidence
    assert str(again).split("stopped")[1] == str(whole).split("stopped")[1]


def test_a_finished_fit_is_read_back(tmp_path: Path) -> None:
    first, _, calls = fit(tmp_path / "fit.pt")
    again, _, fewer = fit(tmp_path / "fit.pt")
    assert fewer < calls - 60  # neither the steps nor the start are made again
    assert again.history == first.history
    assert again.psis.log_evidence == first.psis.log_evidence


def test_files_of_other_fits_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    fit(path)
    pyro.clear_param_store()
    guide = pf.AutoFlow(lambda: pyro.sample("c", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"belongs to another fit.*'c'.*'a'.*a file of its own"):
        pf.fit_svi(guide, checkpoint=path, progress=False)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not a checkpoint that can be read.*Delete"):
        fit(path)
