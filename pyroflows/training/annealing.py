"""Draws of a guide, carried to where the posterior is and the guide is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]

#: Densities between the guide and the target, and the leapfrog steps of the transition at each.
LEVELS, LEAPFROGS = 8, 5
#: Share of proposals to accept, and how fast the step's size follows.
ACCEPTED, RATE = 0.65, 0.1


class Annealing:
    r"""Annealed importance sampling from a guide :math:`q` to :math:`p^2 / q`.

    Points pass through the densities :math:`q^{1 - 2\beta} p^{2\beta}` with :math:`\beta` from 0 to
    1, at each of which a Hamiltonian transition moves them, and collect the weights

    .. math:: \log w = \sum_i 2 (\beta_i - \beta_{i-1}) \log \frac{p(z_{i-1})}{q(z_{i-1})} .

    The target has most of its mass where the guide lacks it, and weights of draws from it make the
    gradient of :math:`\int p^2 / q` of least variance. The size of a leapfrog step, in deviations
    of the points, is learned from call to call.

    One call costs forty evaluations of both densities, with gradients.

    References
    ----------
    Midgley, Stimper, Simm, Schoelkopf and Hernandez-Lobato, "Flow annealed importance sampling
    bootstrap", ICLR 2023; Neal, "Annealed importance sampling", Statistics and Computing 2001.

    Examples
    --------
    >>> anneal = Annealing()
    >>> q = pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1)
    >>> p = pyro.distributions.Normal(torch.ones(2), 1.0).to_event(1)
    >>> z, log_weights = anneal(q.sample((1000,)), p.log_prob, q.log_prob)
    >>> z.shape, log_weights.shape
    (torch.Size([1000, 2]), torch.Size([1000]))
    """

    def __init__(self) -> None:
        self.size = 0.3

    @torch.no_grad()
    def __call__(
        self, points: Tensor, log_p: LogDensity, log_q: LogDensity
    ) -> tuple[Tensor, Tensor]:
        """Draws ``(S, D)`` of the guide to points ``(S, D)`` and their log weights ``(S,)``."""
        scale = points.std(0)
        log_weights = points.new_zeros(len(points))
        here = _State(points, log_p, log_q)
        for level in range(1, LEVELS + 1):
            log_weights = log_weights + 2 / LEVELS * (here.p - here.q)
            here = self._transition(here, level / LEVELS, scale)
        return here.z, log_weights

    def _transition(self, here: _State, beta: float, scale: Tensor) -> _State:
        momentum = torch.randn_like(here.z)
        size = self.size * scale * torch.empty_like(here.p).uniform_(0.5, 1.5).unsqueeze(-1)
        there, v = here, momentum
        for _ in range(LEAPFROGS):
            v = v + size / 2 * there.slope(beta)
            there = there.at(there.z + size * v)
            v = v + size / 2 * there.slope(beta)
        gain = there.value(beta) - here.value(beta) - (v.square() - momentum.square()).sum(-1) / 2
        chance = gain.nan_to_num(-math.inf).exp().clamp(max=1.0)
        self.size *= math.exp(RATE * (chance.mean().item() - ACCEPTED))
        return there.where(torch.rand_like(chance) < chance, here)


class _State:
    """Points with both log densities and their gradients; no density where undefined."""

    def __init__(self, z: Tensor, log_p: LogDensity, log_q: LogDensity) -> None:
        self.z, self.log_p, self.log_q = z, log_p, log_q
        self.p, self.p_slope = _value_and_slope(log_p, z)
        self.q, self.q_slope = _value_and_slope(log_q, z)

    def at(self, z: Tensor) -> _State:
        return _State(z, self.log_p, self.log_q)

    def value(self, beta: float) -> Tensor:
        return (1 - 2 * beta) * self.q + 2 * beta * self.p

    def slope(self, beta: float) -> Tensor:
        return (1 - 2 * beta) * self.q_slope + 2 * beta * self.p_slope

    def where(self, keep: Tensor, other: _State) -> _State:
        """Rows of this one, or of another."""
        for name in ("z", "p", "q", "p_slope", "q_slope"):
            mine, its = getattr(self, name), getattr(other, name)
            rows = keep.unsqueeze(-1) if mine.dim() > 1 else keep
            setattr(self, name, torch.where(rows, mine, its))
        return self


def _value_and_slope(log_density: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = log_density(z)
        (slope,) = torch.autograd.grad(value.sum(), z)
    usable = value.isfinite() & slope.isfinite().all(-1)
    slope = torch.where(usable.unsqueeze(-1), slope, 0.0)
    return torch.where(usable, value.detach(), -math.inf), slope
