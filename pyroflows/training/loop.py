"""The one training loop behind the fit functions."""

from __future__ import annotations

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
from pyroflows.training.data import Epochs
from pyroflows.training.result import History

#: Consecutive steps without a finite gradient after which a fit gives up.
MAX_SKIPPED = 20
#: Losses stay on their device for so many steps: reading each would make a GPU wait.
READ_EVERY = 20


@dataclass
class Loop:
    """Adam with a cosine schedule and clipped gradients; the best state is restored.

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
        Number of steps; the learning rate falls to zero over them.
    lr
        Initial learning rate.
    clip_norm
        Largest norm of the gradient.
    check
        Validation loss; where None, the mean loss since the last check stands for it.
    check_every
        Steps between checks. With a ``check`` the start counts too, and the first steps are checked
        after 1, 2, 4, ...: few rows are learned by heart within a few steps.
    patience
        Checks without improvement after which to stop; None for never.
    progress
        Whether to show a bar; None for only in interactive use.
    title, unit
        What the bar says, and what it calls the loss.
    save, resume
        Called with the state of the loop at every check, and such a state to go on from: nested
        dictionaries of tensors and numbers.
    weigh
        Number of rows of a batch: its weight among those of the other processes.
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
    save: Callable[[dict[str, Any]], None] | None = None
    resume: dict[str, Any] | None = None
    weigh: Callable[..., float] = lambda *batch: 1.0

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
        return reason, time.perf_counter() - start

    def _train(self, bar: Any) -> str:
        # Small flows have many small tensors: one fused update is several times cheaper.
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        optimizer = torch.optim.Adam(self.parameters, lr=self.lr, fused=fused)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        first = stale = 0
        if self.resume is not None:
            first, self._skipped, stale = self._load(self.resume, optimizer, schedule)
            bar.update(first)
        elif self.check is not None:
            self._check(0)
        for step in range(first + 1, self.steps + 1):
            if self._is_stale(stale):
                break
            self._step(optimizer, fused)
            schedule.step()
            bar.update()
            early = self._is_early(step)
            regular = not early and (step % self.check_every == 0 or step == self.steps)
            if early or regular or len(self._unread) == READ_EVERY:
                self._read()
            if early:
                self._check(step)
            if regular:
                improved = self._check(step)
                stale = 0 if improved else stale + 1
                now, best = self.history.checks[-1][1], self.history.best[1]
                bar.set_postfix({self.unit: f"{now:.3f}", "best": f"{best:.3f}"})
                if self.save is not None:
                    self.save(self._state(optimizer, schedule, step, self._skipped, stale))
        if self._is_stale(stale):
            return f"the loss has not improved for {stale} checks"
        return "all steps were done"

    def _is_stale(self, stale: int) -> bool:
        return self.patience is not None and stale >= self.patience

    def _step(self, optimizer: torch.optim.Optimizer, fused: bool) -> None:
        """One step; nothing is read from the device."""
        optimizer.zero_grad()
        batch = next(self.batches)
        loss = self.loss(*batch)
        loss.backward()
        weight = self.weigh(*batch)
        loss = processes.average_gradients_(self.parameters, loss.detach(), weight)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        bad = ~norm.isfinite()
        self._unread.append(torch.stack([loss, bad.to(loss)]))
        if fused:
            # What a gradient scaler sets, too: the update leaves everything as it is.
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not bad:
            optimizer.step()

    def _read(self) -> None:
        """Take the losses since the last reading; raise where the gradients stay infinite."""
        unread, self._unread = self._unread, []
        for loss, bad in torch.stack(unread).tolist() if unread else []:
            self.history.losses.append(loss)
            self.history.skipped += bool(bad)
            self._skipped = self._skipped + 1 if bad else 0
            if self._skipped >= MAX_SKIPPED:
                raise FitError(
                    f"step {len(self.history.losses)}: the gradient has not been finite for "
                    f"{self._skipped} steps (loss {loss:.4g}). The best state so far is restored. "
                    "Lower lr, standardise the data, or use float64."
                )

    def _is_early(self, step: int) -> bool:
        """Whether a step before the first regular check is a power of two, and checked too."""
        return self.check is not None and step < self.check_every and step.bit_count() == 1

    def _check(self, step: int) -> bool:
        """Record a check and keep the state if it is the best so far."""
        if self.check is None:
            value = fmean(self.history.losses[-self.check_every :])
        else:
            value = self.check()
        self.history.checks.append((step, value))
        if self._best is not None and not value < self._best[0]:
            return False
        if value == value:
            self._best = (value, [p.detach().clone() for p in self.parameters])
        return True

    def _state(self, optimizer: Any, schedule: Any, *counts: int) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "counts": list(counts),
            "parameters": [p.detach().clone() for p in self.parameters],
            "best": self._best and list(self._best),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "history": asdict(self.history),
            "random": torch.get_rng_state(),
            "batches": self.batches.state() if isinstance(self.batches, Epochs) else None,
        }

    @torch.no_grad()
    def _load(self, state: dict[str, Any], optimizer: Any, schedule: Any) -> tuple[int, int, int]:
        """Go back to a state; the counts of steps, of skipped ones and of stale checks."""
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        self._best = state["best"] and (state["best"][0], state["best"][1])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        self.history.restore(state["history"])
        if processes.world()[0] == 0:  # the others keep noise of their own
            torch.set_rng_state(state["random"])
        if isinstance(self.batches, Epochs):
            self.batches.restore(state["batches"])
        step, skipped, stale = state["counts"]
        return step, skipped, stale

    @torch.no_grad()
    def _restore(self) -> None:
        if self._best is not None:
            for parameter, best in zip(self.parameters, self._best[1], strict=True):
                parameter.copy_(best)
