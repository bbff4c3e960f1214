"""The workloads: what is timed, at which size, and the goals relative to zuko."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

import pyroflows as pf
from pyroflows.numerics import forked_rng
from pyroflows.training.losses import NegativeELBO
from tests.benchmarks.speed.contenders import CONTENDERS, Architecture, Contender, Ours

Run = Callable[[], object]
#: Equal architectures may differ by biases, scales and the like.
PARAMETER_TOLERANCE = 0.07


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
    step = training_step(contender, correlated(256, features))
    for _ in range(steps):
        step()


def training_step(contender: Contender, x: Tensor) -> Run:
    optimizer = torch.optim.Adam(contender.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-contender.log_prob(x).mean()).backward()
        optimizer.step()

    return step


def scoring(contender: Contender, x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return contender.log_prob(x)

    return run


def guiding(contender: Contender, draws: int) -> Run:
    """A draw, its score and the gradients; no optimiser."""

    def run() -> None:
        contender.zero_grad()
        x, log_q = contender.draw(draws)
        (log_q + 0.5 * x.square().sum(-1)).mean().backward()

    return run


def guide_step(contender: Contender, draws: int) -> Run:
    """As `guiding`, with an update."""
    optimizer = torch.optim.Adam(contender.parameters(), lr=1e-3, fused=True)
    run = guiding(contender, draws)

    def step() -> None:
        run()
        optimizer.step()

    return step


# --- a model of Pyro ------------------------------------------------------------------------------

LATENTS, DRAWS = 10, 16
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(Y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, SIGMA), obs=Y)


class OtherGuide(AutoContinuous):
    """Another package's flow as an autoguide of Pyro."""

    def __init__(self, contender: Contender) -> None:
        super().__init__(schools)
        self.contender = contender

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        return self.contender.distribution()


def svi_step(contender: Contender) -> Run:
    """``SVI.step`` with 16 vectorised particles; ours by path gradients, an inverse more."""
    pyro.clear_param_store()
    mine = isinstance(contender, Ours) and isinstance(contender.flow, pf.Flow)
    guide = pf.AutoFlow(schools, contender.flow, example_args=()) if mine else OtherGuide(contender)
    elbo = Trace_ELBO(num_particles=DRAWS, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)

    def step() -> None:
        svi.step()
        contender.forget()

    return step


def fit_step(contender: Contender) -> Run:
    """What `pyroflows.fit_svi` does in a step for ours, ``SVI.step`` for the others."""
    if not (isinstance(contender, Ours) and isinstance(contender.flow, pf.Flow)):
        return svi_step(contender)
    pyro.clear_param_store()
    guide = pf.AutoFlow(schools, contender.flow, example_args=())
    loss = NegativeELBO(guide, DRAWS, "total")
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A line of the table.

    Attributes
    ----------
    architecture
        What every package builds.
    make
        From a contender, to what is timed.
    goal
        Our time relative to zuko's, uncompiled.
    trained
        Whether the weights are trained before.
    pyro_only
        Whether the flow must be a Pyro distribution.
    """

    architecture: Architecture
    make: Callable[[Contender], Run]
    goal: float
    trained: bool = False
    pyro_only: bool = False

    def build(self, name: str) -> Contender:
        """The contender of a package; it must be what was asked for."""
        a = self.architecture
        contender = CONTENDERS[name](a)
        if self.trained and name != "floor":
            train(contender, a.features)
        # The recipe's linear maps are parameters of its own, the networks alone are no flow.
        if name != "pyroflows recipe":
            check_size(name, contender, a)
        if name != "floor":
            check_round_trip(name, contender)
        return contender


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def check_size(name: str, contender: Contender, a: Architecture) -> None:
    got, expected = parameters(contender), parameters(CONTENDERS["floor"](a))
    if abs(got / expected - 1) > PARAMETER_TOLERANCE:
        raise ValueError(f"{name}: {got} parameters, the networks of {a} have {expected}")


def check_round_trip(name: str, contender: Contender) -> None:
    """Draws are scored as they were drawn, by the other direction."""
    with torch.no_grad():
        x, score = contender.draw(64)
        again = contender.log_prob(x.clone())
    if not torch.allclose(again, score, atol=0.05, rtol=1e-3):
        gap = (again - score).abs().max().item()
        raise ValueError(f"{name}: draws and scores differ by {gap:.2g} nats")


def _workloads() -> dict[str, Workload]:
    coupling = Architecture("coupling", True, 16, 5, 128)
    maf = Architecture("density", False, 16, 5, 128)
    autoregressive = Architecture("density", True, 16, 5, 128)
    realnvp = Architecture("coupling", False, 64, 8, 128)
    wide = Architecture("density", False, 64, 5, 128)
    wider = Architecture("density", False, 256, 5, 256)
    iaf = Architecture("guide", False, 32, 3, 64)
    small = Architecture("coupling", True, 4, 3, 32)
    latent = Architecture("coupling", True, LATENTS, 3, 32)

    def vi(draws: int) -> Callable[[Contender], Run]:
        return lambda c: guiding(c, draws)

    def score(c: Contender) -> Run:
        return scoring(c, torch.randn(1024, 16))

    def step(features: int) -> Callable[[Contender], Run]:
        return lambda c: training_step(c, torch.randn(1024, features))

    def sample(number: int) -> Callable[[Contender], Run]:
        return lambda c: lambda: c.sample(number)

    return {
        "W1 spline coupling: log_prob": Workload(coupling, score, 0.45),
        "W1 spline coupling: train step": Workload(coupling, step(16), 0.58),
        "W1 spline coupling: VI step, 256 draws": Workload(
            coupling, lambda c: guiding(c, 256), 0.25
        ),
        "W2 MAF: train step": Workload(maf, step(16), 0.85),
        "W2 MAF: sample 1024": Workload(maf, sample(1024), 0.12, trained=True),
        "W3 autoregressive spline: log_prob": Workload(autoregressive, score, 0.40),
        "W3 autoregressive spline: train step": Workload(autoregressive, step(16), 0.50),
        "W3 autoregressive spline: sample 1024": Workload(
            autoregressive, sample(1024), 0.10, trained=True
        ),
        "W4 RealNVP, 64 features: train step": Workload(realnvp, step(64), 0.70),
        "W5 MAF, 64 features: sample 256": Workload(wide, sample(256), 0.12, trained=True),
        "W5 MAF, 256 features: sample 256": Workload(wider, sample(256), 0.03, trained=True),
        "W6 IAF guide: 64 draws": Workload(iaf, vi(64), 0.65),
        "W7 small spline guide: 16 draws, VI step": Workload(
            small, lambda c: guide_step(c, 16), 0.33
        ),
        "W7s eight schools: SVI.step": Workload(latent, svi_step, 0.45, pyro_only=True),
        "W7s eight schools: fit_svi's step": Workload(latent, fit_step, 0.45, pyro_only=True),
    }


WORKLOADS = _workloads()
