"""The one table of cases: every public transform, recipe, layer, base and flow, with its traits.

Each case builds a module, ``module(context)`` -> a transform or a distribution, in float32.
A new public name needs a case in one of the modules here, or a line in its `ELSEWHERE`.
"""

from __future__ import annotations

from tests.cases import (
    bases,
    continuous,
    core,
    linear,
    numeric,
    residual,
    supports,
    univariate,
)
from tests.cases.core import RECIPES
from tests.cases.table import Case

FAMILIES = (core, linear, bases, univariate, numeric, residual, continuous, supports)
CASES: list[Case] = [case for family in FAMILIES for case in family.CASES]
FLOWS = [case for case in CASES if case.kind == "flow"]
# Public names without a case, and the file that tests them instead.
ELSEWHERE = {name: file for family in FAMILIES for name, file in family.ELSEWHERE.items()}

__all__ = ["CASES", "ELSEWHERE", "FLOWS", "RECIPES", "Case"]
