"""Planar, radial, Sylvester, residual and block autoregressive flows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, flow, held, layer


def planar(weight: Tensor, scale: Tensor, bias: Tensor) -> Any:
    return pft.PlanarTransform(weight, scale, bias[0])


def radial(center: Tensor, numbers: Tensor) -> Any:
    return pft.RadialTransform(center, *numbers)


def residual(weight: Tensor) -> Any:
    return pft.ResidualTransform(lambda x: 0.5 * (x @ weight).sin(), 0.9)


def conditional(params: Tensor) -> Any:
    return pft.ConditionalTransform(lambda p: pft.DiagonalAffineTransform(p, p), params)


TRANSFORMS = [
    held(
        "planar",
        planar,
        *((3,), (3,), (1,)),
        covers=("transforms.PlanarTransform",),
        slow="inverse",
    ),
    held("radial", radial, (3,), (2,), covers=("transforms.RadialTransform",)),
    held("sylvester", pft.SylvesterTransform, (2, 3), (2, 2), (2, 2), (2,), slow="inverse"),
    held(
        "residual",
        residual,
        (3, 3),
        covers=("transforms.ResidualTransform",),
        slow="inverse",
    ),
    Case(
        "block",
        "transform",
        lambda: pfl.BlockLayer(2, one_pass="forward", hidden_features=(3,)),
        ("transforms.BlockTransform",),
        (2,),
        slow="inverse",
        identity=False,
    ),
    held("conditional", conditional, (3,), covers=("transforms.ConditionalTransform",)),
]

LAYERS = [
    layer("planar", pfl.PlanarLayer, 3, one_pass="forward", slow="inverse"),
    layer("planar-context-linear", pfl.PlanarLayer, 3, 2, hidden_features=(), slow="forward"),
    layer("radial", pfl.RadialLayer, 3, one_pass="forward"),
    layer("radial-1", pfl.RadialLayer, 1),
    layer("sylvester", pfl.SylvesterLayer, 3, rank=2, one_pass="forward", slow="inverse"),
    layer("sylvester-context", pfl.SylvesterLayer, 3, 2, rank=1, **SMALL, slow="forward"),
    layer("residual", pfl.ResidualLayer, one_pass="forward", hidden_features=(8,), slow="inverse"),
    layer(
        "residual-context",
        pfl.ResidualLayer,
        *(2, 2),
        one_pass="forward",
        hidden_features=(8,),
        slow="inverse",
    ),
    layer("residual-linear", pfl.ResidualLayer, 3, 2, hidden_features=(), slow="forward"),
    layer(
        "block-order",
        pfl.BlockLayer,
        *(3, 2),
        order=[2, 0, 1],
        one_pass="forward",
        hidden_features=(2,),
        slow="inverse",
        identity=False,
    ),
    layer("block-linear", pfl.BlockLayer, hidden_features=(), slow="forward", identity=False),
]

LOW_RANK: list[tuple[type, dict[str, Any]]] = [
    (pf.Planar, {"slow": "forward"}),
    (pf.Radial, {}),
    (pf.Sylvester, {"slow": "forward"}),
]

# A Jacobian at every step of the inverse: more layers would be slow, and 64 features are.
ONE_LAYER: dict[str, Any] = {"transforms": 1, "hidden_features": (8, 8), "slow": "forward"}

# A root for every feature, also under every derivative: 64 would be slow.
BLOCK: dict[str, Any] = {
    "transforms": 2,
    "hidden_features": (4,),
    "slow": "forward",
    "identity": False,
}

FLOWS = [
    *(flow(recipe, n, **options) for recipe, options in LOW_RANK for n in (1, 2, 5, 64)),
    *(flow(recipe, n, 3, **options) for recipe, options in LOW_RANK for n in (1, 4)),
    *(flow(pf.ResidualFlow, n, **ONE_LAYER) for n in (1, 2, 5)),
    *(flow(pf.ResidualFlow, n, 3, **ONE_LAYER) for n in (1, 4)),
    *(flow(pf.BNAF, n, **BLOCK) for n in (1, 2, 5)),
    *(flow(pf.BNAF, n, 3, **BLOCK) for n in (1, 4)),
    flow(pf.Planar, 2, note="mixed", mixing="lu", act_norm=True, slow="forward"),
]

CASES: list[Case] = [*TRANSFORMS, *LAYERS, *FLOWS]
ELSEWHERE = dict.fromkeys(
    (
        "nn.BlockLinear",
        "nn.BlockNetwork",
        "nn.LipschitzMLP",
        "nn.contracted",
        "numerics.batched_vjp",
        "numerics.contraction_root",
        "numerics.value_and_jacobian",
    ),
    "tests/test_residual.py",
)
