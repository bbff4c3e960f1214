"""What every package builds, and what the workloads ask of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

#: What is timed.
Run = Callable[[], object]
BINS, BOUND = 8, 5.0


@dataclass(frozen=True)
class Architecture:
    """What every package builds: equal layers, equal networks with ReLU, no linear maps between.

    ``density`` autoregressive flows score in one pass, ``guide`` ones draw in one.
    """

    kind: Literal["coupling", "density", "guide"]
    spline: bool
    features: int
    layers: int
    hidden: int

    @property
    def count(self) -> int:
        return 3 * BINS - 1 if self.spline else 2

    @property
    def widths(self) -> tuple[int, int]:
        return self.hidden, self.hidden


class Contender(nn.Module):
    """A flow as the workloads use it."""

    def log_prob(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Draws with gradients, and their scores."""
        raise NotImplementedError

    def sample(self, number: int) -> Tensor:
        raise NotImplementedError

    def distribution(self) -> Any:
        """The flow as a Pyro distribution."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what the transforms remember of the last call."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- what is timed ------------------------------------------------------------------------

    def scores(self, x: Tensor) -> Run:
        @torch.no_grad()
        def run() -> Tensor:
            return self.log_prob(x)

        return run

    def steps(self, loss: nn.Module, *batch: Tensor) -> Run:
        """Steps of Adam on a loss that holds this flow."""
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            loss(*batch).backward()
            optimizer.step()

        return step

    def gradients(self, loss: nn.Module, *batch: Tensor) -> Run:
        return gradients(loss, *batch)


def gradients(loss: nn.Module, *batch: Tensor | None) -> Run:
    """A loss and its gradients, without an update."""
    parameters = list(loss.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss(*batch).backward()

    return run


class OfFlow(Contender):
    """A module that scores by ``log_prob``."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)


class OfDistribution(OfFlow):
    """A module whose call gives the distribution."""

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().log_prob(x)

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        return self.flow().rsample_and_log_prob((number,))

    def sample(self, number: int) -> Tensor:
        return self.flow().sample((number,))
