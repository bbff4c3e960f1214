"""Conditioner networks: from features and context to the parameters of a transform."""

from pyroflows.nn.arguments import RecordedModule
from pyroflows.nn.block import BlockLinear, BlockNetwork
from pyroflows.nn.causal import CausalTransformer
from pyroflows.nn.conditioner import Conditioner
from pyroflows.nn.encoders import (
    AttentionPooling,
    ConvEncoder,
    DeepSet,
    GRUEncoder,
    ImageEncoder,
)
from pyroflows.nn.lipschitz import LipschitzMLP, contracted
from pyroflows.nn.masked import MaskedLinear, MaskedResidualMLP
from pyroflows.nn.mlp import ResidualMLP, ZeroStart
from pyroflows.nn.periodic import PeriodicMLP

__all__ = [
    "AttentionPooling",
    "BlockLinear",
    "BlockNetwork",
    "CausalTransformer",
    "Conditioner",
    "ConvEncoder",
    "DeepSet",
    "GRUEncoder",
    "ImageEncoder",
    "LipschitzMLP",
    "MaskedLinear",
    "MaskedResidualMLP",
    "PeriodicMLP",
    "RecordedModule",
    "ResidualMLP",
    "ZeroStart",
    "contracted",
]
