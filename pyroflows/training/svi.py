"""Variational inference with a flow guide."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import repeat
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.diagnostics.psis import MIN_DRAWS, psis
from pyroflows.guides import AutoFlow
from pyroflows.numerics import forked_rng
from pyroflows.training.loop import Loop
from pyroflows.training.losses import Estimator, NegativeELBO
from pyroflows.training.result import SVIFit


def fit_svi(
    guide: AutoFlow,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    estimator: Estimator = "stl",
    draws: int = 64,
    steps: int = 2000,
    lr: float = 3e-3,
    clip_norm: float = 100.0,
    psis_samples: int = 10_000,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    seed: int | None = None,
) -> SVIFit:
    r"""Fit a flow guide by maximising the evidence lower bound.

    .. math:: \max_q\; E_q[\log p(x, u) - \log q(u)]

    All draws of a step are evaluated at once, by default with the path gradient; Adam with a
    cosine schedule and clipped gradients. Parameters of the model train along. Interrupted by
    Ctrl-C it returns what it has. Pyro's own ``SVI(model, guide, optim, Trace_ELBO()).step`` works
    on the same guide.

    One step costs one forward pass of the flow, one evaluation of the model and, with ``"stl"``,
    one inverse pass, and their gradients.

    Parameters
    ----------
    guide
        An `AutoFlow`; fitted in place.
    *args
        The model's arguments. Every other keyword than ``model_kwargs`` is this function's.
    model_kwargs
        The model's keyword arguments.
    estimator
        ``"stl"`` or ``"total"``, see `pyroflows.training.NegativeELBO`.
    draws
        Draws per step.
    steps, lr, clip_norm
        Of the optimiser.
    psis_samples
        Draws for the report on the result; 0 for no report.
    device
        Where to move the guide and the model's arguments; by default where they are.
    progress
        Whether to show a bar with the loss in nats; None for only in interactive use.
    seed
        Seed of the draws; the global random state is left alone.

    Returns
    -------
    SVIFit
        History, stop reason, seconds, the `pyroflows.PSIS` report, ``plot()``; ``print`` it.

    Raises
    ------
    FitError
        If the model has no finite density where the guide is, or gradients stay infinite.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("rows", len(y)):
    ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> y = torch.full((8,), 0.5)
    >>> fit = pf.fit_svi(pf.AutoFlow(model), y, steps=100, lr=0.01, seed=0)
    >>> fit.stop_reason
    'all steps were done'
    """
    if not isinstance(guide, AutoFlow):
        raise TypeError(
            f"guide: expected an AutoFlow, got {type(guide).__name__}. Fit other guides with "
            "pyro.infer.SVI."
        )
    if psis_samples and psis_samples < MIN_DRAWS:
        raise ValueError(f"psis_samples: expected 0 or at least {MIN_DRAWS}, got {psis_samples}")
    kwargs = dict(model_kwargs or {})
    if device is not None:
        guide.to(device)
        args, kwargs = _moved(args, device), _moved(kwargs, device)
    with forked_rng(seed) if seed is not None else nullcontext():
        guide.register(*args, **kwargs)
        loss = NegativeELBO(guide, draws, estimator)
        loop = Loop(
            loss=loss,
            batches=repeat((args, kwargs)),
            parameters=_parameters(loss, args, kwargs),
            steps=steps,
            lr=lr,
            clip_norm=clip_norm,
            check=None,
            check_every=max(1, steps // 20),
            patience=None,
            progress=progress,
            title=f"{guide.name} by SVI",
        )
        reason, seconds = loop.run()
        report = None
        if psis_samples:
            report = psis(guide, *args, model_kwargs=kwargs, num_samples=psis_samples)
    return SVIFit(loop.history, reason, seconds, psis=report, dropped=loss.dropped)


def _parameters(loss: NegativeELBO, args: Any, kwargs: Any) -> list[Tensor]:
    """The guide's trainable parameters and those that the model asks Pyro for."""
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        loss(args, kwargs)
    loss.dropped = 0  # that was no step of training
    found: list[Tensor] = [p for p in loss.guide.parameters() if p.requires_grad]
    for name in capture.trace.nodes:
        parameter: Tensor = cast("Any", pyro.param(name)).unconstrained()
        if parameter.requires_grad and all(parameter is not known for known in found):
            found.append(parameter)
    return found


def _moved(value: Any, device: torch.device | str) -> Any:
    """Tensors in nested containers on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
