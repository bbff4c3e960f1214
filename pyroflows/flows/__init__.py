"""Flows: modules from context to a distribution, and the recipes by family."""

from pyroflows.flows.autoregressive import IAF, MAF
from pyroflows.flows.coupling import NICE, NSF, RealNVP
from pyroflows.flows.flow import Flow
from pyroflows.flows.transform import FlowTransform

__all__ = ["IAF", "MAF", "NICE", "NSF", "Flow", "FlowTransform", "RealNVP"]
