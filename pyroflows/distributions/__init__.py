"""Flows as Pyro distributions, and the bases they start from."""

from pyroflows.distributions.bases import Base, DiagonalNormal, StandardNormal, StudentT
from pyroflows.distributions.flow_distribution import FlowDistribution

__all__ = ["Base", "DiagonalNormal", "FlowDistribution", "StandardNormal", "StudentT"]
