"""Two processes that fit one flow do what one does: `torchrun`, by gloo, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyroflows as pf
from tests import worker

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    worker.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> str:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, "-m", "tests.worker", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two(said: str, folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_have_the_loss_curve_of_one(two: list[dict[str, Any]]) -> None:
    """Batches of 51 rows are 26 and 25: the average is weighted."""
    assert two[0]["density"] == pytest.approx(worker.density(Path()), rel=1e-9)
    assert two[0]["simulator"] == pytest.approx(worker.simulator(Path()), rel=1e-5)


def test_all_processes_end_in_the_same_state(two: list[dict[str, Any]]) -> None:
    for what in ("density", "guide", "simulator", "file"):
        assert two[0][what] == pytest.approx(two[1][what], rel=1e-12)


def test_a_guide_shares_out_its_draws(two: list[dict[str, Any]]) -> None:
    """Other noise than of one process, of the same guide."""
    one = worker.guide(Path())
    assert len(two[0]["guide"]) == len(one)
    assert two[0]["guide"][:5] != pytest.approx(one[:5], rel=1e-6)
    # The evidence is 1: its logarithm from a thousand draws.
    assert two[0]["guide"][-2] == pytest.approx(0.0, abs=0.1)
    late, alone = (sum(run[-22:-2]) / 20 for run in (two[0]["guide"], one))
    assert late == pytest.approx(alone, abs=0.1)
    assert late < sum(one[:5]) / 5 - 0.3


def test_a_file_is_shared_out_and_its_moments_are_those_of_all(
    two: list[dict[str, Any]], folder: Path
) -> None:
    alone = worker.file(folder)
    x = worker.table(1000)
    moments = [*x.mean(0).tolist(), *x.std(0).tolist()]
    # Held-out rows are left out of them.
    assert two[0]["file"][:4] == pytest.approx(moments, rel=0.05, abs=3.0)
    assert two[0]["file"][:4] == pytest.approx(alone[:4], rel=1e-12)
    assert two[0]["file"][4] == pytest.approx(alone[4], abs=0.5)


def test_a_checkpoint_serves_all_processes(two: list[dict[str, Any]]) -> None:
    assert two[0]["resumed"] == two[0]["density"]
    assert two[1]["resumed"] == two[0]["density"]


def test_processes_with_different_flows_are_told(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert "expected the same tensors in all" in result["different"]
        assert "processes without a common group" in result["different"]
        assert "at least a row for each of 2 processes, got 1" in result["too small"]


def test_the_command_line_in_two_processes(said: str, folder: Path) -> None:
    assert said.count("saved to") == 1
    assert "20 steps" in said
    score = pf.load(folder / "flow.safetensors")().log_prob(worker.table(1000).float()).mean()
    assert -score.item() == pytest.approx(float(said.split("(nats) ")[1].split()[0]), abs=0.5)
