"""Learnable layers: modules that build a transform, given a context."""

from pyroflows.layers.base import Layer
from pyroflows.layers.conditioned import AutoregressiveLayer, CouplingLayer
from pyroflows.layers.elementwise import ElementwiseLayer
from pyroflows.layers.linear import ActNorm, LULinear, Permutation, Standardization

__all__ = [
    "ActNorm",
    "AutoregressiveLayer",
    "CouplingLayer",
    "ElementwiseLayer",
    "LULinear",
    "Layer",
    "Permutation",
    "Standardization",
]
