"""Flows as variational guides of Pyro models."""

from pyroflows.guides.autoflow import AutoFlow
from pyroflows.guides.default import default_flow
from pyroflows.guides.log_joint import LogJoint

__all__ = ["AutoFlow", "LogJoint", "default_flow"]
