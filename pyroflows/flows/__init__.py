"""Flows: modules from context to a distribution, and the recipes by family."""

from pyroflows.flows.autoregressive import IAF, MAF
from pyroflows.flows.continuous import CNF
from pyroflows.flows.coupling import NICE, NSF, RealNVP
from pyroflows.flows.flow import Flow
from pyroflows.flows.planar import Planar, Radial, Sylvester
from pyroflows.flows.transform import FlowTransform

__all__ = [
    "CNF",
    "IAF",
    "MAF",
    "NICE",
    "NSF",
    "Flow",
    "FlowTransform",
    "Planar",
    "Radial",
    "RealNVP",
    "Sylvester",
]
