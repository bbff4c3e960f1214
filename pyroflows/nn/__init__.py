"""Conditioner networks: from features and context to the parameters of a transform."""

from pyroflows.nn.arguments import RecordedModule
from pyroflows.nn.causal import CausalTransformer
from pyroflows.nn.conditioner import Conditioner
from pyroflows.nn.masked import MaskedLinear, MaskedResidualMLP
from pyroflows.nn.mlp import ResidualMLP

__all__ = [
    "CausalTransformer",
    "Conditioner",
    "MaskedLinear",
    "MaskedResidualMLP",
    "RecordedModule",
    "ResidualMLP",
]
