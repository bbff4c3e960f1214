"""What a fit is worth, and how to look at it."""

from pyroflows.diagnostics.calibration import SBC, sbc
from pyroflows.diagnostics.classifiers import LocalC2ST, c2st, local_c2st
from pyroflows.diagnostics.from_arviz import from_arviz
from pyroflows.diagnostics.psis import PSIS, psis
from pyroflows.diagnostics.simulation import Simulations, simulate
from pyroflows.diagnostics.to_arviz import to_arviz

__all__ = [
    "PSIS",
    "SBC",
    "LocalC2ST",
    "Simulations",
    "c2st",
    "from_arviz",
    "local_c2st",
    "psis",
    "sbc",
    "simulate",
    "to_arviz",
]
