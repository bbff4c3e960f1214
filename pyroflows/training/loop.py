"""The one training loop behind the fit functions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflows.errors import FitError
from pyroflows.training import processes
from pyroflows.training.adam import Adam
from pyroflows.training.compiled import CompiledStep
from pyroflows.training.data import Epochs
from pyroflows.training.result import History
from pyroflows.training.watch import Watch

#: Consecutive steps without a finite gradient after which a fit gives up.
MAX_SKIPPED = 20
#: Losses stay on their device for so many steps: reading each would make a GPU wait.
READ_EVERY = 20
#: Where iterates are averaged: steps to the full rate, steps after which it falls with their root,
#: and the power of its number that an iterate weighs.
WARM_UP, LONG, POWER = 10, 400, 3


@dataclass
class Loop:
    """Adam with clipped gradients; the best state is restored.

    The learning rate falls to zero along a cosine, which needs the number of steps. Where a check
    may end the fit at any step, it is held instead, and checked and kept is a mean of the iterates
    in which later ones weigh more (Shamir and Zhang, "Stochastic gradient descent for non-smooth
    optimization", ICML 2013).

    Where several processes run the same loop, each on its own batches, every step takes the mean of
    their gradients, the first shows the bar and saves, and all end in the same state.

    Attributes
    ----------
    loss
        From what ``batches`` yields to a scalar in nats.
    batches
        Endless.
    parameters
        What is trained.
    steps
        Number of steps.
    lr
        Largest learning rate.
    clip_norm
        Largest norm of the gradient.
    check
        Validation loss; where None, the mean loss since the last check stands for it.
    check_every
        Steps between checks; at least an eighth of all steps so far where iterates are averaged.
        With a ``check`` the start counts too, and else the first steps are checked after 1, 2, 4,
        ...: few rows are learned by heart within a few steps.
    patience
        Checks without improvement after which to stop; None for never.
    enough
        Asked after every check and before the first step: a reason to end the fit, or None. With
        it, iterates are averaged.
    progress
        Whether to show a bar; None for only in interactive use.
    title, unit
        What the bar says, read at every check, and what it calls the loss.
    compiled
        Takes the steps that it can, in one graph each.
    save, resume
        Called with the state of the loop at every check, and such a state to go on from: nested
        dictionaries of tensors and numbers.
    weigh
        Number of rows of a batch: its weight among those of the other processes.
    watch
        Shared with loss and compiled step; on where the parameters are on a CPU.
    """

    loss: Callable[..., Tensor]
    batches: Iterator[tuple[Any, ...]]
    parameters: Sequence[Tensor]
    steps: int
    lr: float
    clip_norm: float
    check: Callable[[], float] | None
    check_every: int
    patience: int | None
    progress: bool | None
    title: str
    unit: str = "nats"
    history: History = field(default_factory=History)
    compiled: CompiledStep | None = None
    save: Callable[[dict[str, Any]], None] | None = None
    resume: dict[str, Any] | None = None
    weigh: Callable[..., float] = lambda *batch: 1.0
    enough: Callable[[], str | None] | None = None
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a positive learning rate, got {self.lr}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience: expected at least 1 check or None, got {self.patience}")
        if not self.parameters:
            raise ValueError(
                "nothing to train: every parameter has requires_grad=False. "
                "Unfreeze the flow with flow.requires_grad_(True)."
            )

    def run(self) -> tuple[str, float]:
        """Train; the reason of the end, and the seconds it took."""
        start = time.perf_counter()
        self._best: tuple[float, list[Tensor]] | None = None
        self._unread: list[Tensor] = []
        self._skipped = 0
        self.watch.on = all(parameter.device.type == "cpu" for parameter in self.parameters)
        rank, count = processes.world()
        processes.broadcast_({f"parameter {i}": p for i, p in enumerate(self.parameters)})
        disable = True if rank else None if self.progress is None else not self.progress
        title = self.title if count == 1 else f"{self.title}, {count} processes"
        try:
            with (
                processes.own_noise(),
                tqdm(total=self.steps, desc=title, unit="step", disable=disable) as bar,
            ):
                reason = self._train(bar)
        except KeyboardInterrupt:
            if count > 1:  # each may have come to another step
                raise
            self._read()
            reason = "it was interrupted"
        finally:
            self._restore()
            self.watch.on = True
            if self.compiled is not None:
                self.compiled.release()
        return reason, time.perf_counter() - start

    def _train(self, bar: Any) -> str:
        self._adam = Adam(self.parameters)
        self._mean = [p.detach().clone() for p in self.parameters]
        self._stale = first = 0
        if self.resume is not None:
            first = self._load(self.resume)
            bar.update(first)
        elif self.check is not None:
            self._check(0)
        reason = self._reason()
        for step in range(first + 1, self.steps + 1):
            if reason is not None:
                break
            self._step(step)
            bar.update()
            early, due = self._is_early(step), self._is_due(step)
            if early or due or len(self._unread) == READ_EVERY:
                self._read()
            if early or due:
                self._check(step)
            if due:
                now, best = self.history.checks[-1][1], self.history.best[1]
                bar.set_description(self.title, refresh=False)
                bar.set_postfix({self.unit: f"{now:.3f}", "best": f"{best:.3f}"})
                if self.save is not None:
                    self.save(self._state(step))
                reason = self._reason()
        return reason or "all steps were done"

    def _step(self, step: int) -> None:
        """One step; nothing is read from the device."""
        batch, rate = next(self.batches), self._rate(step)
        loss = None
        if self.compiled is not None:
            loss = self.compiled.take(self._adam, rate, batch, self.steps - step + 1)
        if loss is None:
            loss, bad = self._eager(rate, batch)
        else:
            bad = ~loss.isfinite()
        self._unread.append(torch.stack([loss, bad.to(loss)]))
        if self.enough is not None:
            self._average(step)

    def _eager(self, rate: float, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """A step operation by operation: the loss before it, and whether it was left out."""
        self._adam.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        weight = self.weigh(*batch)
        loss = processes.average_gradients_(self.parameters, loss.detach(), weight)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        bad = ~norm.isfinite()
        self._adam.step(rate, unless=bad)
        return loss, bad

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Take the parameters into the mean."""
        weight = (POWER + 1) / (POWER + step)
        torch._foreach_lerp_(self._mean, list(self.parameters), weight)

    def _read(self) -> None:
        """Take the losses since the last reading; raise where the gradients stay infinite."""
        unread, self._unread = self._unread, []
        watched = self.watch.on
        for loss, bad in torch.stack(unread).tolist() if unread else []:
            self.history.losses.append(loss)
            self.history.skipped += bool(bad)
            # What is looked at from now on may be saved.
            self.watch.on = self.watch.on or bool(bad)
            self._skipped = self._skipped + 1 if bad and watched else 0
            if self._skipped >= MAX_SKIPPED:
                raise FitError(
                    f"step {len(self.history.losses)}: the gradient has not been finite for "
                    f"{self._skipped} steps (loss {loss:.4g}). The best state so far is restored. "
                    "Lower lr, standardise the data, or use float64."
                )

    def _rate(self, step: int) -> float:
        if self.enough is not None:
            return self.lr * min(1.0, step / WARM_UP, (LONG / step) ** 0.5)
        return self.lr * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2

    def _is_early(self, step: int) -> bool:
        """Whether a step before the first regular check is a power of two, and checked too."""
        if self.check is None or self.enough is not None:
            return False
        return step < self.check_every and step.bit_count() == 1

    def _is_due(self, step: int) -> bool:
        """Whether to check after this step."""
        if self.enough is None:
            return step % self.check_every == 0 or step == self.steps
        last = self.history.checks[-1][0]
        return step - last >= max(self.check_every, step // 8) or step == self.steps

    def _check(self, step: int) -> None:
        """Record a check and keep the state if it is the best so far."""
        now = [p.detach().clone() for p in self.parameters]
        if self.enough is not None:
            self._place(self._mean)
        if self.check is None:
            value = fmean(self.history.losses[-self.check_every :])
        else:
            value = self.check()
        self.history.checks.append((step, value))
        improved = self._best is None or value < self._best[0]
        counts = step >= self.check_every  # the early ones say nothing of patience
        self._stale = 0 if improved or not counts else self._stale + 1
        if improved and value == value:
            self._best = (value, [p.detach().clone() for p in self.parameters])
        self._place(now)

    def _reason(self) -> str | None:
        """Why to end after the last check, if there is a reason."""
        if self.patience is not None and self._stale >= self.patience:
            return f"the loss has not improved for {self._stale} checks"
        reason = self.enough() if self.enough is not None else None
        if reason is not None:
            # What was enough is kept, even if chance says that another was better.
            self._best = (self.history.checks[-1][1], self._mean)
        return reason

    def _state(self, step: int) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "counts": [step, self._skipped, self._stale],
            "parameters": [p.detach().clone() for p in self.parameters],
            "mean": self._mean,
            "best": self._best and list(self._best),
            "adam": self._adam.state(),
            "history": asdict(self.history),
            "random": torch.get_rng_state(),
            "batches": self.batches.state() if isinstance(self.batches, Epochs) else None,
        }

    def _load(self, state: dict[str, Any]) -> int:
        """Go back to a state; its number of steps."""
        self._place(state["parameters"])
        self._mean = state["mean"]
        self._best = state["best"] and (state["best"][0], state["best"][1])
        self._adam.restore(state["adam"])
        self.history.restore(state["history"])
        if processes.world()[0] == 0:  # the others keep noise of their own
            torch.set_rng_state(state["random"])
        if isinstance(self.batches, Epochs):
            self.batches.restore(state["batches"])
        step, self._skipped, self._stale = state["counts"]
        return step

    def _restore(self) -> None:
        if self._best is not None:
            self._place(self._best[1])

    @torch.no_grad()
    def _place(self, values: Sequence[Tensor]) -> None:
        """Give the parameters other values."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
