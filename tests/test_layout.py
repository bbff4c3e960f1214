"""The package's architecture: who may import whom, and what every module must be."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyroflows

ROOT = Path(pyroflows.__file__).parent
DOCS = ROOT.parent / "docs"
FILES = sorted(ROOT.rglob("*.py"))

# A module imports only from its own part and from the parts before it.
PARTS = [
    "errors",
    "testing",
    "numerics",
    "nn",
    "transforms",
    "layers",
    "distributions",
    "flows",
    "guides",
    "diagnostics",
    "training",
    "mcmc",
    "estimators",
    "io",
]
STRANGERS = {("nn", "transforms"), ("transforms", "nn")}
# The front doors: they see all parts.
UNRESTRICTED = {"__init__", "__main__", "cli", "demo"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [module_name(path) for path in FILES]
PUBLIC = [f"pyroflows.{part}" for part in PARTS if f"pyroflows.{part}" in MODULES]


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each line with an import of ours, and the part that it imports from.

    Lazy imports inside functions and imports for type checking count: they are dependencies too.
    The version is a fact about the package, not a part of it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "pyroflows":
            names = [f"pyroflows.{a.name}" for a in node.names if a.name != "__version__"]
        elif isinstance(node, ast.ImportFrom):
            names = ["." if node.level else str(node.module)]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("pyroflows", ""):
                yield node.lineno, name.removeprefix("pyroflows").strip(".").split(".")[0]


def forbidden_imports(part: str, source: str) -> list[str]:
    allowed = PARTS[: PARTS.index(part) + 1]
    return [
        f"line {line}: {part} imports {target or 'the whole package'}"
        for line, target in imported(ast.parse(source))
        if target not in allowed or (part, target) in STRANGERS
    ]


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_module_follows_the_rules(path: Path) -> None:
    source = path.read_text()
    if part_of(path) not in UNRESTRICTED:
        assert forbidden_imports(part_of(path), source) == []
    asserts = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    assert asserts == [], "input is checked by exceptions, which python -O keeps"
    assert source.count("\n") <= 400


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("nn", "from pyroflows.transforms import Transform"),
        ("transforms", "import pyroflows.nn.mlp"),
        ("flows", "def f():\n    from pyroflows.training.loop import fit"),
        ("flows", "from pyroflows import guides"),
        ("flows", "import pyroflows"),
        ("flows", "from pyroflows import NSF"),
        ("flows", "from . import recipes"),
    ],
)
def test_a_forbidden_import_is_found(part: str, source: str) -> None:
    assert forbidden_imports(part, source)


def test_every_module_imports_alone() -> None:
    """Without the package's own `__init__`, whose order of imports would hide a cycle."""
    script = """
import os, sys, types
import pyro
name, root, modules = sys.argv[1], sys.argv[2], sys.argv[3:]
for module in modules:
    if os.fork() == 0:
        package = types.ModuleType(name)
        package.__path__ = [root]
        package.__version__ = "0"
        sys.modules[name] = package
        __import__(module)
        sys.stdout.flush()
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{module} does not import alone")
"""
    alone = [module_name(path) for path in FILES if part_of(path) not in UNRESTRICTED]
    if importlib.util.find_spec("triton") is None:
        alone.remove("pyroflows.numerics.quadratic_kernels")
    command = [sys.executable, "-c", script, "pyroflows", str(ROOT), *alone]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def public_names(module: str) -> list[str]:
    """What an API page shows: a package's `__all__`, and what a plain module defines."""
    namespace = vars(importlib.import_module(module))
    defined = [k for k, v in namespace.items() if getattr(v, "__module__", None) == module]
    return namespace.get("__all__", [name for name in defined if not name.startswith("_")])


@pytest.mark.parametrize("name", ["pyroflows", *PUBLIC])
def test_public_names_resolve(name: str) -> None:
    names = public_names(name)
    assert len(names) == len(set(names)) > 0
    assert [public for public in names if not hasattr(sys.modules[name], public)] == []


@pytest.mark.parametrize("name", [name for name in pyroflows.__all__ if name not in PARTS])
def test_public_name_has_a_docstring_and_an_api_page(name: str) -> None:
    assert (getattr(pyroflows, name).__doc__ or "").strip()
    assert any(name in public_names(part) for part in PUBLIC)


def test_every_part_has_an_api_page() -> None:
    pages = {f"pyroflows.{page.stem}" for page in (DOCS / "api").glob("*.md")}
    assert pages == {*PUBLIC, "pyroflows.index"}
