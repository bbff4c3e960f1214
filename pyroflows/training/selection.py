"""Choosing a flow on the data themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.errors import DataError, FitError, ShapeError
from pyroflows.flows import Candidate, Flow
from pyroflows.flows.recommend import shortlist
from pyroflows.numerics import forked_rng
from pyroflows.training.data import MIN_ROWS, Batch, rows_of, take
from pyroflows.training.mle import fit_mle
from pyroflows.training.result import MLEFit

#: Share of the rows given to each fit that decides when it has trained enough.
VALIDATION = 0.2
#: Rows scored at once.
SCORED_ROWS = 8192


@dataclass
class Entry:
    """One candidate's way through the selection.

    Attributes
    ----------
    candidate
        Name and options.
    flow
        The flow, fitted as far as it came.
    steps
        Optimiser steps it was given.
    seconds
        Time they took.
    scores
        Log densities of the held-out rows, in nats, when it was last compared.
    difference, error
        Mean of the paired differences from the winner's scores, and its standard error.
    problem
        Why it left, where its fit failed.
    """

    candidate: Candidate
    flow: Flow
    steps: int = 0
    seconds: float = 0.0
    scores: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    difference: float = math.nan
    error: float = math.nan
    problem: str = ""
    fit: MLEFit | None = field(default=None, repr=False)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.flow.parameters())

    @property
    def nats(self) -> float:
        """Mean log density of the held-out rows."""
        return self.scores.mean().item() if len(self.scores) else -math.inf

    def advance(self, train: Batch, compared: Batch, **options: Any) -> None:
        """Fit further, and score the held-out rows."""
        self.steps += options["steps"]
        try:
            # Each round starts at the full rate, which does harm at first: no stopping for that.
            self.fit = fit_mle(self.flow, *train, validation=VALIDATION, patience=None, **options)
        except FitError as error:
            self.problem = str(error)
            return
        self.seconds += self.fit.seconds
        self.scores = _log_density(self.flow, compared)
        if not self.scores.isfinite().all():
            self.problem = "held-out rows without a finite density"

    def compare(self, best: Entry) -> None:
        """Set the paired difference from the winner."""
        difference = self.scores - best.scores
        self.difference = difference.mean().item()
        self.error = difference.std().item() / math.sqrt(len(difference))

    def __str__(self) -> str:
        name = Candidate(self.candidate.name, self.candidate.options)
        figures = f"{name!s:<48}{self.steps:>7}{self.seconds:>8.1f}{self.parameters:>12,}"
        if self.problem:
            return f"{figures}  {self.problem}"
        return f"{figures}{self.nats:>10.3f}{self.difference:>+10.3f} +- {self.error:.3f}"


@dataclass
class Selection:
    """Result of `pyroflows.select`; prints as a table.

    Attributes
    ----------
    table
        One `Entry` per candidate, the winner first. Those that left early were compared after fewer
        steps: their figures are lower bounds of what they could reach.
    """

    table: list[Entry]

    @property
    def flow(self) -> Flow:
        """The winner, fitted."""
        return self.table[0].flow

    @property
    def name(self) -> str:
        """Name of the winner's recipe."""
        return self.table[0].candidate.name

    def __str__(self) -> str:
        columns = ("flow", 48), ("steps", 7), ("seconds", 8), ("parameters", 12), ("nats", 10)
        head = "".join(f"{c:<{w}}" if c == "flow" else f"{c:>{w}}" for c, w in columns)
        return "\n".join([f"{head}  difference", *map(str, self.table)])


def select(
    x: Any,
    context: Any = None,
    *,
    candidates: Iterable[Candidate | str] | None = None,
    budget: int = 6000,
    held_out: float = 0.2,
    batch_size: int = 256,
    lr: float = 1e-3,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Selection:
    """Fit a few flows for a short time, and return the best of them, fitted.

    Successive halving: all candidates are fitted with the same share of the budget and compared by
    the log density of held-out rows, which no fit has seen; the better half goes on from where it
    is, until one is left.

    Parameters
    ----------
    x
        Rows ``(N, features)``, a tensor or an array.
    context
        Contexts ``(N, context)`` for conditional flows.
    candidates
        What to compare, `Candidate` objects or names; by default some five that suit the size.
    budget
        Optimiser steps in all, split evenly among the rounds.
    held_out
        Share of the rows to compare on.
    batch_size, lr
        Of the fits, see `fit_mle`.
    device
        Where to fit; by default on the CPU.
    seed
        Of the split and of the fits.
    progress
        Whether to show bars; None for only in interactive use.

    Returns
    -------
    Selection
        The fitted flow and the table; standard errors are those of the paired differences.

    Raises
    ------
    DataError, ShapeError
        For data that are not finite, or too few.
    FitError
        If every candidate failed.

    References
    ----------
    Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter
    optimization", AISTATS 2016.

    Examples
    --------
    >>> x = torch.randn(300, 2).exp()
    >>> choice = pf.select(x, candidates=["RealNVP", "NSF"], budget=40)
    >>> choice.flow().sample((3,)).shape
    torch.Size([3, 2])
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    with forked_rng(seed):
        alive = _entries(x, context, candidates, device)
        train, compared = _split(alive[0].flow, x, context, held_out)
        rounds = max(1, math.ceil(math.log2(len(alive))))
        if budget < rounds * len(alive):
            raise ValueError(
                f"budget: expected at least {rounds * len(alive)} steps for {len(alive)} "
                f"candidates, got {budget}"
            )
        entries = list(alive)
        for _ in range(rounds):
            steps = budget // (rounds * len(alive))
            for entry in alive:
                entry.advance(
                    train,
                    compared,
                    steps=steps,
                    batch_size=batch_size,
                    lr=lr,
                    device=device,
                    seed=seed,
                    progress=progress,
                )
            alive = _better_half(alive)
    for entry in entries:
        if not entry.problem:
            entry.compare(alive[0])
    entries.sort(key=lambda e: (e is not alive[0], bool(e.problem), -e.steps, -e.nats))
    return Selection(entries)


def _entries(
    x: Any, context: Any, candidates: Iterable[Candidate | str] | None, device: Any
) -> list[Entry]:
    """The candidates, built for these data."""
    shape = np.shape(x)
    if len(shape) != 2:
        raise ShapeError(f"x: expected rows (N, features), got shape {tuple(shape)}")
    rows, features = shape
    size = 0 if context is None else np.shape(context)[-1]
    chosen = shortlist(features, rows) if candidates is None else list(candidates)
    chosen = [Candidate(c) if isinstance(c, str) else c for c in chosen]
    if not chosen:
        raise ValueError("candidates: expected at least one, got none")
    return [Entry(candidate, candidate.build(features, size).to(device)) for candidate in chosen]


def _split(flow: Flow, x: Any, context: Any, held_out: float) -> tuple[Batch, Batch]:
    """Rows to fit on and rows to compare on."""
    rows = rows_of(flow, x, context)
    count = round(held_out * len(rows[0]))
    if min(count, len(rows[0]) - count) < MIN_ROWS:
        raise DataError(
            f"x: expected at least {MIN_ROWS} rows on either side of the split, got {len(rows[0])} "
            f"rows of which {count} are held out"
        )
    order = torch.randperm(len(rows[0])).to(rows[0].device)
    return take(rows, order[count:]), take(rows, order[:count])


def _better_half(entries: list[Entry]) -> list[Entry]:
    """Those that go on, the best first."""
    sound = sorted((e for e in entries if not e.problem), key=lambda e: -e.nats)
    if not sound:
        problems = "; ".join(f"{e.candidate.name}: {e.problem}" for e in entries)
        raise FitError(f"every candidate failed: {problems}")
    return sound[: math.ceil(len(entries) / 2)]


@torch.no_grad()
def _log_density(flow: Flow, rows: Batch) -> Tensor:
    indices = torch.arange(len(rows[0]), device=rows[0].device).split(SCORED_ROWS)
    parts = []
    for index in indices:
        x, context = take(rows, index)
        parts.append(flow(context).log_prob(x))
    return torch.cat(parts).double().cpu()
