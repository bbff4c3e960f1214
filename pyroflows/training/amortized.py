"""Variational inference with an amortised guide: minibatches and all."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyroflows.guides import AutoAmortizedFlow
from pyroflows.training.loop import Loop
from pyroflows.training.result import SVIFit


class AmortizedELBO(nn.Module):
    r"""Negative evidence lower bound of an amortised guide, in nats, by Pyro's ``Trace_ELBO``.

    .. math:: \frac1S \sum_s \left[\log q(u_s) - \log p(x, u_s)\right], \qquad u_s \sim q

    Rows of a subsampled plate count as many times as they stand for. Gradients are path gradients
    ("sticking the landing").

    Parameters
    ----------
    guide
        An `AutoAmortizedFlow`.
    draws
        Number of draws :math:`S`, evaluated at once; for several the model must broadcast.
    """

    def __init__(self, guide: AutoAmortizedFlow, draws: int = 1) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        self.guide = guide
        self.elbo = Trace_ELBO(num_particles=draws, vectorize_particles=draws > 1)

    def forward(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The model's arguments to a scalar."""
        model: Any = self.guide.original_model
        loss: Tensor = self.elbo.differentiable_loss(model, self.guide, *args, **(kwargs or {}))
        return loss


def fit_amortized(
    guide: AutoAmortizedFlow,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    draws: int,
    steps: int,
    lr: float,
    clip_norm: float,
    progress: bool | None,
) -> SVIFit:
    """Fit an amortised guide; see `pyroflows.fit_svi`, which calls it."""
    guide.register(*args, **kwargs)
    loss = AmortizedELBO(guide, draws)
    loop = Loop(
        loss=loss,
        batches=repeat((args, kwargs)),
        parameters=_parameters(loss, args, kwargs),
        steps=steps,
        lr=lr,
        clip_norm=clip_norm,
        check=None,
        # In the noise of minibatches no check is better than the last state, at the smallest rate.
        check_every=steps,
        patience=None,
        progress=progress,
        title=guide.name,
        unit="-ELBO",
    )
    reason, seconds = loop.run()
    return SVIFit(loop.history, reason, seconds)


def _parameters(loss: AmortizedELBO, args: Any, kwargs: Any) -> list[Tensor]:
    """The guide's trainable parameters, and those that the model asks Pyro for."""
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        loss(args, kwargs)
    found: list[Tensor] = list(loss.guide.parameters())
    for name in capture.trace.nodes:
        parameter: Tensor = cast("Any", pyro.param(name)).unconstrained()
        if all(parameter is not known for known in found):
            found.append(parameter)
    return [parameter for parameter in found if parameter.requires_grad]
