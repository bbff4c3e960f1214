"""Three tasks of the simulation-based inference benchmark, as Pyro models with likelihoods."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class Crescent(TorchDistribution):
    """A half ring of radius 0.1 and width 0.01, moved by the parameters."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, shift: Tensor, validate_args: bool | None = None) -> None:
        self.shift = shift
        super().__init__(shift.shape[:-1], shift.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Crescent:
        return Crescent(self.shift.expand(*batch_shape, 2))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        angle = math.pi * (torch.rand(shape) - 0.5)
        radius = 0.1 + 0.01 * torch.randn(shape)
        ring = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
        return ring + self.shift

    def log_prob(self, value: Tensor) -> Tensor:
        x, y = (value - self.shift).unbind(-1)
        x = x - 0.25
        radius = (x**2 + y**2).sqrt()
        ring = dist.Normal(0.1, 0.01).log_prob(radius) - radius.log() - math.log(math.pi)
        return ring.masked_fill(x < 0, -math.inf)


def two_moons() -> None:
    """Two crescents: the posterior has two modes, each narrow and curved."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    total, difference = theta.sum(-1), theta[..., 1] - theta[..., 0]
    pyro.sample("y", Crescent(torch.stack([-total.abs(), difference], -1) / math.sqrt(2)))


def slcp() -> None:
    """Simple likelihood, complex posterior: four points of a normal with squared scales."""
    theta = pyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1))
    mean, first, second = theta[..., :2], theta[..., 2] ** 2, theta[..., 3] ** 2
    correlation = theta[..., 4].tanh()
    rows = [
        torch.stack([first, torch.zeros_like(first)], -1),
        torch.stack([correlation * second, (1 - correlation**2).sqrt() * second], -1),
    ]
    # The benchmark adds 1e-6 to the variances, for scales of nearly zero.
    tril = torch.stack(rows, -2) + 1e-3 * torch.eye(2)
    with pyro.plate("points", 4):
        pyro.sample("y", dist.MultivariateNormal(mean, scale_tril=tril))


#: Variance of prior and noise of the Gaussian task.
VARIANCE = 0.1


def gaussian_linear() -> None:
    """A mean of ten columns, from one row of data: the posterior is normal."""
    scale = math.sqrt(VARIANCE)
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), scale).to_event(1))
    pyro.sample("y", dist.Normal(theta, scale).to_event(1))


def gaussian_reference(draws: int) -> tuple[Tensor, Tensor]:
    """Ten observations from the prior, and draws ``(10, draws, 10)`` of their exact posteriors."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 + draws, 10, 10, generator=generator)
    y = math.sqrt(VARIANCE) * (noise[0] + noise[1])
    return y, (y / 2 + math.sqrt(VARIANCE / 2) * noise[2:]).transpose(0, 1)


TASKS = {
    "two_moons": (two_moons, (2,)),
    "gaussian_linear": (gaussian_linear, (10,)),
    "slcp": (slcp, (4, 2)),
}
