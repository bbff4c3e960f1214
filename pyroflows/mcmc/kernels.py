"""What every kernel takes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflows.mcmc.target import Target


@dataclass(frozen=True)
class Plan:
    """How long to sample, and from where.

    Attributes
    ----------
    starts
        Points ``(chains, D)``.
    draws, warmup
        Draws of each chain that are kept, and those before them that are not.
    seed
        Of all random numbers.
    progress
        Whether to show a bar; None for only in interactive use.
    """

    starts: Tensor
    draws: int
    warmup: int
    seed: int
    progress: bool | None

    @property
    def chains(self) -> int:
        """Number of chains."""
        return len(self.starts)

    def bar(self, title: str) -> Any:
        """A progress bar over the draws of all chains, those of the warm-up included."""
        total = self.chains * (self.warmup + self.draws)
        disable = None if self.progress is None else not self.progress
        return tqdm(total=total, desc=title, unit="draw", disable=disable)


@dataclass
class Chains:
    """What a kernel found.

    Attributes
    ----------
    points
        Shape ``(chains, draws, D)``, in the space of the target, or latents.
    stats
        Values for each draw, ``(chains, draws)``, under ArviZ's names.
    evaluations
        How often the log density was evaluated, alone or with its gradient, in the warm-up too.
    interrupted
        Whether the run was ended early.
    latents
        Whether the points are unconstrained latents already.
    """

    points: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    evaluations: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    latents: bool = False


class Kernel(Protocol):
    """A way to sample: its options, what `run_mcmc` takes where it is not told, and ``run``."""

    @property
    def chains(self) -> int:
        """Number of chains."""

    @property
    def draws(self) -> int:
        """Draws of each chain that are kept."""

    @property
    def warmup(self) -> int:
        """Draws of each chain before these."""

    def run(self, target: Target, plan: Plan) -> Chains:
        """Sample."""


def stacked(chains: Sequence[Sequence[Tensor]]) -> Tensor:
    """Draws of several chains as ``(chains, draws, ...)``.

    Where a run was interrupted, chains differ in length: as many draws as possible are kept, by
    leaving short chains out and cutting the rest.
    """
    lengths = sorted(map(len, chains), reverse=True)
    kept = max(range(len(lengths)), key=lambda k: (k + 1) * lengths[k])
    length = lengths[kept]
    long = [chain for chain in chains if len(chain) >= length]
    return torch.stack([torch.stack(list(chain[:length])) for chain in long])
