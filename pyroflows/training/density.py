"""A model's posterior density with its scores, and the guide that stands for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.diagnostics.psis import CHUNK
from pyroflows.guides import AutoFlow


class Density:
    """The model's log density over unconstrained latents, with scores, in float64 on the CPU."""

    def __init__(self, guide: AutoFlow, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``(...)`` and gradients ``(..., D)``; minus infinity where undefined."""
        parts = [self._chunk(part) for part in latents.flatten(0, -2).split(CHUNK)]
        log_p, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_p.reshape(latents.shape[:-1]), scores.reshape(latents.shape)

    def _chunk(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        flow = self.guide.flow
        with torch.enable_grad():
            z = latents.to(flow.device, flow.dtype).requires_grad_()
            log_p = self.guide.log_joint(z, *self.args, **self.kwargs)
            (scores,) = torch.autograd.grad(log_p.sum(), z)
        log_p, scores = log_p.detach().double().cpu(), scores.double().cpu()
        usable = log_p.isfinite() & scores.isfinite().all(-1)
        return (
            torch.where(usable, log_p, -math.inf),
            torch.where(usable.unsqueeze(-1), scores, 0.0),
        )

    @torch.no_grad()
    def value(self, latents: Tensor) -> Tensor:
        """Log densities ``(...)`` of latents ``(..., D)``, without gradients, at half the cost."""
        flow = self.guide.flow
        parts = latents.flatten(0, -2).to(flow.device, flow.dtype).split(CHUNK)
        log_p = torch.cat([self.guide.log_joint(part, *self.args, **self.kwargs) for part in parts])
        log_p = log_p.double().cpu().reshape(latents.shape[:-1])
        return torch.where(log_p.isfinite(), log_p, -math.inf)

    @torch.no_grad()
    def is_random(self) -> bool:
        """Whether two scores of the same draw differ: minibatches, or sites the model samples."""
        latents, _ = self.draw_guide(2)
        first, again = self(latents)[0], self(latents)[0]
        return not torch.allclose(first, again, rtol=1e-5, atol=1e-3, equal_nan=True)

    @torch.no_grad()
    def draw_guide(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``(S, D)`` of the guide and their log densities ``(S,)``."""
        q = self.guide.get_posterior(*self.args, **self.kwargs)
        latents, log_q = q.rsample_and_log_prob((draws,))
        return latents.double().cpu(), log_q.double().cpu()

    @torch.no_grad()
    def score_guide(self, latents: Tensor) -> Tensor:
        """Log densities under the guide of latents ``(..., D)``."""
        flow = self.guide.flow
        q = self.guide.get_posterior(*self.args, **self.kwargs)
        return q.log_prob(latents.to(flow.device, flow.dtype)).double().cpu()
