"""Normalizing flows for Pyro: density models and variational guides from one stack."""

from pyroflows import distributions, flows, layers, nn, numerics, transforms
from pyroflows.flows import IAF, MAF, NICE, NSF, Flow, RealNVP
from pyroflows.io import load, save

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "NSF",
    "Flow",
    "RealNVP",
    "distributions",
    "flows",
    "layers",
    "load",
    "nn",
    "numerics",
    "save",
    "transforms",
]
