"""Flows: modules from context to a distribution, and the recipes by family."""

from pyroflows.flows.autoregressive import IAF, MAF
from pyroflows.flows.continuous import CNF
from pyroflows.flows.coupling import NICE, NSF, RealNVP
from pyroflows.flows.flow import Flow
from pyroflows.flows.flowpp import FlowPP
from pyroflows.flows.gaussianization import GF
from pyroflows.flows.neural import NAF, UNAF
from pyroflows.flows.planar import Planar, Radial, Sylvester
from pyroflows.flows.polynomial import BPF, SOSPF
from pyroflows.flows.transform import FlowTransform
from pyroflows.flows.transformer import TransformerAR

__all__ = [
    "BPF",
    "CNF",
    "GF",
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "SOSPF",
    "UNAF",
    "Flow",
    "FlowPP",
    "FlowTransform",
    "Planar",
    "Radial",
    "RealNVP",
    "Sylvester",
    "TransformerAR",
]
