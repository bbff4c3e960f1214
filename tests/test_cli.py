"""The command line, and the demonstration with short fits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import arviz
import matplotlib
import pytest

import pyroflows
from pyroflows import cli, demo


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"pyroflows {pyroflows.__version__}\n"


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
