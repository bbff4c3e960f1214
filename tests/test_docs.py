"""The README's code and the tutorials run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
TUTORIALS = [
    # Fits with the default budget, and NUTS.
    pytest.param(path, marks=[pytest.mark.slow] if path.stem == "svi_start_to_finish" else [])
    for path in sorted((ROOT / "tutorials").glob("*.ipynb"))
]
# Packages of the test extra that some versions of Python lack.
NEEDS = {"preconditioned_nuts": "nutpie"}
WITH_CODE = [page for page in PAGES if CODE.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in CODE.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    # Eighty fits: a few steps show that the code runs.
    monkeypatch.setenv("PYROFLOWS_STEPS", "3")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
