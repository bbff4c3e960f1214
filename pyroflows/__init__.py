"""Normalizing flows for Pyro: density models and variational guides from one stack."""

from pyroflows import (
    diagnostics,
    distributions,
    flows,
    guides,
    layers,
    nn,
    numerics,
    training,
    transforms,
)
from pyroflows.diagnostics import PSIS, psis, to_arviz
from pyroflows.distributions import FlowDistribution
from pyroflows.flows import (
    BPF,
    CNF,
    GF,
    IAF,
    MAF,
    NAF,
    NICE,
    NSF,
    SOSPF,
    UNAF,
    Flow,
    FlowPP,
    Planar,
    Radial,
    RealNVP,
    Sylvester,
    TransformerAR,
)
from pyroflows.guides import AutoFlow
from pyroflows.io import load, save
from pyroflows.training import fit_mle, fit_svi

__version__ = "0.1.0"

__all__ = [
    "BPF",
    "CNF",
    "GF",
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "PSIS",
    "SOSPF",
    "UNAF",
    "AutoFlow",
    "Flow",
    "FlowDistribution",
    "FlowPP",
    "Planar",
    "Radial",
    "RealNVP",
    "Sylvester",
    "TransformerAR",
    "diagnostics",
    "distributions",
    "fit_mle",
    "fit_svi",
    "flows",
    "guides",
    "layers",
    "load",
    "nn",
    "numerics",
    "psis",
    "save",
    "to_arviz",
    "training",
    "transforms",
]
