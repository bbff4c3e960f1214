"""Independence Metropolis-Hastings: the guide proposes, the model disposes, in many chains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyroflows.mcmc.kernels import Chains, Plan
from pyroflows.mcmc.target import CHUNK, Target
from pyroflows.numerics import forked_rng

#: Acceptance rate that the local moves aim at; the best one in many dimensions.
LOCAL_ACCEPT = 0.574
#: Mean acceptance rate of the guide's proposals below which a warning is given.
LOW = 0.05


@dataclass(frozen=True)
class IMH:
    r"""Independence Metropolis-Hastings with the guide :math:`q` as proposal, all chains at once.

    A proposal :math:`z' \sim q`, whatever the state, is accepted with probability

    .. math:: \min\left(1, \frac{\pi(z')\, q(z)}{\pi(z)\, q(z')}\right).

    Draws are exact, and nearly independent where the guide is good. Where it misses a tail, chains
    get stuck there, and R-hat tells. The proposals of all chains are scored together and without
    gradients: a hundred chains cost little more than one.

    Local moves between the proposals, Langevin steps in the straightened space, bring chains out of
    where the guide is too thin; each costs one gradient for all chains. Their step size adapts
    during warm-up.

    Parameters
    ----------
    local_steps
        Local moves after each proposal.

    References
    ----------
    Tierney, "Markov chains for exploring posterior distributions", Annals of Statistics 1994;
    Gabrié, Rotskoff and Vanden-Eijnden, "Adaptive Monte Carlo augmented with normalizing flows",
    PNAS 2022.

    Examples
    --------
    >>> pf.mcmc.IMH(local_steps=2)
    IMH(local_steps=2)
    """

    local_steps: int = 0
    chains: ClassVar[int] = 100
    draws: ClassVar[int] = 100
    warmup: ClassVar[int] = 20

    def run(self, target: Target, plan: Plan) -> Chains:
        if not target.precondition:
            raise ValueError("kernel 'imh' proposes from the guide: leave out precondition=False")
        if self.local_steps < 0:
            raise ValueError(f"local_steps: expected at least 0, got {self.local_steps}")
        sampler = _Sampler(target, gradients=self.local_steps > 0)
        points: list[Tensor] = []
        rates: list[Tensor] = []
        interrupted = False
        try:
            with forked_rng(plan.seed), plan.bar("IMH") as bar:
                state = sampler.states(plan.starts)
                proposals = sampler.proposals(plan)
                for step in range(plan.warmup + plan.draws):
                    state, rate = sampler.independent(state, next(proposals))
                    for _ in range(self.local_steps):
                        state = sampler.local(state, adapt=step < plan.warmup)
                    if step >= plan.warmup:
                        points.append(state.z)
                        rates.append(rate)
                    bar.update(plan.chains)
        except KeyboardInterrupt:
            interrupted = True
            if not rates:
                raise
        accepted = torch.stack(rates, 1)
        if float(accepted.mean()) < LOW:
            warnings.warn(
                f"of the guide's proposals {float(accepted.mean()):.1%} are accepted, so that the "
                "chains hardly move: fit the guide longer, add local_steps, or take NUTS.",
                stacklevel=4,
            )
        return Chains(
            points=torch.stack(points[: len(rates)], 1),
            stats={"acceptance_rate": accepted},
            evaluations=sampler.evaluations,
            interrupted=interrupted,
        )


class _State(NamedTuple):
    """Points ``(chains, D)``, log densities, log weights (density over guide), gradients."""

    z: Tensor
    value: Tensor
    weight: Tensor
    grad: Tensor

    def where(self, condition: Tensor, other: _State) -> _State:
        """The state where the condition holds, else the other one, chain by chain."""
        rows = condition.unsqueeze(-1)
        return _State(
            torch.where(rows, self.z, other.z),
            torch.where(condition, self.value, other.value),
            torch.where(condition, self.weight, other.weight),
            torch.where(rows, self.grad, other.grad),
        )


class _Sampler:
    def __init__(self, target: Target, gradients: bool) -> None:
        self.target = target
        self.gradients = gradients
        self.evaluations = {"density_evaluations": 0, "gradient_evaluations": 0}
        self.log_step = math.log(1.0) - math.log(target.dim) / 6
        self._adapted = 0

    @torch.no_grad()
    def states(self, z: Tensor) -> _State:
        """Score points ``(S, D)``."""
        if self.gradients:
            value, grad = self.target.values_and_grads(z)
            self.evaluations["gradient_evaluations"] += len(z)
        else:
            value, grad = self.target.log_density(z), torch.zeros_like(z)
            self.evaluations["density_evaluations"] += len(z)
        value = value.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        return _State(z, value, value - self.target.base.log_prob(z), grad)

    def proposals(self, plan: Plan) -> Iterator[_State]:
        """A proposal for each chain, endlessly; those of many steps are scored at once."""
        steps = max(1, min(CHUNK // plan.chains, plan.warmup + plan.draws))
        while True:
            block = self.states(self.target.base.sample((steps * plan.chains,)))
            parts = [part.split(plan.chains) for part in block]
            yield from (_State(*step) for step in zip(*parts, strict=True))

    def independent(self, state: _State, proposed: _State) -> tuple[_State, Tensor]:
        """One proposal of the guide for each chain, and the probabilities of taking it."""
        return _accept(state, proposed, proposed.weight - state.weight)

    def local(self, state: _State, adapt: bool) -> _State:
        """One Metropolis-adjusted Langevin step of each chain."""
        step = math.exp(self.log_step)
        noise = torch.randn_like(state.z)
        proposed = self.states(state.z + step**2 / 2 * state.grad + step * noise)
        back = (state.z - proposed.z - step**2 / 2 * proposed.grad) / step
        log_ratio = proposed.value - state.value + (noise.square() - back.square()).sum(-1) / 2
        state, rate = _accept(state, proposed, log_ratio)
        if adapt:
            self._adapted += 1
            self.log_step += float(rate.mean() - LOCAL_ACCEPT) / self._adapted**0.5
        return state


def _accept(state: _State, proposed: _State, log_ratio: Tensor) -> tuple[_State, Tensor]:
    # A proposal of density zero has the ratio zero; its gradient may not be a number.
    rate = log_ratio.exp().clamp(max=1).nan_to_num(0.0)
    return proposed.where(torch.rand_like(rate) < rate, state), rate
