"""Flows as Pyro distributions, and the bases they start from."""

from pyroflows.distributions.bases import (
    Base,
    DiagonalNormal,
    FullNormal,
    Laplace,
    StandardNormal,
    StudentT,
    UniformBox,
)
from pyroflows.distributions.dequantized import (
    Categories,
    DequantizedDistribution,
    Quantization,
)
from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.distributions.given import DistributionBase
from pyroflows.distributions.mixtures import Mixture
from pyroflows.distributions.modes import Modes

__all__ = [
    "Base",
    "Categories",
    "DequantizedDistribution",
    "DiagonalNormal",
    "DistributionBase",
    "FlowDistribution",
    "FullNormal",
    "Laplace",
    "Mixture",
    "Modes",
    "Quantization",
    "StandardNormal",
    "StudentT",
    "UniformBox",
]
