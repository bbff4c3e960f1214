"""The measurements of fits' options, at sizes that take no time, with nothing compiled."""

from __future__ import annotations

import os

import pyro
import pytest
import torch

import pyroflows as pf
from pyroflows.training import compiled
from tests.benchmarks.speed import measure, options

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning"),
]
SIZES = {"transforms": 2, "hidden_features": (8,)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded is replayed, and what is global stays."""
    monkeypatch.setattr(compiled, "inductor", lambda graph, inputs: graph)
    monkeypatch.setattr(measure, "SLICE", 1e-3)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(pyro, "enable_validation", lambda on: None)


CASES = {"a density": options.density(pf.MAF, 3, 16, **SIZES), "a guide": options.guide(4)}


@pytest.mark.parametrize("title", CASES)
def test_a_line_on_compiling(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "COMPILED", CASES)
    line = options.compiling(title, budget=0.0)
    assert line.operations > 50
    assert min(line.eager, line.compiled, line.seconds) > 0


def test_a_step_that_is_not_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "COMPILED", CASES)
    monkeypatch.setattr(compiled, "inductor", lambda graph, inputs: 1 / 0)
    with pytest.raises(RuntimeError, match="a density: not compiled: division by zero"):
        options.compiling("a density", budget=0.0)


def test_every_line_has_a_process_and_a_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = []

    def apart(function: object, title: str, budget: float) -> options.Compiling:
        caches.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return options.Compiling(1234, 1.25, 0.125, 20.0 if budget else 3.0)

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(options, "COMPILED", CASES)
    monkeypatch.setattr(options, "apart", apart)
    options.compile_table(budget=1.0)
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| a density | 1,234 | 1.2 ms | 0.12 ms | 20 s | 3 s |"
    assert len(rows) == 4
    assert caches[0] == caches[1] != caches[2] == caches[3]


def test_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "somewhere")
    assert options.apart(os.getenv, "TORCHINDUCTOR_CACHE_DIR") == "somewhere"
    assert options.apart(os.getpid) != os.getpid()


def test_a_line_on_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "REDUCED", {"a density": CASES["a density"]})
    options.precision_table(budget=0.0)
    title, *times = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert title == "a density"
    assert [float(time.removesuffix(" ms")) > 0 for time in times] == [True, True]
