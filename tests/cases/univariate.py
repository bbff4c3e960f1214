"""Scalar maps with inverses in closed form, the layer of them, flows on angles."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, held, layer

QUADRATIC = pft.RationalQuadratic(bins=4, bound=3.0)
LINEAR = pft.LinearRational(bins=4, bound=3.0)


def elementwise(params: Tensor) -> Any:
    return pft.ElementwiseTransform(pft.Affine(), params)


def linear_in_hand(widths: Tensor, heights: Tensor, slopes: Tensor, shares: Tensor) -> Any:
    return pft.LinearRationalTransform(widths, heights, slopes, shares, bound=3.0)


def steep(raw: Tensor) -> Any:
    return LINEAR(30 * raw)


TRANSFORMS = [
    held("elementwise", elementwise, (2, 3), covers=("transforms.ElementwiseTransform",)),
    held(
        "linear-rational",
        linear_in_hand,
        *((4, 3), (4, 3), (3, 3), (4, 3)),
        covers=("transforms.LinearRationalTransform", "numerics.linear_rational_spline"),
        bound=3.0,
    ),
    held(
        "linear-rational-recipe",
        LINEAR,
        (LINEAR.count, 3),
        covers=("transforms.LinearRational",),
        bound=3.0,
    ),
    held(
        "linear-rational-recipe-1-bin",
        pft.LinearRational(1, 2.0),
        (3, 3),
        covers=("transforms.LinearRational",),
        bound=2.0,
    ),
    # Slopes at their limits, bins near their least width, middle knots near the ends.
    held(
        "linear-rational-steep",
        steep,
        (LINEAR.count, 3),
        covers=("transforms.LinearRational",),
        bound=3.0,
    ),
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
