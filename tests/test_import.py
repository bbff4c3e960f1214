"""What `import pyroflows` costs and does: little, and nothing to others."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS_OVER_PYRO = 0.3

TIMED = """
import time
import pyro
start = time.perf_counter()
import pyroflows
print(time.perf_counter() - start)
"""

WATCHED = """
import sys
import pyro
from tests.conftest import global_state
before = global_state()
import pyroflows
print({name: value for name, value in global_state().items() if value != before[name]})
print({"arviz", "arviz_base", "matplotlib", "pandas", "sklearn", "xarray"} & set(sys.modules))
"""


def output(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_changes_no_global_and_loads_nothing_heavy() -> None:
    assert output(WATCHED).split("\n") == ["{}", "set()", ""]


def test_import_is_quick() -> None:
    """The first run, which may compile bytecode, is thrown away."""
    seconds = [float(output(TIMED)) for _ in range(6)][1:]
    assert statistics.median(seconds) <= SECONDS_OVER_PYRO
