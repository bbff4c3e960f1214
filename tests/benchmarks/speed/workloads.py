"""The workloads: what is timed, at which size, and the goals relative to zuko."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.benchmarks.speed.architecture import Architecture, Contender, Run
from tests.benchmarks.speed.contenders import CONTENDERS, OF_PYRO
from tests.benchmarks.speed.work import LATENTS, WORK, train

#: Equal architectures may differ by biases, scales and the like.
PARAMETER_TOLERANCE = 0.07


@dataclass(frozen=True)
class Workload:
    """A line of the table.

    Attributes
    ----------
    architecture
        What every package builds.
    work
        What is timed, a name in `WORK`.
    number
        Rows or draws.
    goal, compiled_goal
        Our time relative to zuko's, eager and compiled; None where there is none to be had.
    trained
        Whether the weights are trained before.
    """

    architecture: Architecture
    work: str
    number: int
    goal: float | None = None
    compiled_goal: float | None = None
    trained: bool = False

    def admits(self, name: str) -> bool:
        """Whether a contender can do it."""
        if name == "pyroflows compiled" and self.compiled_goal is None:
            return False
        if name == "flowjax (jit)" and self.work == "schools":
            return False
        return not self.work.startswith("schools") or name in OF_PYRO

    def build(self, name: str, device: str = "cpu") -> Contender:
        """The contender of a package; it must be what was asked for."""
        a = self.architecture
        torch.manual_seed(0)
        contender = CONTENDERS[name](a).to(device)
        if self.trained and name != "floor":
            train(contender, a.features)
        # The recipe's linear maps are parameters of its own, the networks alone are no flow.
        if name != "pyroflows recipe":
            check_size(name, parameters(contender), a)
        if name != "floor":
            check_round_trip(name, round_trip(contender))
        return contender

    def run(self, contender: Contender) -> Run:
        return WORK[self.work](contender, self.number, self.architecture.features)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def check_size(name: str, got: int, a: Architecture) -> None:
    expected = parameters(CONTENDERS["floor"](a))
    if abs(got / expected - 1) > PARAMETER_TOLERANCE:
        raise ValueError(f"{name}: {got} parameters, the networks of {a} have {expected}")


@torch.no_grad()
def round_trip(contender: Contender) -> float:
    """How far scores of draws, by the other direction, are from those they were drawn with."""
    x, score = contender.draw(64)
    again = contender.log_prob(x.clone())
    return ((again - score).abs() / (1 + 0.02 * score.abs())).max().item()


def check_round_trip(name: str, gap: float) -> None:
    if not gap < 0.05:
        raise ValueError(f"{name}: draws and scores differ by {gap:.2g} nats")


COUPLING = Architecture("coupling", True, 16, 5, 128)
MAF = Architecture("density", False, 16, 5, 128)
AUTOREGRESSIVE = Architecture("density", True, 16, 5, 128)
REALNVP = Architecture("coupling", False, 64, 8, 128)
WIDE = Architecture("density", False, 64, 5, 128)
WIDER = Architecture("density", False, 256, 5, 256)
IAF = Architecture("guide", False, 32, 3, 64)
SMALL = Architecture("coupling", True, 4, 3, 32)
LATENT = Architecture("coupling", True, LATENTS, 3, 32)

WORKLOADS = {
    "W1 spline coupling: log_prob": Workload(COUPLING, "score", 1024, 0.45, 0.26),
    "W1 spline coupling: train step": Workload(COUPLING, "step", 1024, 0.58, 0.40),
    "W1 spline coupling: VI step, 256 draws": Workload(COUPLING, "guide", 256, 0.25, 0.18),
    "W2 MAF: train step": Workload(MAF, "step", 1024, 0.85, 0.75),
    "W2 MAF: sample 1024": Workload(MAF, "sample", 1024, 0.12, trained=True),
    "W3 autoregressive spline: log_prob": Workload(AUTOREGRESSIVE, "score", 1024, 0.40, 0.24),
    "W3 autoregressive spline: train step": Workload(AUTOREGRESSIVE, "step", 1024, 0.50, 0.36),
    "W3 autoregressive spline: sample 1024": Workload(
        AUTOREGRESSIVE, "sample", 1024, 0.10, trained=True
    ),
    "W4 RealNVP, 64 features: train step": Workload(REALNVP, "step", 1024, 0.70, 0.66),
    "W5 MAF, 64 features: sample 256": Workload(WIDE, "sample", 256, 0.12, trained=True),
    "W5 MAF, 256 features: sample 256": Workload(WIDER, "sample", 256, 0.03, trained=True),
    "W6 IAF guide: 64 draws": Workload(IAF, "guide", 64, 0.65, 0.33),
    "W7 small spline guide: 16 draws, VI step": Workload(SMALL, "guide step", 16, 0.33, 0.08),
    "W7s eight schools: SVI.step": Workload(LATENT, "schools", 16, 0.45),
    "W7s eight schools: fit_svi's step": Workload(LATENT, "schools fit", 16, 0.45, 0.035),
}

#: The same at sizes that keep a GPU busy.
ROWS = 65_536
_coupling = Architecture("coupling", True, 512, 5, 512)
_maf = Architecture("density", False, 512, 5, 512)
_autoregressive = Architecture("density", True, 64, 5, 256)
_realnvp = Architecture("coupling", False, 512, 8, 512)
GPU_WORKLOADS = {
    "G1 RealNVP, 512 features: train step": Workload(_realnvp, "step", ROWS, compiled_goal=0.66),
    "G2 MAF, 512 features: train step": Workload(_maf, "step", ROWS, compiled_goal=0.75),
    "G2 MAF, 512 features: sample 1024": Workload(_maf, "sample", 1024, trained=True),
    "G3 autoregressive spline, 64 features: log_prob": Workload(
        _autoregressive, "score", ROWS, compiled_goal=0.24
    ),
    "G3 autoregressive spline, 64 features: train step": Workload(
        _autoregressive, "step", ROWS // 4, compiled_goal=0.36
    ),
    "G4 spline coupling, 512 features: train step": Workload(
        _coupling, "step", ROWS // 16, compiled_goal=0.40
    ),
    "G7 small spline guide: 16 draws, VI step": Workload(
        SMALL, "guide step", 16, compiled_goal=0.08
    ),
    "G7s eight schools: fit_svi's step": Workload(LATENT, "schools fit", 16, compiled_goal=0.035),
}
