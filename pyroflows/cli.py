"""The command line: ``pyroflows fit`` and ``pyroflows demo``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    demo.set_defaults(run=_demo)
    _add_fit(commands)
    return parser


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a flow to the rows of a .npy or Parquet file, which may be larger than memory",
        description="Fit a flow to the rows of a file by maximum likelihood, and save it for "
        "pyroflows.load. In several processes: torchrun --nproc-per-node 4 -m pyroflows fit ...",
    )
    fit.add_argument(
        "data", type=Path, nargs="+", help=".npy or .parquet files of the same columns"
    )
    fit.add_argument("--out", type=Path, default=Path("flow.safetensors"), help="file for the flow")
    fit.add_argument("--flow", default="NSF", help="a recipe of pyroflows.list_flows (default NSF)")
    fit.add_argument(
        "--set",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="an argument of the recipe, in JSON: --set transforms=8 --set hidden_features=[64,64]",
    )
    fit.add_argument("--columns", type=_columns, help="what to model, a,b,... (default all others)")
    fit.add_argument("--context", type=_columns, help="columns that the flow is conditioned on")
    fit.add_argument("--memory", type=int, default=256, help="for rows, in MiB (default 256)")
    fit.add_argument("--validation", type=float, default=0.1, help="share held out (default 0.1)")
    fit.add_argument("--steps", type=int, default=3000, help="(default 3000)")
    fit.add_argument("--batch-size", type=int, default=256, help="of all processes (default 256)")
    fit.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 0.001)")
    fit.add_argument("--patience", type=int, default=10, help="checks without gain (default 10)")
    fit.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    fit.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    fit.add_argument("--checkpoint", type=Path, help="file that keeps the fit; goes on from it")
    fit.add_argument("--seed", type=int, help="of the weights, split and batches")
    fit.set_defaults(run=_fit)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _columns(text: str) -> list[str | int]:
    return [int(name) if name.isdigit() else name for name in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _demo(arguments: argparse.Namespace) -> int:
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


def _fit(arguments: argparse.Namespace) -> int:
    import torch

    import pyroflows as pf
    from pyroflows.errors import FitError

    with process_group():
        try:
            rows = pf.RowFile(
                arguments.data,
                columns=arguments.columns,
                context=arguments.context,
                memory=arguments.memory * 2**20,
            )
            if arguments.seed is not None:
                torch.manual_seed(arguments.seed)
            features, context = rows.sizes()
            recipe: Any = pf.get_flow(arguments.flow)
            flow = recipe(features, context, **dict(arguments.set))
            fit = pf.fit_mle(
                flow,
                rows,
                validation=arguments.validation,
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                lr=arguments.lr,
                patience=arguments.patience,
                device=arguments.device,
                dtype=getattr(torch, arguments.dtype),
                checkpoint=arguments.checkpoint,
                seed=arguments.seed,
            )
        except (ImportError, OSError, TypeError, ValueError, FitError) as error:
            print(f"pyroflows fit: {error}", file=sys.stderr)
            return 1
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            pf.save(flow, arguments.out)
            print(f"{fit}\nsaved to {arguments.out}")
    return 0


@contextmanager
def process_group() -> Iterator[None]:
    """The process group that torchrun has started this process for, if it has, and none is up."""
    import torch
    from torch import distributed

    launched = distributed.is_available() and distributed.is_torchelastic_launched()
    if not launched or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()
    try:
        yield
    finally:
        distributed.destroy_process_group()
