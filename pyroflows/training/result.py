"""What a fit returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyroflows.diagnostics import PSIS


@dataclass
class History:
    """Losses of a fit, in nats.

    Attributes
    ----------
    losses
        Loss of every step's batch.
    checks
        Pairs of step and checked loss: of the validation rows, or of the steps since the last
        check.
    skipped
        Steps left out because their gradient was not finite.
    """

    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0

    @property
    def best(self) -> tuple[int, float]:
        """Step and value of the lowest checked loss; NaN where there is none."""
        numbers = [(step, value) for step, value in self.checks if value == value]
        return min(numbers, key=lambda check: check[1], default=(0, float("nan")))

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Take over what was stored of a history."""
        self.losses[:] = stored["losses"]
        self.checks[:] = [(step, value) for step, value in stored["checks"]]
        self.skipped = stored["skipped"]


@dataclass
class Fit:
    """A finished fit.

    Attributes
    ----------
    history
        Losses per step and per check.
    stop_reason
        Why it ended, in words.
    seconds
        Wall time of the training.
    compiled
        What came of the option ``compile``: how long that took, or why the steps were taken
        operation by operation. Empty where it was not asked for.
    """

    history: History
    stop_reason: str
    seconds: float
    compiled: str = field(default="", kw_only=True)

    #: What the vertical axis of the plot shows, and what the checked losses are.
    _quantity = "loss (nats)"
    _checked = "checked"

    def plot(self, ax: Any = None) -> Any:
        """Plot the losses over the steps; returns matplotlib's axes (needs the ``plot`` extra)."""
        from matplotlib import pyplot

        if ax is None:
            _, ax = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        steps = range(1, len(self.history.losses) + 1)
        ax.plot(steps, self.history.losses, color="0.75", lw=0.8, label="batch")
        if self.history.checks:
            ax.plot(*zip(*self.history.checks, strict=True), color="C0", label=self._checked)
            step, best = self.history.best
            ax.plot(step, best, "o", color="C1", label=f"best: {best:.3f}")
        # The first steps are far off: they would flatten everything that follows.
        first = len(steps) // 20
        checked = sorted(loss for step, loss in self.history.checks if step > first)
        settled = sorted(self.history.losses[first:])
        if len(settled) > 20:
            shown = [losses for losses in (settled, checked) if losses]
            low = min(losses[0] for losses in shown)
            high = max(losses[int(0.98 * len(losses))] for losses in shown)
            ax.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))
        ax.set(xlabel="step", ylabel=self._quantity)
        ax.legend(frameon=False)
        return ax

    def _summary(self) -> str:
        if not self.history.losses:
            return f"no steps, in {self.seconds:.1f} s: {self.stop_reason}"
        step, best = self.history.best
        skipped = f", {self.history.skipped} steps skipped" if self.history.skipped else ""
        compiled = f"\nsteps {self.compiled}" if self.compiled else ""
        return (
            f"{len(self.history.losses)} steps in {self.seconds:.1f} s, stopped because "
            f"{self.stop_reason}{skipped}; best {self._quantity} {best:.4f} at step {step}"
            f"{compiled}"
        )

    def __str__(self) -> str:
        return self._summary()


@dataclass
class MLEFit(Fit):
    """Result of `pyroflows.fit_mle`; the checked losses are those of the validation rows."""

    _quantity = "negative log likelihood (nats)"
    _checked = "validation"


@dataclass
class FlowMatchingFit(Fit):
    """Result of `pyroflows.fit_flow_matching`; the losses are mean squares of velocities.

    They are no densities: even the true velocity has a loss above zero.
    """

    _quantity = "flow matching loss"
    _checked = "validation"


@dataclass
class SVIFit(Fit):
    """Result of `pyroflows.fit_svi`.

    Attributes
    ----------
    psis
        The importance-sampling report on the fitted guide, see `pyroflows.psis`.
    dropped
        Draws left out in training because the model's density was zero or not a number.
    """

    psis: PSIS | None = None
    dropped: int = 0

    _quantity = "negative ELBO (nats)"
    _checked = "averaged"

    def __str__(self) -> str:
        dropped = f"\n{self.dropped} draws dropped in training" if self.dropped else ""
        report = f"\n{self.psis}" if self.psis is not None else ""
        return self._summary() + dropped + report
