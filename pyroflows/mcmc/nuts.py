"""Pyro's No-U-Turn sampler on a target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.infer
import torch
from torch import Tensor

from pyroflows.mcmc.compiled import ValueAndGrad
from pyroflows.mcmc.kernels import Chains, Plan, stacked
from pyroflows.mcmc.target import Target
from pyroflows.numerics import forked_rng


@dataclass(frozen=True)
class NUTS:
    """Pyro's No-U-Turn sampler, chain after chain in this process.

    Step size and a diagonal mass matrix adapt during warm-up.

    Parameters
    ----------
    target_accept
        Acceptance rate that the step size aims at.
    max_tree_depth
        A trajectory has at most two to this power steps, each one gradient.

    References
    ----------
    Hoffman and Gelman, "The No-U-Turn sampler", JMLR 2014.

    Examples
    --------
    >>> pf.mcmc.NUTS(target_accept=0.9)
    NUTS(target_accept=0.9, max_tree_depth=10)
    """

    target_accept: float = 0.8
    max_tree_depth: int = 10
    chains: ClassVar[int] = 4
    draws: ClassVar[int] = 1000
    warmup: ClassVar[int] = 500

    def run(self, target: Target, plan: Plan) -> Chains:
        density = target.compile(plan.starts)
        runs: list[_Run] = []
        interrupted = False
        try:
            with plan.bar("NUTS") as bar:
                for chain, start in enumerate(plan.starts):
                    runs.append(_Run(density, bar))
                    with forked_rng(plan.seed + chain):
                        runs[-1].sample(self, start, plan)
        except KeyboardInterrupt:
            interrupted = True
            runs = [run for run in runs if run.points]
            if not runs:
                raise
        return Chains(
            points=stacked([run.points for run in runs]),
            stats={name: stacked([run.stats[name] for run in runs]) for name in runs[0].stats},
            evaluations={"gradient_evaluations": sum(run.gradients for run in runs)},
            interrupted=interrupted,
        )


@dataclass
class _Run:
    """One chain, and what Pyro's kernel does not keep of it."""

    density: ValueAndGrad
    bar: Any
    gradients: int = 0
    points: list[Tensor] = field(default_factory=list)
    stats: dict[str, list[Tensor]] = field(default_factory=dict)
    _before: int = 0
    _mean_accept: float = 0.0

    def sample(self, options: NUTS, start: Tensor, plan: Plan) -> None:
        kernel = pyro.infer.NUTS(
            potential_fn=self._potential,
            target_accept_prob=options.target_accept,
            max_tree_depth=options.max_tree_depth,
        )
        mcmc = pyro.infer.MCMC(
            kernel,
            num_samples=plan.draws,
            warmup_steps=plan.warmup,
            initial_params={"z": start},
            hook_fn=self._after_draw,
            disable_progbar=True,
        )
        mcmc.run()

    def _potential(self, values: dict[str, Tensor]) -> Tensor:
        self.gradients += 1
        potential: Tensor = _Potential.apply(values["z"], self.density)
        return potential

    def _after_draw(self, kernel: Any, values: dict[str, Tensor], stage: str, draw: int) -> None:
        self.bar.update()
        steps, self._before = self.gradients - self._before, self.gradients
        mean, self._mean_accept = self._mean_accept, kernel._mean_accept_prob
        if stage.startswith("Warmup"):
            return
        self.points.append(values["z"].detach())
        # Pyro keeps the running mean only, which starts afresh with the first draw; the difference
        # of two means carries their rounding.
        accept = mean + (draw + 1) * (self._mean_accept - mean) if draw else self._mean_accept
        accept = min(max(float(accept), 0.0), 1.0)
        divergences = kernel.diagnostics()["divergences"]
        row = {
            "diverging": bool(divergences) and divergences[-1] == draw,
            "acceptance_rate": accept,
            "n_steps": steps,
            "step_size": float(kernel.step_size),
        }
        for name, value in row.items():
            self.stats.setdefault(name, []).append(torch.tensor(value))


class _Potential(torch.autograd.Function):
    """Minus the log density, with the gradient that came along with it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, density: ValueAndGrad) -> Tensor:
        value, grad = density(z.detach())
        ctx.save_for_backward(grad)
        return -value

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return -outputs[0] * grad, None
