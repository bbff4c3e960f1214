"""The page of the family says what the catalogue says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

import pyroflows as pf

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "images" / "flows"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "family.py"))


def test_page_is_what_the_script_writes(script: dict[str, Any]) -> None:
    committed = (DOCS / "explanation" / "flows.md").read_text()
    assert committed == script["page"](), "run python docs/family.py"


def test_every_flow_has_its_row_section_and_picture() -> None:
    committed = (DOCS / "explanation" / "flows.md").read_text()
    nats = json.loads((PICTURES / "nats.json").read_text())
    assert sorted(nats) == sorted(pf.list_flows())
    for name in pf.list_flows():
        assert f"| [{name}](#flow-{name.lower()}) |" in committed
        assert f"### {name}: " in committed
        assert f"{nats[name]:.2f} test nats" in committed
        assert 0 < (PICTURES / f"{name}.png").stat().st_size < 60_000
    assert len(list(PICTURES.glob("*.png"))) == len(nats)


def test_angles_are_angles_and_reproducible(script: dict[str, Any]) -> None:
    rows = script["angles"](1000, seed=0)
    assert rows.shape == (1000, 2)
    assert rows.abs().max() <= 3.1416
    assert rows.equal(script["angles"](1000, seed=0))
