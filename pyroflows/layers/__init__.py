"""Learnable layers: modules that build a transform, given a context."""

from pyroflows.layers.base import Layer
from pyroflows.layers.block import BlockLayer
from pyroflows.layers.chain import Chain
from pyroflows.layers.composition import Bijection, Inverse, Sequential, ToSupport
from pyroflows.layers.conditioned import AutoregressiveLayer, CouplingLayer
from pyroflows.layers.continuous import ContinuousLayer
from pyroflows.layers.elementwise import ElementwiseLayer
from pyroflows.layers.gaussianization import MarginalGaussianization
from pyroflows.layers.linear import (
    ActNorm,
    InvertibleConv1x1,
    LearnedPermutation,
    LULinear,
    MatrixExponential,
    Permutation,
)
from pyroflows.layers.orthogonal import Householder, OrthogonalLinear
from pyroflows.layers.planar import PlanarLayer, RadialLayer, SylvesterLayer
from pyroflows.layers.residual import ResidualLayer
from pyroflows.layers.standardization import LowRankWhitening, Standardization, Whitening
from pyroflows.layers.transformer import TransformerLayer

__all__ = [
    "ActNorm",
    "AutoregressiveLayer",
    "Bijection",
    "BlockLayer",
    "Chain",
    "ContinuousLayer",
    "CouplingLayer",
    "ElementwiseLayer",
    "Householder",
    "Inverse",
    "InvertibleConv1x1",
    "LULinear",
    "Layer",
    "LearnedPermutation",
    "LowRankWhitening",
    "MarginalGaussianization",
    "MatrixExponential",
    "OrthogonalLinear",
    "Permutation",
    "PlanarLayer",
    "RadialLayer",
    "ResidualLayer",
    "Sequential",
    "Standardization",
    "SylvesterLayer",
    "ToSupport",
    "TransformerLayer",
    "Whitening",
]
