"""Options and fixtures of every test; for `make doctest` a plugin that guards the examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests put modules and data: cpu, cuda")
    parser.addoption("--dtype", default="float32", choices=DTYPES, help="of modules and data")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device").startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("--device: torch sees no GPU, or is a build without CUDA")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Kernels are no module where Triton is not."""
    without = collection_path.name == "quadratic_kernels.py" and find_spec("triton") is None
    return True if without else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYROFLOWS_DATA" not in os.environ:
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="PYROFLOWS_DATA is not set"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.config.getoption("--dtype")]


@pytest.fixture(scope="session", autouse=True)
def example_names(doctest_namespace: dict[str, Any]) -> None:
    """Docstring examples need not import what every user has imported."""
    import pyroflows  # here, because test_import.py measures its effects through this file

    doctest_namespace.update(pf=pyroflows, pyro=pyro, torch=torch)


def global_state() -> dict[str, Any]:
    """What a library has no business changing."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "argument validation": torch.distributions.Distribution._validate_args,
        "threads": torch.get_num_threads(),
        **pyro.settings.get(),
    }


def restore(state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["default dtype"])
    if torch.get_default_device() != state["default device"]:
        # Setting it at all would leave a mode behind, which the compiler cannot see through.
        default = state["default device"]
        torch.set_default_device(None if default == torch.device("cpu") else default)
    torch.set_grad_enabled(state["grad mode"])
    torch.set_num_threads(state["threads"])
    pyro.settings.set(**{name: state[name] for name in pyro.settings.get()})
    torch.distributions.Distribution.set_default_validate_args(state["argument validation"])


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Start each test from one seed and an empty param store; fail it if it changes a global."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    before = global_state()
    yield
    after = global_state()
    restore(before)
    pyro.clear_param_store()
    changed = {name: after[name] for name in before if after[name] != before[name]}
    if changed:
        pytest.fail(f"the test changed global state: {changed}")
