"""Losses as modules, from a batch to a scalar, so that they can be wrapped and compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from pyroflows.errors import FitError
from pyroflows.flows import Flow
from pyroflows.guides import AutoFlow

Estimator = Literal["stl", "total"]


class NegativeLogLikelihood(nn.Module):
    r"""Mean negative log likelihood of a batch, :math:`-\frac1N \sum_n \log p(x_n \mid c_n)`, nats.

    Parameters
    ----------
    flow
        The density.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Rows ``(N, *event)`` and contexts ``(N, context)`` to a scalar."""
        made = self.flow(context)
        # A dequantized flow has a bound and no density.
        score = getattr(made, "log_prob_bound", made.log_prob)
        return -score(x).mean()


class NegativeELBO(nn.Module):
    r"""Monte Carlo estimate of the negative evidence lower bound, in nats, over all draws at once.

    .. math:: \frac1S \sum_s \left[\log q(u_s) - \log p(x, u_s)\right], \qquad u_s \sim q

    Draws at which the model's density is zero or not a number are left out and counted in
    ``dropped``.

    Parameters
    ----------
    guide
        An `AutoFlow`.
    draws
        Number of draws :math:`S`.
    estimator
        ``"stl"`` for the path gradient (sticking the landing; one inverse pass more), which has no
        variance left where the guide is exact; ``"total"`` for the plain reparameterised one.

    References
    ----------
    Roeder, Wu and Duvenaud, "Sticking the landing", NeurIPS 2017.
    """

    def __init__(self, guide: AutoFlow, draws: int = 64, estimator: Estimator = "stl") -> None:
        super().__init__()
        if estimator not in ("stl", "total"):
            raise ValueError(f"estimator: expected 'stl' or 'total', got {estimator!r}")
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        self.guide = guide
        self.draws = draws
        self.estimator = estimator
        self.dropped = 0

    def forward(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The model's arguments to a scalar."""
        kwargs = kwargs or {}
        q = self.guide.get_posterior(*args, **kwargs)
        latents, log_q = q.rsample_and_log_prob((self.draws,))
        log_p = self.guide.log_joint(latents, *args, **kwargs)
        usable = log_p.isfinite() & log_q.isfinite()
        if not usable.all():
            self.dropped += int((~usable).sum())
            if not usable.any():
                raise FitError(
                    f"the model's density is zero or not a number at all {self.draws} draws of the "
                    "guide. Check the model, start elsewhere (init_loc_fn), or lower init_scale."
                )
            # Evaluated again without them: a masked NaN would still spoil the gradients.
            latents, log_q = latents[usable], log_q[usable]
            log_p = self.guide.log_joint(latents, *args, **kwargs)
        if self.estimator == "stl":
            log_q = q.detach_params().log_prob(latents)
        return (log_q - log_p).mean()
