"""The benchmark of speed: its page, and on a GPU a stand-in for the card and tiny flows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch

from pyroflows.training import compiled
from tests import elsewhere
from tests.benchmarks.speed import __main__ as command
from tests.benchmarks.speed import measure, page, work
from tests.benchmarks.speed.architecture import Contender
from tests.benchmarks.speed.contenders import is_installed
from tests.benchmarks.speed.options import apart
from tests.benchmarks.speed.workloads import GPU_WORKLOADS, Workload

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning"),
]
needs_zuko = pytest.mark.skipif(not is_installed("zuko"), reason="there is no zuko")
MIB, W6 = 2**20, "W6 IAF guide: 64 draws"


class Card:
    """Stands for ``torch.cuda``: memory is what the test says, anything else torch's own."""

    def __init__(self) -> None:
        self.torch = torch.cuda
        self.held = self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.torch, name)

    def take(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)

    def current_blas_handle(self) -> None: ...

    def synchronize(self) -> None: ...

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self) -> None:
        self.most = self.held

    def memory_reserved(self) -> int:
        return self.held

    def max_memory_reserved(self) -> int:
        return self.most

    def get_device_name(self, index: int) -> str:
        return "a card"

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(total_memory=80 * 2**30)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """What is put on the card stays on the CPU."""
    stand_in, build = Card(), Workload.build
    monkeypatch.setattr(torch, "cuda", stand_in)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # a quarter of a second each

    def on_cpu(self: Workload, name: str, device: str) -> Contender:
        assert device == "cuda"
        stand_in.take(MIB)
        return build(self, name)

    monkeypatch.setattr(Workload, "build", on_cpu)
    return stand_in


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The command, writing elsewhere, with nothing compiled, and no global of torch's changed."""
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(page, "PAGES", tmp_path)
    monkeypatch.setattr(measure, "SLICE", 1e-4)
    monkeypatch.setattr(compiled, "inductor", lambda graph, inputs: graph)
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(pyro, "enable_validation", lambda on: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(work, "train", lambda contender, features: None)
    monkeypatch.setattr(command, "GPU_WORKLOADS", {t: small(w) for t, w in GPU_WORKLOADS.items()})

    def call(*options: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["speed", "--device", "cuda", "--budget", "0", *options])
        command.main()
        stored: dict[str, Any] = json.loads((tmp_path / "speed-cuda.json").read_text())
        return stored

    return call


def small(workload: Workload) -> Workload:
    a = workload.architecture
    features = a.features if workload.work.startswith("schools") else min(a.features, 4)
    a = replace(a, features=features, layers=2, hidden=32)
    return replace(workload, architecture=a, number=8)


@needs_zuko
def test_every_workload_is_timed_and_its_memory_taken(
    card: Card, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    stored = run("--page")
    assert stored["machine"]["card"].startswith("a card of 80 GiB, CUDA ")
    for title, workload in GPU_WORKLOADS.items():
        line = stored["results"][title]
        assert set(line) == set(filter(workload.admits, command.ON_GPU))
        for timing in line.values():
            assert timing["wall"] > 0
            assert timing["memory"] == 1.0  # what was there before is not on its account
        assert (line.get("pyroflows compiled", {}).get("compiling") is not None) == bool(
            workload.compiled_goal
        )
    text = (tmp_path / "speed-gpu.md").read_text()
    assert "<!--" not in text
    assert text.count("| G2 MAF, 512 features: sample 1024 |") == 3
    assert "| G2 MAF, 512 features: sample 1024 | 1 |  | 1 | 1 | 1 |" in text
    assert "a card of 80 GiB" in text
    assert not (tmp_path / "speed.md").exists()


@needs_zuko
def test_what_a_card_has_no_room_for_is_left_out(
    card: Card,
    run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build, full = Workload.build, {"pyroflows"}

    def limited(self: Workload, name: str, device: str) -> Contender:
        if name in full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.\nAnd more.")
        return build(self, name, device)

    monkeypatch.setattr(Workload, "build", limited)
    options = "--only", "G7 ", "--contenders", "pyroflows", "zuko", "floor"
    (line,) = run(*options)["results"].values()
    assert set(line) == {"zuko", "floor"}
    assert (
        "left out: pyroflows, CUDA out of memory. Tried to allocate.\n" in capsys.readouterr().out
    )
    full.add("zuko")
    assert run(*options)["results"] == {}


def run_there() -> list[str]:
    """The workloads that every eager contender ran on a device that is not there."""
    pyro.enable_validation(False)
    done = []
    for title, workload in GPU_WORKLOADS.items():
        tiny = small(workload)
        names = [name for name in command.ON_GPU if name != "pyroflows compiled"]
        for name in filter(tiny.admits, names):
            with elsewhere.elsewhere() as there:
                run = tiny.run(tiny.build(name, str(there)))
                run()
                run()
        done.append(title)
    return done


@needs_zuko
@pytest.mark.skipif(not elsewhere.IS_POSSIBLE, reason="this torch cannot have a device in Python")
def test_all_tensors_are_on_the_device() -> None:
    assert apart(run_there) == list(GPU_WORKLOADS)


def test_a_peak_is_that_of_a_later_call(card: Card) -> None:
    peak, calls = measure.PeakMemory(), 0

    def step() -> None:
        nonlocal calls
        calls += 1
        size = (64 if calls == 1 else 4) * MIB
        card.take(size)
        card.take(-size)

    card.take(2 * MIB)  # what is built
    assert peak.of(step) == 6.0


def test_without_the_reference_there_is_nothing_to_compare(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--contenders", "pyroflows")
    assert "all are compared with zuko: install it" in capsys.readouterr().err


def test_the_page_takes_what_was_measured_on_two_threads_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(page, "PAGES", tmp_path)
    three = (1.0, 2.0, 3.0)
    line = {
        "zuko": measure.Timing(cpu=three, wall=4.0, ratio=(1.0, 1.0, 1.0), wall_ratio=1.0),
        "pyroflows": measure.Timing(cpu=three, wall=1.0, ratio=three, wall_ratio=0.25),
    }
    stored = {"results": {title: {n: t.as_dict() for n, t in line.items()} for title in (W6,)}}
    (tmp_path / "speed-2.json").write_text(json.dumps(stored))
    assert command.read(tmp_path / "none.json") == {}
    on_two = command.read(tmp_path / "speed-2.json")
    page.write_page({}, page.machine(threads=1), on_two)
    text = (tmp_path / "speed.md").read_text()
    assert "<!--" not in text
    assert f"| {W6} | 4 | 0.25 |  |  | 1.00 |" in text
