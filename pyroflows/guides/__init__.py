"""Flows as variational guides of Pyro models."""

from pyroflows.guides.amortized import AutoAmortizedFlow
from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.default import default_conditional_flow, default_flow
from pyroflows.guides.log_joint import LogJoint
from pyroflows.guides.posterior import AmortizedPosterior

__all__ = [
    "AmortizedPosterior",
    "AutoAmortizedFlow",
    "AutoFlow",
    "LogJoint",
    "default_conditional_flow",
    "default_flow",
]
