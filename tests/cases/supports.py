"""Flows on constrained supports, foreign bijections, discrete data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor
from torch.distributions import constraints
from torch.distributions import transforms as torch_transforms

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, Stack, flow, held

# Beyond, exponentials leave float32, and derivatives at the least numbers of the unit interval do.
EXPONENTIAL = (10.0, 60.0)
INTERVAL = constraints.interval(-1.0, 3.0)
MIXED = [
    constraints.positive,
    constraints.real,
    constraints.unit_interval,
    constraints.less_than(0.0),
    constraints.positive,
]


def constrained(recipe: type, features: int, context: int = 0, **options: Any) -> Case:
    """A recipe on a support, which is the case's too."""
    note, support, traits = options["note"], options["support"], options.get("traits", {})
    magnitudes = (10.0, 100.0, 1e4) if support is INTERVAL else EXPONENTIAL
    trait = constraints.stack(support, -1) if isinstance(support, list) else support
    case = flow(recipe, features, context, note, support=trait, identity=False, **traits)

    def build() -> pf.Flow:
        made: pf.Flow = recipe(features, context, transforms=2, **SMALL, support=support)
        return made

    return replace(case, build=build, bound=None, magnitudes=magnitudes)


def interval_in_hand(shift: Tensor) -> pft.Transform:
    """Both ends, beside a parameter that the map does not need."""
    return pft.ComposedTransform([pft.ShiftTransform(shift), pft.IntervalTransform(INTERVAL)])


def columns_in_hand(shift: Tensor) -> pft.Transform:
    order = torch.tensor([2, 0, 1], device=shift.device)
    parts = [torch_transforms.ExpTransform(), pft.AffineTransform(shift, shift)]
    return pft.ColumnsTransform(parts, [2, 1], order, order.argsort())


def chain(context: int) -> pfl.Chain:
    """Three groups: a linear map, a coupling, an autoregression."""
    parts = [
        pfl.LULinear(2),
        [pfl.CouplingLayer(1, context + 2, **SMALL), pfl.ActNorm(1)],
        pfl.AutoregressiveLayer(2, context + 3, **SMALL),
    ]
    return pfl.Chain(parts, [2, 1, 2], context)


class Foreign(pfl.Layer):
    """Torch's, Pyro's and our own bijections, nested, one of them backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = pfl.Sequential(
            [
                torch_transforms.AffineTransform(0.5, 2.0),
                [pfl.CouplingLayer(3, 2, **SMALL), pyro_transforms.LeakyReLUTransform()],
                pfl.Inverse(pfl.AutoregressiveLayer(3, 2, **SMALL)),
                pfl.Bijection(pyro_transforms.Householder(3, 2)),
            ]
        )

    def forward(self, context: Tensor | None = None) -> pft.Transform:
        made: pft.Transform = self.layers(context)
        return made


CASES: list[Case] = [
    held(
        "interval",
        interval_in_hand,
        (3,),
        covers=("transforms.IntervalTransform",),
        support=INTERVAL,
        identity=False,
    ),
    held(
        "columns",
        columns_in_hand,
        (1,),
        covers=("transforms.ColumnsTransform",),
        support=constraints.stack(
            [constraints.positive, constraints.real, constraints.positive], -1
        ),
        identity=False,
        magnitudes=EXPONENTIAL,
    ),
    Case(
        "to-support",
        "layer",
        lambda: Stack(pfl.ActNorm(5), pfl.ToSupport(MIXED)),
        ("layers.ToSupport", "transforms.to_support"),
        (5,),
        identity=False,
        support=constraints.stack(MIXED, -1),
        magnitudes=EXPONENTIAL,
    ),
    *(
        Case(
            f"chain-c{context}",
            "layer",
            partial(chain, context),
            ("layers.Chain", "transforms.ChainTransform"),
            (5,),
            context,
            slow="forward",
        )
        for context in (0, 2)
    ),
    Case(
        "foreign-layers",
        "layer",
        Foreign,
        ("layers.Bijection", "layers.Inverse", "layers.Sequential"),
        (3,),
        2,
        identity=False,
        slow="inverse",
    ),
    *(
        constrained(recipe, features, context, note="unit", support=constraints.unit_interval)
        for recipe, features, context in (
            (pf.NSF, 1, 0),
            (pf.NSF, 2, 0),
            (pf.NSF, 2, 3),
            (pf.RealNVP, 1, 0),
            (pf.NSF, 5, 3),
        )
    ),
    constrained(pf.NSF, 5, note="interval", support=INTERVAL),
    constrained(
        pf.MAF,
        2,
        note="positive",
        support=constraints.positive,
        traits={"slow": "forward"},
    ),
    constrained(pf.NSF, 5, 3, note="mixed", support=MIXED),
]

ELSEWHERE: dict[str, str] = {
    # Its Jacobian is not square: the last share is one minus the others.
    "transforms.StickBreakingTransform": "tests/test_supports.py",
    # Rounding is not invertible, and the density is a bound.
    **dict.fromkeys(
        (
            "distributions.Categories",
            "distributions.DequantizedDistribution",
            "distributions.Quantization",
            "flows.Dequantized",
        ),
        "tests/test_dequantized.py",
    ),
}
