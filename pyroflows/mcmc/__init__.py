"""Exact sampling, in the space that a guide's flow straightened."""

from pyroflows.mcmc.imh import IMH
from pyroflows.mcmc.nutpie import Nutpie
from pyroflows.mcmc.nuts import NUTS
from pyroflows.mcmc.run import run_mcmc

__all__ = ["IMH", "NUTS", "Nutpie", "run_mcmc"]
