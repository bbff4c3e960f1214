"""Continuous flows and the causal transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import Case, flow, held, layer

# The two directions meet only as nearly as a coarse grid of order 4, or an adaptive solver's
# tolerance, allows; vmap cannot follow steps that depend on values, and would take a grid instead.
GRID: dict[str, Any] = {"solver": "rk4", "steps": 8, "tolerance": 1e-5, "hidden_features": (8,)}
ADAPTIVE: dict[str, Any] = {
    "solver": "dopri8",
    "tolerance": 1e-7,
    "hidden_features": (8,),
    "vmap": False,
}


def swirl(weight: Tensor) -> pft.ContinuousTransform:
    """A bounded field by hand, which turns with the time."""

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ weight + t) - torch.tanh(t)

    return pft.ContinuousTransform(velocity, solver="rk4", steps=8)


CONTINUOUS = [
    held(
        "continuous",
        swirl,
        (3, 3),
        covers=("transforms.ContinuousTransform", "numerics.integrate"),
        tolerance=1e-5,
    ),
    layer("continuous", pfl.ContinuousLayer, 3, **GRID),
    *(flow(pf.CNF, n, note="grid", **GRID) for n in (1, 2, 5)),
    *(flow(pf.CNF, n, 3, note="grid", **GRID) for n in (1, 4)),
    flow(pf.CNF, 2, note="adaptive", **ADAPTIVE),
]

TINY: dict[str, Any] = {"width": 4, "heads": 2, "blocks": 1}
SPLINE = pft.RationalQuadratic(bins=4, bound=3.0)


def transformer(features: int, context: int = 0, **options: Any) -> Case:
    options = {"transforms": 1, "slow": "forward", **TINY, **options}
    return flow(pf.TransformerAR, features, context, **options)


TRANSFORMER = [
    layer("transformer", pfl.TransformerLayer, **TINY, slow="forward"),
    layer(
        "transformer-order",
        pfl.TransformerLayer,
        4,
        2,
        one_pass="forward",
        order=[2, 0, 3, 1],
        univariate=SPLINE,
        **TINY,
        slow="inverse",
        bound=3.0,
    ),
    *(transformer(n, transforms=2) for n in (2, 5)),
    *(transformer(n) for n in (1, 64)),
    *(transformer(n, 3) for n in (1, 4)),
    transformer(2, note="sampling", one_pass="forward", slow="inverse"),
    transformer(2, 3, note="mixed", mixing="lu"),
]

CASES: list[Case] = [*CONTINUOUS, *TRANSFORMER]
ELSEWHERE = {"nn.CausalTransformer": "tests/test_transformer.py"}
