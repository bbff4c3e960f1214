"""The command line: ``pyroflows demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pyroflows import __version__

# Module, and the package that brings it.
_DEMO_NEEDS = {"h5netcdf": "h5netcdf", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyroflows", description="Normalizing flows for Pyro.")
    parser.add_argument("--version", action="version", version=f"pyroflows {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="fit a flow to a real table, then use one as the guide of eight schools",
        description="Fit a flow to a real table beside Gaussians, then use a flow as the guide of "
        "the eight schools model beside NUTS. Works offline, in under three minutes on two cores.",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for plots and draws")
    demo.add_argument("--seed", type=int, default=0, help="of split, fits and draws (default 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    missing = [package for module, package in _DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        print(
            f"pyroflows demo: {', '.join(missing)} not installed. Install what the demo needs:\n\n"
            f"    pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 1
    from pyroflows import demo  # plots and data sets: not needed for --version

    demo.run(arguments.out, arguments.seed)
    return 0
