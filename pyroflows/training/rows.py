"""What the fits to rows of data share: preparation, checks on held-out rows, the loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyroflows.errors import DataError
from pyroflows.flows import Flow
from pyroflows.numerics import forked_rng
from pyroflows.training.checkpoint import Checkpoint
from pyroflows.training.compiled import Compile, compiled_step
from pyroflows.training.data import (
    MIN_ROWS,
    Batch,
    LoaderRows,
    location_and_scale,
    minibatches,
    rows_of,
    take,
    warn_about_columns,
)
from pyroflows.training.devices import Device, place_
from pyroflows.training.files import FileRows, RowFile
from pyroflows.training.loop import Loop
from pyroflows.training.losses import ReducedPrecision
from pyroflows.training.processes import broadcast_, seeded, total, world
from pyroflows.training.result import History
from pyroflows.training.watch import Watch

Precision = Literal["bf16"] | None
#: Rows scored at once in a check.
CHECK_ROWS = 8192


def fit_rows(
    flow: Flow,
    loss: nn.Module,
    x: Any,
    context: Any,
    *,
    validation: float | Any,
    steps: int,
    batch_size: int,
    lr: float,
    clip_norm: float,
    patience: int | None,
    standardize: bool,
    device: Device,
    dtype: torch.dtype | None,
    progress: bool | None,
    seed: int | None,
    title: str,
    unit: str = "nats",
    compile: Compile = False,
    precision: Precision = None,
    check_loss: nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[History, str, float, str]:
    """Minimise a loss of rows and contexts; history, reason of the end, seconds, what was compiled.

    The options are those of `pyroflows.fit_mle`; ``title`` and ``unit`` are for the bar, and
    ``check_loss`` is for held-out rows, where that is another than ``loss``.
    """
    trained = _in_precision(loss, precision, compile)
    place_(flow, device, dtype)
    with seeded(seed, alone=checkpoint is not None):
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        train, batches, held_out = _prepare(flow, x, context, validation, batch_size, generator)
        sharded = isinstance(train, FileRows) and isinstance(validation, Real)
        parameters: list[Tensor] = [p for p in loss.parameters() if p.requires_grad]
        watch = Watch()
        loop = Loop(
            loss=trained,
            batches=batches,
            parameters=parameters,
            steps=steps,
            lr=lr,
            clip_norm=clip_norm,
            check=None if held_out is None else checker(check_loss or loss, held_out, sharded),
            check_every=max(1, steps // 50),
            patience=patience if held_out is not None else None,
            progress=progress,
            title=title,
            unit=unit,
            weigh=lambda x, context: len(x),
            compiled=compiled_step(compile, trained, parameters, clip_norm, True, watch),
            watch=watch,
        )
        stored = _keep(loop, flow, checkpoint) if checkpoint is not None else None
        # After the checks of all arguments: what is refused stays as it is.
        if stored is not None:
            flow.load_state_dict(stored["flow"])
        else:
            if standardize:
                _standardize(flow, train)
            flow.initialize_(*next(iter(train)))
        broadcast_(flow.state_dict())
        reason, seconds = loop.run()
    compiled = "" if loop.compiled is None else loop.compiled.outcome
    return loop.history, reason, seconds, compiled


def _in_precision(loss: nn.Module, precision: Precision, compile: Compile) -> nn.Module:
    """The loss to train with."""
    if precision is None:
        return loss
    if precision != "bf16":
        raise ValueError(f"precision: expected 'bf16' or None, got {precision!r}")
    if compile:
        raise ValueError("precision: 'bf16' is not compiled; leave compile=False")
    return ReducedPrecision(loss)


def _keep(loop: Loop, flow: Flow, path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Let the loop keep its state in a file, and go on from the one that is there."""
    shapes = {name: tuple(value.shape) for name, value in flow.state_dict().items()}
    file = Checkpoint(path, (loop.title, loop.steps, shapes))
    loop.save = lambda state: file.save({"flow": flow.state_dict(), "loop": state})
    stored = file.load()
    loop.resume = None if stored is None else stored["loop"]
    return stored


def _prepare(
    flow: Flow,
    x: Any,
    context: Any,
    validation: Any,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Any, Iterator[Batch], Batch | None]:
    """Training rows (iterable of batches), endless minibatches, validation rows."""
    share = float(validation) if isinstance(validation, Real) else 0.0
    if not 0 <= share < 1:
        raise ValueError(f"validation: expected a share in [0, 1) or rows, got {validation}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    held_out = None if isinstance(validation, Real) else _given(flow, validation)
    if isinstance(x, (str, os.PathLike)):
        x = RowFile(x)
    if isinstance(x, (DataLoader, RowFile)) and context is not None:
        raise DataError(
            "context: with a DataLoader, let it give pairs (x, context); in a file, let "
            "RowFile(path, context=[...]) name its columns"
        )
    if isinstance(x, DataLoader):
        loader = LoaderRows(x, flow)
        return loader, loader.endless(), held_out
    if isinstance(x, RowFile):
        seed = torch.randint(2**62, (), generator=generator, device="cpu")
        file = FileRows(x, flow, share, int(seed))
        if not file.fits:
            held_out = file.held_out() if held_out is None else held_out
            return file, file.epochs(batch_size, generator), held_out
        rows = file.whole()
    else:
        rows = rows_of(flow, x, context)
    if len(rows[0]) < MIN_ROWS:
        raise DataError(f"x: expected at least {MIN_ROWS} rows, got {len(rows[0])}")
    warn_about_columns(rows[0], flow.support)
    if share:
        order = torch.randperm(len(rows[0]), generator=generator, device="cpu").to(flow.device)
        count = min(max(1, round(share * len(order))), len(order) - 1)
        held_out, rows = take(rows, order[:count]), take(rows, order[count:])
    return [rows], minibatches(rows, batch_size, generator), held_out


def _given(flow: Flow, validation: Any) -> Batch:
    """Rows to validate on, as the user gave them."""
    x, context = validation if isinstance(validation, tuple) else (validation, None)
    rows = rows_of(flow, x, context, prefix="validation ")
    if not len(rows[0]):
        raise DataError("validation: expected at least one row. Give 0 for none.")
    return rows


def _standardize(flow: Flow, train: Any) -> None:
    """Set the flow's buffers from the training rows, where nothing has set them yet."""
    transform = flow.transform
    if transform.standardization.is_identity() and flow.standardizes:
        inner = ((flow.unconstrain(x, context), context) for x, context in train)
        transform.standardization.set_(*location_and_scale(inner, 0))
    contexts = transform.context_standardization
    if contexts is not None and contexts.is_identity():
        contexts.set_(*location_and_scale(train, 1))


def checker(
    loss: nn.Module, rows: tuple[Tensor | None, ...], sharded: bool = False
) -> Callable[[], float]:
    """Mean loss of the validation rows, without gradients, with the same noise at every check.

    Several processes share the rows out, unless each has rows of its own: ``sharded``.
    """
    x = cast("Tensor", rows[0])
    rank, count = (0, 1) if sharded else world()

    @torch.no_grad()
    def check() -> float:
        sums = x.new_zeros(2)
        with forked_rng(rank):
            own = torch.arange(rank, len(x), count, device=x.device)
            for index in own.split(CHECK_ROWS) if len(own) else ():
                mean = loss(*take(rows, index))
                sums += len(index) * torch.stack([mean, torch.ones_like(mean)])
        sums = total(sums)
        return (sums[0] / sums[1]).item()

    return check
