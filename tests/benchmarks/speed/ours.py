"""Ours, eager and compiled, and the conditioner networks alone."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.flows.autoregressive import autoregressive_layers
from pyroflows.flows.coupling import coupling_layers, scoring_layers
from pyroflows.training.adam import Adam
from pyroflows.training.compiled import CompiledStep
from pyroflows.transforms import Affine, RationalQuadratic
from tests.benchmarks.speed.architecture import (
    BINS,
    BOUND,
    Architecture,
    Contender,
    OfDistribution,
    Run,
)

#: Compiled scores may differ from eager ones by so many nats.
SCORE_TOLERANCE = 1e-3


class Ours(OfDistribution):
    def distribution(self) -> Any:
        return self.flow()


def build(a: Architecture) -> pf.Flow:
    """Equal layers and nothing between them, out of the parts of our recipes."""
    univariate = RationalQuadratic(BINS, BOUND) if a.spline else Affine()
    sizes = (a.features, 0, a.layers, univariate, a.widths, nn.ReLU)
    if a.kind == "coupling":
        layers = (
            scoring_layers(*sizes, autoregressive=False) if a.spline else coupling_layers(*sizes)
        )
        return pf.Flow(layers, a.features)
    one_pass = "forward" if a.kind == "guide" else "inverse"
    return pf.Flow(autoregressive_layers(*sizes, one_pass), a.features)


def ours(a: Architecture) -> Contender:
    """Eager."""
    return Ours(build(a))


def recipe(a: Architecture) -> Contender:
    """The recipe with its own activation, and its linear maps between the layers."""
    sizes: Any = {"transforms": a.layers, "hidden_features": a.widths}
    if a.spline:
        sizes |= {"bins": BINS, "bound": BOUND, "autoregressive": a.kind != "coupling"}
        return Ours(pf.NSF(a.features, **sizes))
    names = {"coupling": "RealNVP", "density": "MAF", "guide": "IAF"}
    return Ours(pf.get_flow(names[a.kind])(a.features, **sizes))


class Compiled(Ours):
    """Steps as fits take them with ``compile=True``, scores by `torch.compile`.

    Gradients are steps too: the update belongs to the graph.
    """

    #: What recording, compiling and checking took.
    seconds = 0.0

    def scores(self, x: Tensor) -> Run:
        start = time.perf_counter()
        compiled = torch.compile(lambda x: self.flow().log_prob(x), fullgraph=True)

        @torch.no_grad()
        def run() -> Tensor:
            return compiled(x)

        gap = (run() - super().scores(x)()).abs().max().item()
        if not gap < SCORE_TOLERANCE:
            raise ValueError(f"compiled scores differ by {gap:.2g} nats from eager ones")
        self.seconds = time.perf_counter() - start
        return run

    def steps(self, loss: nn.Module, *batch: Tensor) -> Run:
        parameters = [p for p in loss.parameters() if p.requires_grad]
        adam, compiled = Adam(parameters), CompiledStep(loss, parameters, clip_norm=100.0)

        def step() -> None:
            if compiled.take(adam, 1e-3, batch) is None:
                raise RuntimeError(f"the step is not compiled: {compiled.refused or 'undefined'}")

        step()
        self.seconds = compiled.seconds
        return step

    gradients = steps


def compiled(a: Architecture) -> Contender:
    """The flow of `ours`."""
    return Compiled(build(a))


class Floor(Contender):
    """The conditioner networks alone, unmasked: what any flow of this architecture must pay."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.features = a.features
        self.given = a.features // 2 if a.kind == "coupling" else a.features
        mapped = a.features - self.given if a.kind == "coupling" else a.features
        sizes = [self.given, *a.widths, a.count * mapped]
        self.networks = nn.ModuleList(network(sizes) for _ in range(a.layers))

    def log_prob(self, x: Tensor) -> Tensor:
        outputs = [network(x[..., : self.given]).sum(-1) for network in self.networks]
        return torch.stack(outputs).sum(0)

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(number, self.features, device=self.device)
        return x, self.log_prob(x)

    @torch.no_grad()
    def sample(self, number: int) -> Tensor:
        return self.draw(number)[1]


def network(sizes: list[int]) -> nn.Sequential:
    parts = [(nn.ReLU(), nn.Linear(before, after)) for before, after in pairwise(sizes)]
    return nn.Sequential(*[part for pair in parts for part in pair][1:])
