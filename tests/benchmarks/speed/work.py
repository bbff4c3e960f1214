"""What is timed: scoring, training, drawing, guiding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.numerics import forked_rng
from pyroflows.training.losses import NegativeELBO
from tests.benchmarks.speed.architecture import Contender, Run
from tests.benchmarks.speed.ours import Ours


class Likelihood(nn.Module):
    """The mean negative log density."""

    def __init__(self, contender: Contender) -> None:
        super().__init__()
        self.contender = contender

    def forward(self, x: Tensor) -> Tensor:
        return -self.contender.log_prob(x).mean()


class ToNormal(nn.Module):
    """The divergence of a guide from a normal posterior, by draws."""

    def __init__(self, contender: Contender, draws: int) -> None:
        super().__init__()
        self.contender, self.draws = contender, draws

    def forward(self) -> Tensor:
        x, log_q = self.contender.draw(self.draws)
        return (log_q + 0.5 * x.square().sum(-1)).mean()


@torch.no_grad()
def correlated(rows: int, features: int) -> Tensor:
    """Standardised rows with strong correlations and a bend."""
    with forked_rng(0):
        mixing = torch.randn(features, features) / features**0.5
        x = torch.randn(rows, features) @ mixing
    x = x + 0.3 * x.roll(1, -1) ** 2
    return (x - x.mean(0)) / x.std(0)


def train(contender: Contender, features: int, steps: int = 150) -> None:
    """A short fit, after which inverses are as hard as those of weights in use."""
    step = contender.steps(Likelihood(contender), correlated(256, features).to(contender.device))
    for _ in range(steps):
        step()


def rows(contender: Contender, number: int, features: int) -> Tensor:
    return torch.randn(number, features, device=contender.device)


def score(contender: Contender, number: int, features: int) -> Run:
    return contender.scores(rows(contender, number, features))


def step(contender: Contender, number: int, features: int) -> Run:
    """Forward, backward, Adam."""
    return contender.steps(Likelihood(contender), rows(contender, number, features))


def sample(contender: Contender, number: int, features: int) -> Run:
    return lambda: contender.sample(number)


def guide(contender: Contender, number: int, features: int) -> Run:
    """A draw, its score and the gradients; no optimiser."""
    return contender.gradients(ToNormal(contender, number))


def guide_step(contender: Contender, number: int, features: int) -> Run:
    """As `guide`, with an update."""
    return contender.steps(ToNormal(contender, number))


# --- a model of Pyro ------------------------------------------------------------------------------

LATENTS = 10
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(device: torch.device | str = "cpu") -> Callable[[], None]:
    y, sigma = Y.to(device), SIGMA.to(device)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        with pyro.plate("school", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    return model


class OtherGuide(AutoContinuous):
    """Another package's flow as an autoguide of Pyro."""

    def __init__(self, contender: Contender) -> None:
        super().__init__(schools(contender.device))
        self.contender = contender

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        return self.contender.distribution()


def svi_step(contender: Contender, number: int, features: int) -> Run:
    """``SVI.step`` with vectorised particles; ours by path gradients, an inverse more."""
    pyro.clear_param_store()
    model = schools(contender.device)
    if isinstance(contender, Ours):
        made: Any = pf.AutoFlow(model, contender.flow, example_args=())
    else:
        made = OtherGuide(contender)
    elbo = Trace_ELBO(num_particles=number, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, made, pyro.optim.Adam({"lr": 1e-3}), elbo)

    def step() -> None:
        svi.step()
        contender.forget()

    return step


def fit_step(contender: Contender, number: int, features: int) -> Run:
    """What `pyroflows.fit_svi` does in a step for ours, ``SVI.step`` for the others."""
    if not isinstance(contender, Ours):
        return svi_step(contender, number, features)
    pyro.clear_param_store()
    made = pf.AutoFlow(schools(contender.device), contender.flow, example_args=())
    return contender.steps(NegativeELBO(made, number, "total"))


#: By name, as the worker of another interpreter knows them too.
WORK: dict[str, Callable[[Contender, int, int], Run]] = {
    "score": score,
    "step": step,
    "sample": sample,
    "guide": guide,
    "guide step": guide_step,
    "schools": svi_step,
    "schools fit": fit_step,
}
