"""What the fits to rows of data share: preparation, checks on held-out rows, the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyroflows.errors import DataError
from pyroflows.flows import Flow
from pyroflows.numerics import forked_rng
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
from pyroflows.training.loop import Loop
from pyroflows.training.result import History

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
    device: torch.device | str | None,
    progress: bool | None,
    seed: int | None,
    title: str,
    unit: str = "nats",
    check_loss: nn.Module | None = None,
) -> tuple[History, str, float]:
    """Minimise a loss of rows and contexts; the history, the reason of the end, the seconds.

    The options are those of `pyroflows.fit_mle`; ``title`` and ``unit`` are for the bar, and
    ``check_loss`` is for held-out rows, where that is another than ``loss``.
    """
    if device is not None:
        flow.to(device)
    with forked_rng(seed) if seed is not None else nullcontext():
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        train, batches, held_out = _prepare(flow, x, context, validation, batch_size, generator)
        loop = Loop(
            loss=loss,
            batches=batches,
            parameters=[p for p in loss.parameters() if p.requires_grad],
            steps=steps,
            lr=lr,
            clip_norm=clip_norm,
            check=checker(check_loss or loss, held_out) if held_out is not None else None,
            check_every=max(1, steps // 50),
            patience=patience if held_out is not None else None,
            progress=progress,
            title=title,
            unit=unit,
        )
        # After the checks of all arguments: what is refused stays as it is.
        if standardize:
            _standardize(flow, train)
        flow.initialize_(*next(iter(train)))
        reason, seconds = loop.run()
    return loop.history, reason, seconds


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
    held_out = None
    if not isinstance(validation, Real):
        x_held, c_held = validation if isinstance(validation, tuple) else (validation, None)
        held_out = rows_of(flow, x_held, c_held, prefix="validation ")
        if not len(held_out[0]):
            raise DataError("validation: expected at least one row. Give 0 for none.")
    if isinstance(x, DataLoader):
        if context is not None:
            raise DataError("context: with a DataLoader, let it give pairs (x, context)")
        loader = LoaderRows(x, flow)
        return loader, loader.endless(), held_out
    rows = rows_of(flow, x, context)
    if len(rows[0]) < MIN_ROWS:
        raise DataError(f"x: expected at least {MIN_ROWS} rows, got {len(rows[0])}")
    warn_about_columns(rows[0], flow.support)
    if share:
        order = torch.randperm(len(rows[0]), generator=generator).to(flow.device)
        count = min(max(1, round(share * len(order))), len(order) - 1)
        held_out, rows = take(rows, order[:count]), take(rows, order[count:])
    return [rows], minibatches(rows, batch_size, generator), held_out


def _standardize(flow: Flow, train: Any) -> None:
    """Set the flow's buffers from the training rows, where nothing has set them yet."""
    transform = flow.transform
    if transform.standardization.is_identity() and flow.standardizes:
        inner = ((flow.unconstrain(x, context), context) for x, context in train)
        transform.standardization.set_(*location_and_scale(inner, 0))
    contexts = transform.context_standardization
    if contexts is not None and contexts.is_identity():
        contexts.set_(*location_and_scale(train, 1))


def checker(loss: nn.Module, rows: tuple[Tensor | None, ...]) -> Callable[[], float]:
    """Mean loss of the validation rows, without gradients, with the same noise at every check."""
    x = cast("Tensor", rows[0])

    @torch.no_grad()
    def check() -> float:
        total = 0.0
        with forked_rng(0):
            for index in torch.arange(len(x), device=x.device).split(CHECK_ROWS):
                total += len(index) * loss(*take(rows, index)).item()
        return total / len(x)

    return check
