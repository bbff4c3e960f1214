"""Maximum likelihood."""

from __future__ import annotations

import os
from typing import Any

import torch

from pyroflows.flows import Flow
from pyroflows.training.compiled import Compile
from pyroflows.training.devices import Device
from pyroflows.training.losses import NegativeLogLikelihood
from pyroflows.training.result import MLEFit
from pyroflows.training.rows import Precision, fit_rows


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
    checkpoint: str | os.PathLike[str] | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    compile: Compile = False,
    precision: Precision = None,
    progress: bool | None = None,
    seed: int | None = None,
) -> MLEFit:
    r"""Fit a flow to data by maximum likelihood.

    .. math:: \min_\theta\; -\frac1N \sum_n \log p_\theta(x_n \mid c_n)

    Adam with a cosine schedule and clipped gradients; every fiftieth of the steps the validation
    rows are scored, and the best state is restored at the end. Interrupted by Ctrl-C it
    returns what it has. One step costs one inverse pass and its gradient.

    Called by every process of a `torch.distributed` group, it fits one flow in all of them: each
    takes its part of every batch, and the gradients are averaged, so that the same seed gives the
    same losses as one process.

    Parameters
    ----------
    flow
        Any flow; fitted in place.
    x
        Rows ``(N, *event)``: a tensor, an array, a ``DataLoader`` of ``x`` or ``(x, context)``
        (in each of several processes of its own rows), or the path of a ``.npy`` or Parquet file,
        which need not fit into memory; see `pyroflows.RowFile` for its columns.
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
        set already, or the base lives on a box, as that of angles. Densities stay those of the
        user's units.
    checkpoint
        File that keeps the state of the fit; where it exists, the fit goes on from there, on the
        CPU to the same result as without interruption (of a DataLoader, from a new epoch).
    device, dtype
        Where to move the flow and the batches, and to which floating dtype; by default as the flow
        is. ``"auto"`` is a GPU where there is one.
    compile
        Whether to compile the step, loss, gradient and update in one, which takes about half a
        minute once and pays in long fits of small flows; ``"auto"`` for only where the steps to
        come are likely to repay it. Steps that cannot be compiled are taken as without it, with a
        message.
    precision
        ``"bf16"`` for conditioner networks in bfloat16 while training; maps, densities and the
        checks on validation rows stay in float32.
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
    ValueError
        For a checkpoint of another fit, or processes that are to fit different flows.

    Examples
    --------
    >>> x = torch.randn(200, 2) @ torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> flow = pf.RealNVP(2, transforms=2, hidden_features=(8,))
    >>> fit = pf.fit_mle(flow, x, steps=20, seed=0)
    >>> fit.stop_reason
    'all steps were done'
    """
    history, reason, seconds, compiled = fit_rows(
        flow,
        NegativeLogLikelihood(flow),
        x,
        context,
        validation=validation,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        clip_norm=clip_norm,
        patience=patience,
        standardize=standardize,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        compile=compile,
        precision=precision,
        progress=progress,
        seed=seed,
        title=f"{type(flow).__name__} by maximum likelihood",
    )
    return MLEFit(history, reason, seconds, compiled=compiled)
