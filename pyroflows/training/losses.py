"""Losses as modules, from a batch to a scalar, so that they can be wrapped and compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyroflows.distributions import FlowDistribution
from pyroflows.errors import FitError
from pyroflows.flows import Flow
from pyroflows.guides import AutoFlow
from pyroflows.numerics import has_values
from pyroflows.numerics.precision import reduced_precision
from pyroflows.training.annealing import Annealing
from pyroflows.training.watch import Watch

Estimator = Literal["stl", "total", "iw", "renyi", "forward", "fab"]
#: Two evaluations of one log density may differ by so much, in nats.
DISAGREEMENT = 0.1
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


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


class ReducedPrecision(nn.Module):
    """A loss with the flow's conditioner networks in bfloat16, and all else as it is.

    Parameters
    ----------
    loss
        The loss.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *batch: Any) -> Tensor:
        """What the loss takes, to a scalar."""
        with reduced_precision() as evaluations:
            loss: Tensor = self.loss(*batch)
        if not evaluations or evaluations[0].dtype != torch.float32:
            raise ValueError(
                "precision: 'bf16' is for flows in float32 with conditioner networks that score "
                "data in one pass, such as NSF and MAF"
            )
        return loss


class NegativeELBO(nn.Module):
    r"""Monte Carlo estimate of a negative bound on the log evidence, in nats, over many draws.

    With weights :math:`w_s = p(x, u_s) / q(u_s)` of draws :math:`u_s \sim q` it is

    .. math:: -\frac1S \sum_s \log w_s, \qquad
        -\frac{1}{1 - \alpha} \log \frac1S \sum_s w_s^{1 - \alpha},

    the evidence lower bound or, for :math:`\alpha < 1`, Renyi's bound, which is tighter and for
    :math:`\alpha = 0` the importance-weighted one. Draws at which the model's density is zero or
    not a number are left out and counted in ``dropped``.

    Parameters
    ----------
    guide
        An `AutoFlow`.
    draws
        Number of draws :math:`S`.
    estimator
        ``"stl"`` for the path gradient (sticking the landing; one inverse pass more), which has no
        variance left where the guide is exact; ``"total"`` for the plain reparameterised one;
        ``"iw"`` and ``"renyi"`` for the importance-weighted and Renyi's bound with
        :math:`\alpha = 1/2`, by doubly reparameterised path gradients; ``"forward"`` for the
        gradient of :math:`KL(p \| q)` by the draws' own weights, which widens a guide that is too
        narrow; its value is the ELBO's. ``"fab"`` for the gradient of the divergence
        :math:`\int p^2 / q` by draws that annealed importance sampling carries to :math:`p^2 / q`:
        from a wide guide it takes in separated modes, of which the others keep one. It costs some
        forty evaluations of model and guide a step (see `pyroflows.training.Annealing`); its value
        is the ELBO's.

    References
    ----------
    Roeder, Wu and Duvenaud, "Sticking the landing", NeurIPS 2017; Burda, Grosse and Salakhutdinov,
    "Importance weighted autoencoders", ICLR 2016; Li and Turner, "Renyi divergence variational
    inference", NeurIPS 2016; Tucker, Lawson, Gu and Maddison, "Doubly reparameterized gradient
    estimators", ICLR 2019; Midgley, Stimper, Simm, Schoelkopf and Hernandez-Lobato, "Flow annealed
    importance sampling bootstrap", ICLR 2023.
    """

    def __init__(self, guide: AutoFlow, draws: int = 64, estimator: Estimator = "stl") -> None:
        super().__init__()
        if estimator not in ESTIMATORS:
            expected = ", ".join(map(repr, ESTIMATORS))
            raise ValueError(f"estimator: expected one of {expected}, got {estimator!r}")
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        self.guide = guide
        self.draws = draws
        self.estimator = estimator
        self.annealing = Annealing()
        self.watch = Watch()
        self.dropped = 0

    def forward(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The model's arguments to a scalar."""
        kwargs = kwargs or {}
        q = self.guide.get_posterior(*args, **kwargs)
        latents, log_q = q.rsample_and_log_prob((self.draws,))
        if self.estimator in ("forward", "fab"):
            latents, log_q = latents.detach(), log_q.detach()
        log_p = self.guide.log_joint(latents, *args, **kwargs)
        usable = log_p.isfinite() & log_q.isfinite()
        # A recorded step cannot look: it comes out infinite, and is taken again by this way.
        if self.watch.on and has_values(usable) and not usable.all():
            self.dropped += int((~usable).sum())
            if not usable.any():
                raise FitError(
                    f"the model's density is zero or not a number at all {self.draws} draws of the "
                    "guide. Check the model, start elsewhere (init_loc_fn), or lower init_scale."
                )
            # Evaluated again without them: a masked NaN would still spoil the gradients.
            latents, log_q = latents[usable], log_q[usable]
            log_p = self.guide.log_joint(latents, *args, **kwargs)
        if self.estimator == "total":
            return (log_q - log_p).mean()
        if self.estimator == "forward":
            return _forward(log_p.detach() - log_q, log_p, q.log_prob(latents))
        if self.estimator == "fab":
            bound = (log_q - log_p).mean()  # with what parameters of the model gain
            return bound + self._annealed(q, latents, args, kwargs)
        log_weights = log_p - _path(log_q, q.detach_params().log_prob(latents))
        if self.estimator == "stl":
            return -log_weights.mean()
        return -_renyi_bound(log_weights, 0.0 if self.estimator == "iw" else 0.5)

    def _annealed(
        self, q: FlowDistribution, latents: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Zero, with the gradient of the cross entropy of the annealed draws."""
        still = q.detach_params()
        points, log_weights = self.annealing(
            latents, lambda z: self.guide.log_joint(z, *args, **kwargs), still.log_prob
        )
        surrogate = -(log_weights.softmax(0) * q.log_prob(points)).sum()
        return surrogate - surrogate.detach()


def _path(log_q: Tensor, by_inverse: Tensor) -> Tensor:
    """The value of the forward pass with the gradient of the inverse one, where the two agree.

    Where they do not, a steep flow has lost its inverse to rounding, and would learn to lose more:
    those draws are constants.
    """
    agree = (log_q - by_inverse).abs() < DISAGREEMENT
    gradient = torch.where(agree, by_inverse - by_inverse.detach(), 0.0)
    return log_q.detach() + gradient


def _renyi_bound(log_weights: Tensor, alpha: float) -> Tensor:
    """The bound, with the gradient of weights whose dependence on parameters is only by draws."""
    powers = (1 - alpha) * log_weights.detach()
    share = powers.softmax(0)
    value = (powers.logsumexp(0) - math.log(len(powers))) / (1 - alpha)
    # The score function's part, rewritten by the draws, turns shares into this mixture.
    mixture = alpha * share + (1 - alpha) * share.square()
    surrogate = (mixture * log_weights).sum()
    return value + surrogate - surrogate.detach()


def _forward(log_weights: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The cross entropy of the weighted draws, with the value of the negative ELBO."""
    share = log_weights.softmax(0)
    # What parameters of the model gain is the evidence under the same weights.
    surrogate = -(share * (log_q + log_p)).sum()
    return surrogate - surrogate.detach() - log_weights.mean()
