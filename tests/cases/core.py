"""Affine and rational-quadratic couplings and autoregressions, and what they are made of."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn
from torch.distributions import transforms as torch_transforms

import pyroflows as pf
from pyroflows import distributions as pfd
from pyroflows import flows as pff
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, Stack, based, flow, held, layer


class Coupled(pfl.Layer):
    """A coupling by hand, with a conditioner that is a plain function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, 2))

    def forward(self, context: Tensor | None = None) -> pft.CouplingTransform:
        def conditioner(x: Tensor) -> Tensor:
            return torch.einsum("...i,kio->k...o", x.sin(), self.weight[:, :2])

        order = torch.arange(4, device=self.weight.device)
        return pft.CouplingTransform(pft.Affine(), conditioner, order, order, 2)


def ordered(order: Tensor) -> pft.PermutationTransform:
    """A permutation beside a parameter that it does not need."""
    return pft.PermutationTransform(torch.tensor([2, 0, 1], device=order.device))


def foreign(shift: Tensor) -> pft.ComposedTransform:
    """Torch's and Pyro's own transforms beside ours, with events of two kinds."""
    return pft.ComposedTransform(
        [
            torch_transforms.AffineTransform(0.5, 2.0),
            pft.AffineTransform(shift, shift),
            pyro_transforms.LeakyReLUTransform(),
            torch_transforms.IndependentTransform(pft.AffineTransform(shift, -shift), 1),
            pft.DiagonalAffineTransform(shift, shift),
        ]
    )


class Cubic(pft.IncreasingTransform):
    """Without a closed-form inverse."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight**2
        return x + weight * x**3, (1 + 3 * weight * x**2).log()


class Owned(nn.Module):
    """The transform of a flow as a Pyro ``TransformModule``, without a context."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = pff.FlowTransform([pfl.CouplingLayer(3), pfl.LULinear(3)], (3,))

    def forward(self, context: Tensor | None = None) -> pff.FlowTransform:
        return self.transform


SPLINE = pft.RationalQuadratic(bins=4, bound=3.0)


def spline_in_hand(params: Tensor) -> Any:
    return pft.RationalQuadraticTransform(params, bound=3.0)


def steep(raw: Tensor) -> pft.Transform:
    return SPLINE(30 * raw)


TRANSFORMS = [
    held("shift", pft.ShiftTransform, (3,)),
    held("affine", pft.AffineTransform, (3,), (3,)),
    held("diagonal-affine", pft.DiagonalAffineTransform, (3,), (3,)),
    held(
        "rational-quadratic",
        spline_in_hand,
        (11, 3),
        covers=("transforms.RationalQuadraticTransform", "numerics.rational_quadratic_spline"),
        bound=3.0,
    ),
    held("increasing", Cubic, (3,), covers=("transforms.IncreasingTransform",)),
    held("lu", pft.LUTransform, (3, 3), (3,), (3,)),
    held("permutation", ordered, (3,), covers=("transforms.PermutationTransform",), identity=False),
    held(
        "foreign",
        foreign,
        (3,),
        covers=(
            "transforms.ComposedTransform",
            "transforms.call_and_ladj",
            "transforms.inverse_and_ladj",
        ),
        identity=False,
    ),
    Case(
        "inverse",
        "transform",
        lambda: Stack(pfl.AutoregressiveLayer(3, **SMALL), pfl.LULinear(3), inverted=True),
        ("transforms.InverseTransform", "transforms.Transform"),
        (3,),
        slow="inverse",
    ),
    Case("coupling", "transform", Coupled, ("transforms.CouplingTransform", "layers.Layer"), (4,)),
    Case(
        "autoregressive",
        "transform",
        lambda: pfl.AutoregressiveLayer(3, one_pass="forward", **SMALL),
        ("transforms.AutoregressiveTransform",),
        (3,),
        slow="inverse",
    ),
    Case("flow-transform", "transform", Owned, ("flows.FlowTransform",), (3,)),
    # Recipes of scalar maps: all raw parameters in one tensor, parameters slowest.
    held("additive-recipe", pft.Additive(), (1, 3), covers=("transforms.Additive",)),
    held("affine-recipe", pft.Affine(), (2, 3), covers=("transforms.Affine",)),
    held(
        "spline-recipe",
        SPLINE,
        (SPLINE.count, 3),
        covers=("transforms.RationalQuadratic", "transforms.Univariate"),
        bound=3.0,
    ),
    held(
        "spline-recipe-1-bin",
        pft.RationalQuadratic(1, 2.0),
        (2, 3),
        covers=("transforms.RationalQuadratic",),
        bound=2.0,
    ),
    # Slopes at their limits and bins near their least width.
    held(
        "spline-steep",
        steep,
        (SPLINE.count, 3),
        covers=("transforms.RationalQuadratic",),
        bound=3.0,
    ),
]


def moved_standardization() -> pfl.Standardization:
    standardization = pfl.Standardization((2, 2))
    standardization.set_(torch.tensor([1.0, -2.0]), torch.tensor([[0.1], [5.0]]))
    return standardization


LAYERS = [
    layer("permutation", pfl.Permutation, identity=False),
    layer("lu", pfl.LULinear, 5),
    layer("lu-1", pfl.LULinear, 1),
    layer("act-norm", pfl.ActNorm),
    Case("standardization", "layer", lambda: pfl.Standardization((2, 2)), (), (2, 2)),
    Case(
        "standardization-set",
        "layer",
        moved_standardization,
        ("layers.Standardization",),
        (2, 2),
        identity=False,
    ),
    layer("coupling", pfl.CouplingLayer, **SMALL),
    layer("coupling-1", pfl.CouplingLayer, 1, **SMALL),
    layer("coupling-1-context", pfl.CouplingLayer, 1, 2, **SMALL),
    layer(
        "coupling-spline-mask",
        pfl.CouplingLayer,
        4,
        2,
        mask=[True, False, False, True],
        univariate=SPLINE,
        **SMALL,
        bound=3.0,
    ),
    layer("coupling-linear", pfl.CouplingLayer, 3, 2, hidden_features=()),
    layer("coupling-all-mapped", pfl.CouplingLayer, 3, 2, mask=[True] * 3, **SMALL),
    layer("autoregressive", pfl.AutoregressiveLayer, **SMALL, slow="forward"),
    layer(
        "autoregressive-order",
        pfl.AutoregressiveLayer,
        4,
        2,
        one_pass="forward",
        order=[2, 0, 3, 1],
        univariate=SPLINE,
        **SMALL,
        slow="inverse",
        bound=3.0,
    ),
    layer(
        "autoregressive-narrow",
        pfl.AutoregressiveLayer,
        6,
        2,
        hidden_features=(3, 4, 4),
        slow="forward",
    ),
    layer(
        "autoregressive-linear",
        pfl.AutoregressiveLayer,
        4,
        2,
        hidden_features=(),
        slow="forward",
    ),
    layer(
        "autoregressive-tanh",
        pfl.AutoregressiveLayer,
        3,
        activation=nn.Tanh,
        hidden_features=(8, 16),
        slow="forward",
    ),
]


RECIPES: list[tuple[type, dict[str, Any]]] = [
    (pf.NICE, {}),
    (pf.RealNVP, {}),
    (pf.MAF, {}),
    (pf.IAF, {}),
    (pf.NSF, {}),
    (pf.NSF, {"autoregressive": True, "note": "autoregressive"}),
]


def core_flow(recipe: type, features: int, context: int = 0, **options: Any) -> Case:
    """A recipe of this family, with the traits that follow from its options."""
    sequential = recipe is pf.MAF or options.get("autoregressive", False)
    return flow(
        recipe,
        features,
        context,
        slow="forward" if sequential else "inverse" if recipe is pf.IAF else None,
        **options,
    )


FLOWS = [
    *(core_flow(r, n, **options) for r, options in RECIPES for n in (1, 2, 5, 64)),
    *(core_flow(r, n, 3, **options) for r, options in RECIPES for n in (1, 4)),
    core_flow(pf.NSF, 2, note="unmixed", mixing=None),
    core_flow(pf.MAF, 2, note="unmixed", mixing=None),
    core_flow(pf.NICE, 2, note="mixed", mixing="lu"),
    core_flow(pf.RealNVP, 2, note="act-norm", act_norm=True),
    core_flow(pf.MAF, 3, 2, note="act-norm", act_norm=True),
    # Not in two dimensions: far out, heavy tails are ridges that no grid resolves.
    core_flow(pf.NSF, 1, note="student-t", base=lambda: pfd.StudentT(1)),
    core_flow(pf.NSF, 3, note="student-t", base=lambda: pfd.StudentT(3)),
    core_flow(pf.MAF, 1, note="student-t", base=lambda: pfd.StudentT(1, df=20.0)),
    core_flow(pf.IAF, 2, 3, note="diagonal", base=lambda: pfd.DiagonalNormal(2)),
    core_flow(pf.NSF, 2, note="few-bins", bins=2, bound=1.5),
    core_flow(pf.NSF, 3, note="one-layer", transforms=1),
    core_flow(pf.MAF, 5, note="narrow", hidden_features=(2,)),
    core_flow(pf.IAF, 5, note="linear", hidden_features=()),
    based("standard-normal", lambda: pfd.StandardNormal(2), (2,)),
    based("diagonal-normal", lambda: pfd.DiagonalNormal(1), (1,)),
    based("student-t", lambda: pfd.StudentT(2), (2,)),
    based("student-t-fixed", lambda: pfd.StudentT(1, df=8.0, learn_df=False), (1,)),
    based("matrix-event", lambda: pfd.DiagonalNormal((2, 2)), (2, 2)),
    Case(
        "hand-made-flow",
        "flow",
        lambda: pf.Flow([pfl.LULinear(2), pfl.CouplingLayer(2, 3, **SMALL)], 2, 3),
        ("flows.Flow", "pyroflows.Flow"),
        (2,),
        3,
    ),
]

CASES = [*TRANSFORMS, *LAYERS, *FLOWS]

# Public names without a case, and the file that tests them instead.
ELSEWHERE = {
    # Networks are not invertible maps: what must hold for them is their wiring.
    **dict.fromkeys(
        (
            "nn.Conditioner",
            "nn.MaskedLinear",
            "nn.MaskedResidualMLP",
            "nn.RecordedModule",
            "nn.ResidualMLP",
            "nn.ZeroStart",
        ),
        "tests/test_nn.py",
    ),
    **dict.fromkeys(
        tuple(
            f"nn.{name}"
            for name in ("AttentionPooling", "ConvEncoder", "DeepSet", "GRUEncoder", "ImageEncoder")
        ),
        "tests/test_encoders.py",
    ),
    # Functions with a closed form to compare with.
    **dict.fromkeys(
        (
            "numerics.autoregressive_mask",
            "numerics.binary_code",
            "numerics.bounded_exp",
            "numerics.forked_rng",
            "numerics.hidden_degrees",
            "numerics.log_abs_det",
            "numerics.soft_clamp",
            "numerics.sum_rightmost",
        ),
        "tests/test_numerics.py",
    ),
    **dict.fromkeys(
        ("numerics.has_values", "numerics.increasing_root", "numerics.straight_tails"),
        "tests/test_roots.py",
    ),
    **dict.fromkeys(
        (
            "flows.Candidate",
            "flows.FlowInfo",
            "flows.get_flow",
            "flows.list_flows",
            "flows.recommend",
        ),
        "tests/test_selection.py",
    ),
}
