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
from pyroflows.training.result import History

#: Consecutive steps without a finite gradient after which a fit gives up.
MAX_SKIPPED = 20


@dataclass
class Loop:
    """Adam with a cosine schedule and clipped gradients; the best state is restored.

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
        disable = None if self.progress is None else not self.progress
        try:
            with tqdm(total=self.steps, desc=self.title, unit="step", disable=disable) as bar:
                reason = self._train(bar)
        except KeyboardInterrupt:
            reason = "it was interrupted"
        finally:
            self._restore()
        return reason, time.perf_counter() - start

    def _train(self, bar: Any) -> str:
        # Small flows have many small tensors: one fused update is several times cheaper.
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        optimizer = torch.optim.Adam(self.parameters, lr=self.lr, fused=fused)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        first = skipped = stale = 0
        if self.resume is not None:
            first, skipped, stale = self._load(self.resume, optimizer, schedule)
            bar.update(first)
        elif self.check is not None:
            self._check(0)
        for step in range(first + 1, self.steps + 1):
            if self._step(optimizer):
                schedule.step()
                skipped = 0
            else:
                skipped += 1
            if skipped >= MAX_SKIPPED:
                raise FitError(
                    f"step {step}: the gradient has not been finite for {skipped} steps (loss "
                    f"{self.history.losses[-1]:.4g}). The best state so far is restored. Lower lr, "
                    "standardise the data, or use float64."
                )
            bar.update()
            if self._is_early(step):
                self._check(step)
            elif step % self.check_every == 0 or step == self.steps:
                improved = self._check(step)
                stale = 0 if improved else stale + 1
                now, best = self.history.checks[-1][1], self.history.best[1]
                bar.set_postfix({self.unit: f"{now:.3f}", "best": f"{best:.3f}"})
                if self.save is not None:
                    self.save(self._state(optimizer, schedule, step, skipped, stale))
                if self.patience is not None and stale >= self.patience:
                    return f"the loss has not improved for {stale} checks"
        return "all steps were done"

    def _step(self, optimizer: torch.optim.Optimizer) -> bool:
        optimizer.zero_grad()
        loss = self.loss(*next(self.batches))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.history.losses.append(loss.item())
        if not norm.isfinite():
            self.history.skipped += 1
            return False
        optimizer.step()
        return True

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
        torch.set_rng_state(state["random"])
        step, skipped, stale = state["counts"]
        return step, skipped, stale

    @torch.no_grad()
    def _restore(self) -> None:
        if self._best is not None:
            for parameter, best in zip(self.parameters, self._best[1], strict=True):
                parameter.copy_(best)
