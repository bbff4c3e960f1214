"""Scalar maps with inverses in closed form, the layer of them, flows on angles."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, flow, held, layer

ANGLES = constraints.independent(constraints.interval(-math.pi, math.pi), 1)
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

# The inverses of these grow exponentially: farther out they leave float32, as they must.
EXPONENTIAL = {"magnitudes": (10.0,)}


def fixed(transform: Any, note: str = "", inverted: bool = False, **traits: Any) -> Case:
    """A map without parameters, as a layer."""
    name = type(transform).__name__
    build = partial(pfl.Inverse if inverted else pfl.Bijection, transform)
    return Case(
        name + note, "transform", build, (f"transforms.{name}",), (3,), identity=False, **traits
    )


TRANSFORMS += [
    held(
        "circular",
        pft.CircularRationalQuadraticTransform,
        *((3,), (12, 3)),
        support=ANGLES,
        base_support=ANGLES,
    ),
    held(
        "circular-recipe",
        pft.CircularRationalQuadratic(4),
        (13, 3),
        covers=("transforms.CircularRationalQuadratic",),
        support=ANGLES,
        base_support=ANGLES,
    ),
    held(
        "circular-recipe-1-bin",
        pft.CircularRationalQuadratic(1),
        (4, 3),
        covers=("transforms.CircularRationalQuadratic",),
        support=ANGLES,
        base_support=ANGLES,
    ),
    # Autodiff's own derivative of tanh loses digits where it is flat.
    fixed(pft.TanhTransform(), support=constraints.interval(-1.0, 1.0), tolerance=1e-6),
    # Positive data far out are made by an exponential, which leaves float32.
    fixed(pft.SoftplusTransform(), support=constraints.positive, magnitudes=(10.0,)),
    fixed(pft.LeakyReLUTransform(0.1)),
    fixed(pft.SignedPowerTransform(2.0)),
    fixed(pft.SignedPowerTransform(0.5), "-root"),
    fixed(pft.LogisticTransform()),
    fixed(pft.AsinhTransform(), **EXPONENTIAL),
    fixed(pft.AsinhTransform(), "-inverse", inverted=True),
    fixed(pft.LOFTTransform(0.5), bound=0.5, **EXPONENTIAL),
    fixed(pft.LOFTTransform(0.5), "-inverse", inverted=True, bound=0.5),
    held(
        "heavy-tails",
        pft.HeavyTails(),
        (2, 3),
        covers=("transforms.HeavyTails", "transforms.HeavyTailTransform"),
        identity=False,
    ),
]

LAYERS = [
    layer(
        "elementwise-circular-context",
        pfl.ElementwiseLayer,
        3,
        2,
        univariate=pft.CircularRationalQuadratic(4),
        **SMALL,
        support=ANGLES,
        base_support=ANGLES,
    ),
    layer(
        "coupling-circular",
        pfl.CouplingLayer,
        univariate=pft.CircularRationalQuadratic(4),
        periodic=True,
        **SMALL,
        support=ANGLES,
        base_support=ANGLES,
    ),
    layer(
        "heavy-tails-context",
        pfl.ElementwiseLayer,
        3,
        2,
        univariate=pft.HeavyTails(),
        **SMALL,
        identity=False,
    ),
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

TORUS = {"support": ANGLES, "base_support": ANGLES}

FLOWS = [
    *(flow(pf.NCSF, n, **TORUS) for n in (1, 2, 5, 64)),
    *(flow(pf.NCSF, n, 3, **TORUS) for n in (1, 4)),
    *(flow(pf.NSF, n, note="linear", spline="linear") for n in (1, 2, 5, 64)),
    *(flow(pf.NSF, n, 3, note="linear", spline="linear") for n in (1, 4)),
    flow(
        pf.NSF,
        3,
        note="linear-autoregressive",
        spline="linear",
        autoregressive=True,
        slow="forward",
    ),
]

CASES: list[Case] = [*TRANSFORMS, *LAYERS, *FLOWS]
ELSEWHERE: dict[str, str] = {"nn.PeriodicMLP": "tests/test_univariate.py"}
