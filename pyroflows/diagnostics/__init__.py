"""What a fit is worth, and how to look at it."""

from pyroflows.diagnostics.psis import PSIS, psis
from pyroflows.diagnostics.to_arviz import to_arviz

__all__ = ["PSIS", "psis", "to_arviz"]
