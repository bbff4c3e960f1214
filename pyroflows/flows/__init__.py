"""Flows: modules from context to a distribution, and the recipes by family."""

from pyroflows.flows.autoregressive import IAF, MAF
from pyroflows.flows.block import BNAF
from pyroflows.flows.catalogue import FlowInfo, get_flow, list_flows
from pyroflows.flows.circular import NCSF
from pyroflows.flows.continuous import CNF
from pyroflows.flows.coupling import NICE, NSF, RealNVP
from pyroflows.flows.dequantized import Dequantized
from pyroflows.flows.flow import Flow
from pyroflows.flows.flowpp import FlowPP
from pyroflows.flows.gaussianization import GF
from pyroflows.flows.neural import NAF, UNAF
from pyroflows.flows.planar import Planar, Radial, Sylvester
from pyroflows.flows.polynomial import BPF, SOSPF
from pyroflows.flows.recommend import Candidate, recommend
from pyroflows.flows.residual import ResidualFlow
from pyroflows.flows.transform import FlowTransform
from pyroflows.flows.transformer import TransformerAR

__all__ = [
    "BNAF",
    "BPF",
    "CNF",
    "GF",
    "IAF",
    "MAF",
    "NAF",
    "NCSF",
    "NICE",
    "NSF",
    "SOSPF",
    "UNAF",
    "Candidate",
    "Dequantized",
    "Flow",
    "FlowInfo",
    "FlowPP",
    "FlowTransform",
    "Planar",
    "Radial",
    "RealNVP",
    "ResidualFlow",
    "Sylvester",
    "TransformerAR",
    "get_flow",
    "list_flows",
    "recommend",
]
