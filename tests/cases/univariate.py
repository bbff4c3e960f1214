"""Scalar maps with inverses in closed form, the layer of them, flows on angles."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, held, layer

QUADRATIC = pft.RationalQuadratic(bins=4, bound=3.0)


def elementwise(params: Tensor) -> Any:
    return pft.ElementwiseTransform(pft.Affine(), params)


TRANSFORMS = [
    held("elementwise", elementwise, (2, 3), covers=("transforms.ElementwiseTransform",)),
]

LAYERS = [
    layer("elementwise", pfl.ElementwiseLayer),
    layer("elementwise-1", pfl.ElementwiseLayer, 1),
    layer("elementwise-context", pfl.ElementwiseLayer, 3, 2, **SMALL),
    layer(
        "elementwise-spline-context",
        pfl.ElementwiseLayer,
        2,
        2,
        univariate=QUADRATIC,
        **SMALL,
        bound=3.0,
    ),
    layer("elementwise-linear-context", pfl.ElementwiseLayer, 2, 2, hidden_features=()),
]

CASES: list[Case] = [*TRANSFORMS, *LAYERS]
ELSEWHERE: dict[str, str] = {}
