"""What a fit is worth, and how to look at it."""

from pyroflows.diagnostics.to_arviz import to_arviz

__all__ = ["to_arviz"]
