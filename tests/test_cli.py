"""The command line, and the demonstration with short fits."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import arviz
import matplotlib
import numpy as np
import pytest
import torch

import pyroflows
from pyroflows import cli, demo


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"pyroflows {pyroflows.__version__}\n"


def test_the_package_can_be_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m pyroflows` and `torchrun -m pyroflows` do."""
    monkeypatch.setattr("sys.argv", ["pyroflows", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("pyroflows", run_name="__main__")
    assert stop.value.code == 0
    assert "pyroflows" in capsys.readouterr().out


def test_fit_saves_a_conditional_flow_of_named_columns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, out = tmp_path / "x.npy", tmp_path / "flow.safetensors"
    np.save(data, np.random.default_rng(0).normal(size=(200, 4)))
    options = ["--columns", "0,3", "--context", "1", "--flow", "maf", "--set", "transforms=1"]
    options += ["--set", "hidden_features=[8]", "--steps", "5", "--dtype", "float64"]
    assert cli.main(["fit", str(data), "--out", str(out), "--device", "cpu", *options]) == 0
    assert f"saved to {out}" in capsys.readouterr().out
    flow = pyroflows.load(out)
    assert (flow.event_shape, flow.context_size, flow.dtype) == ((2,), 1, torch.float64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.csv"], "expected .npy files or .parquet files, got x.csv"),
        (["missing.npy"], "missing.npy"),
        (["x.npy", "--columns", "0,9"], "has no column 9. It has 0, 1"),
        (["x.npy", "--flow", "NFS"], "expected the name of a flow, got 'NFS'. Did you mean"),
        (["x.npy", "--set", "bend=2"], "bend"),
        (["x.npy", "--device", "abacus"], "expected 'auto', 'cpu', 'cuda', 'mps'"),
    ],
)
def test_fit_says_what_it_cannot_do(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((20, 2)))
    assert cli.main(["fit", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_options_of_the_recipe_have_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "x.npy", "--set", "bins"])
    assert "expected NAME=VALUE, got 'bins'" in capsys.readouterr().err


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def find(name: str) -> object:
        return None if name == "sklearn" else importlib.util.find_spec(name)

    monkeypatch.setattr(cli, "find_spec", find)
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "pip install scikit-learn" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MLE_STEPS": 100,
        "NUTS_DRAWS": 50,
        "WARMUP": 50,
        "GUIDE_DRAWS": 200,
    }.items():
        monkeypatch.setattr(demo, name, value)


def test_demo_writes_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    matplotlib.use("agg")
    shorten(monkeypatch)
    assert cli.main(["demo", "--out", str(tmp_path / "a" / "demo"), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    for said in ("Gaussian, full covariance", "k-hat", "theta[H]", "tau"):
        assert said in out
    written = sorted(path.name for path in (tmp_path / "a" / "demo").iterdir())
    assert written == ["density.png", "posterior.nc", "posterior.png", "training.png"]
    assert all(name in out for name in written)
    posterior = arviz.from_netcdf(tmp_path / "a" / "demo" / "posterior.nc").posterior
    assert posterior["theta"].dims == ("chain", "draw", "school")


@pytest.mark.slow
def test_demo_shows_what_the_readme_says(tmp_path: Path) -> None:
    matplotlib.use("agg")
    density = demo.fit_density(seed=0)
    assert density.lead.mean() > 10 * density.lead.std() / len(density.lead) ** 0.5
    posterior = demo.fit_schools(seed=0)
    assert posterior.fit.psis.k_hat < 0.7
    guide, nuts = demo.scalars(posterior.guide), demo.scalars(posterior.nuts)
    apart = {name: (guide[name].mean() - nuts[name].mean()) / nuts[name].std() for name in nuts}
    assert max(map(abs, apart.values())) < 0.1, apart
