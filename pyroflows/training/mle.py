"""Maximum likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from numbers import Real
from typing import Any

import torch
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
from pyroflows.training.losses import NegativeLogLikelihood
from pyroflows.training.result import MLEFit

#: Rows scored at once in a check.
CHECK_ROWS = 8192


def fit_mle(
    flow: Flow,
    x: Any,
    context: Any = None,
    *,
    validation: float | Any = 0.1,
    steps: int = 3000,
    batch_size: int = 256,
    lr: float = 1e-3,
    clip_norm: float = 5.0,
    patience: int | None = 10,
    standardize: bool = True,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    seed: int | None = None,
) -> MLEFit:
    r"""Fit a flow to data by maximum likelihood.

    .. math:: \min_\theta\; -\frac1N \sum_n \log p_\theta(x_n \mid c_n)

    Adam with a cosine schedule and clipped gradients; every fiftieth of the steps the validation
    rows are scored, and the best state is restored at the end. Interrupted by Ctrl-C it
    returns what it has. One step costs one inverse pass and its gradient.

    Parameters
    ----------
    flow
        Any flow; fitted in place.
    x
        Rows ``(N, *event)``: a tensor, an array, or a ``DataLoader`` of ``x`` or ``(x, context)``.
    context
        Contexts ``(N, context)`` of a conditional flow.
    validation
        Share of the rows held out, or rows to validate on (``x``, or a pair ``(x, context)``). A
        DataLoader cannot be split: without validation rows the training loss takes their place,
        and there is no early stopping. 0 for none.
    steps, batch_size, lr, clip_norm
        Of the optimiser.
    patience
        Checks (50 in a full run) without improvement after which to stop; None for never.
    standardize
        Whether to set the flow's location and scale buffers from the training rows, unless they are
        set already. Densities stay those of the user's units.
    device
        Where to move the flow and the batches; by default where the flow is.
    progress
        Whether to show a bar with the loss in nats; None for only in interactive use.
    seed
        Seed of split, minibatches and everything else random; the global state is left alone.

    Returns
    -------
    MLEFit
        History, stop reason, seconds, ``plot()``.

    Raises
    ------
    DataError, ShapeError, ContextError
        For data that are not finite or too few, or of another shape.
    FitError
        If gradients stay infinite; the best state is restored.

    Examples
    --------
    >>> x = torch.randn(200, 2) @ torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> flow = pf.RealNVP(2, transforms=2, hidden_features=(8,))
    >>> fit = pf.fit_mle(flow, x, steps=20, seed=0)
    >>> fit.stop_reason
    'all steps were done'
    """
    if device is not None:
        flow.to(device)
    with forked_rng(seed) if seed is not None else nullcontext():
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        train, batches, held_out = _prepare(flow, x, context, validation, batch_size, generator)
        loss = NegativeLogLikelihood(flow)
        loop = Loop(
            loss=loss,
            batches=batches,
            parameters=[p for p in flow.parameters() if p.requires_grad],
            steps=steps,
            lr=lr,
            clip_norm=clip_norm,
            check=_checker(loss, held_out) if held_out is not None else None,
            check_every=max(1, steps // 50),
            patience=patience if held_out is not None else None,
            progress=progress,
            title=f"{type(flow).__name__} by maximum likelihood",
        )
        # After the checks of all arguments: what is refused stays as it is.
        if standardize:
            _standardize(flow, train)
        flow.transform.initialize_(*next(iter(train)))
        reason, seconds = loop.run()
    return MLEFit(loop.history, reason, seconds)


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
    warn_about_columns(rows[0])
    if share:
        order = torch.randperm(len(rows[0]), generator=generator).to(flow.device)
        count = min(max(1, round(share * len(order))), len(order) - 1)
        held_out, rows = take(rows, order[:count]), take(rows, order[count:])
    return [rows], minibatches(rows, batch_size, generator), held_out


def _standardize(flow: Flow, train: Any) -> None:
    """Set the flow's buffers from the training rows, where nothing has set them yet."""
    transform = flow.transform
    if transform.standardization.is_identity():
        inner = ((transform.unconstrain(x, context), context) for x, context in train)
        transform.standardization.set_(*location_and_scale(inner, 0))
    contexts = transform.context_standardization
    if contexts is not None and contexts.is_identity():
        contexts.set_(*location_and_scale(train, 1))


def _checker(loss: NegativeLogLikelihood, rows: Batch) -> Callable[[], float]:
    """Mean negative log likelihood of the validation rows, without gradients."""

    @torch.no_grad()
    def check() -> float:
        total = 0.0
        for index in torch.arange(len(rows[0]), device=rows[0].device).split(CHECK_ROWS):
            total += len(index) * loss(*take(rows, index)).item()
        return total / len(rows[0])

    return check
