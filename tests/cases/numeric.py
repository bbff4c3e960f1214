"""Univariate maps whose inverse is a root, and their flows."""

from __future__ import annotations

from typing import Any

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, flow, held, layer

MIXTURE = pft.MixtureLogistic(components=3)
SIGMOIDAL = pft.DeepSigmoidal(units=3, depth=2)
SQUARES = pft.SumOfSquares(degree=3, bound=3.0)
BERNSTEIN = pft.Bernstein(degree=8, bound=3.0)
MONOTONIC = pft.UnconstrainedMonotonic(units=3, bound=3.0)


def recipe(name: str, univariate: Any, *also: str, **traits: Any) -> Case:
    """A recipe of scalar maps, all raw parameters in one tensor."""
    covers = tuple(f"transforms.{n}" for n in (type(univariate).__name__, *also))
    return held(name, univariate, (univariate.count, 3), covers=covers, **traits)


TRANSFORMS = [
    recipe("mixture-logistic", MIXTURE, "MixtureLogisticTransform", identity=False),
    recipe("mixture-logistic-1", pft.MixtureLogistic(1)),
    recipe("deep-sigmoidal", SIGMOIDAL, identity=False),
    recipe("sum-of-squares", SQUARES, "SumOfSquaresTransform", bound=3.0),
    recipe("sum-of-squares-1", pft.SumOfSquares(1, 2.0), bound=2.0),
    recipe("bernstein", BERNSTEIN, "BernsteinTransform", bound=3.0),
    recipe("bernstein-3", pft.Bernstein(3, 2.0), bound=2.0),
    recipe("monotonic", MONOTONIC, "UnconstrainedMonotonicTransform", bound=3.0),
]

LAYERS = [
    layer(
        "elementwise-mixture-context",
        pfl.ElementwiseLayer,
        2,
        2,
        univariate=MIXTURE,
        **SMALL,
        identity=False,
    ),
    layer(
        "autoregressive-squares-forward",
        pfl.AutoregressiveLayer,
        3,
        univariate=SQUARES,
        one_pass="forward",
        **SMALL,
        slow="inverse",
        bound=3.0,
    ),
    layer("gaussianization", pfl.MarginalGaussianization, components=3, identity=False),
    layer(
        "gaussianization-context",
        pfl.MarginalGaussianization,
        2,
        2,
        components=3,
        **SMALL,
        identity=False,
    ),
    layer("coupling-bernstein", pfl.CouplingLayer, 3, univariate=BERNSTEIN, **SMALL, bound=3.0),
]


RECIPES: list[tuple[type, dict[str, Any]]] = [
    (pf.NAF, {"units": 4}),
    (pf.UNAF, {"units": 3}),
    (pf.SOSPF, {"degree": 3}),
    (pf.BPF, {"degree": 8}),
    (pf.FlowPP, {"components": 4}),
    (pf.GF, {"components": 4, "transforms": 3}),
]
AUTOREGRESSIVE = (pf.NAF, pf.UNAF, pf.SOSPF, pf.BPF)
ANCHORED = (pf.NAF, pf.FlowPP, pf.GF)


def root_flow(recipe: type, features: int, context: int = 0, **options: Any) -> Case:
    """A recipe of this family, with the traits that follow from its options."""
    options = {**dict(RECIPES)[recipe], **options}
    sequential = recipe in AUTOREGRESSIVE and options.get("autoregressive", True)
    return flow(
        recipe,
        features,
        context,
        slow="forward" if sequential else None,
        identity=recipe not in ANCHORED,
        **options,
    )


FLOWS = [
    *(root_flow(r, n) for r, _ in RECIPES for n in (1, 2, 5)),
    # As couplings where they can be: 64 roots one after the other take long, and NAF finds them.
    *(root_flow(r, 64) for r in (pf.NAF, pf.FlowPP, pf.GF)),
    *(root_flow(r, 64, autoregressive=False) for r in (pf.UNAF, pf.SOSPF, pf.BPF)),
    *(root_flow(r, n, 3) for r, _ in RECIPES for n in (1, 4)),
    *(root_flow(r, 3, note="coupling", autoregressive=False) for r in AUTOREGRESSIVE),
    root_flow(pf.NAF, 2, note="deep", depth=2),
    root_flow(pf.GF, 3, note="lu", mixing="lu"),
]

CASES: list[Case] = [*TRANSFORMS, *LAYERS, *FLOWS]
ELSEWHERE: dict[str, str] = {
    "numerics.gauss_legendre": "tests/test_numeric.py",
    "numerics.legendre_rule": "tests/test_numeric.py",
}
