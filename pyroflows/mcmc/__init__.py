"""Exact sampling, in the space that a guide's flow straightened."""

from pyroflows.mcmc.nuts import NUTS
from pyroflows.mcmc.run import run_mcmc

__all__ = ["NUTS", "run_mcmc"]
