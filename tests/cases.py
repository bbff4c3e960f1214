"""The one table of cases: every public transform, recipe, layer, base and flow, with its traits.

Each case builds a module, ``module(context)`` -> a transform or a distribution, in float32.
A new public name needs a case here, or a line in `ELSEWHERE`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn
from torch.distributions import transforms as torch_transforms

import pyroflows as pf
from pyroflows import distributions as pfd
from pyroflows import flows as pff
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from pyroflows.testing import redraw_

Kind = Literal["transform", "layer", "flow"]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    name
        Shown in the test's id.
    build
        The module.
    covers
        Public names, as ``part.Name``.
    event_shape
        Of one value.
    context
        Size of the context, 0 for none.
    identity
        Whether it starts as the identity.
    slow
        The direction that goes feature by feature, if any.
    bound
        Half-width of a spline's box: knots lie within, the identity beyond.
    networks
        How many conditioners it has.
    """

    name: str
    kind: Kind
    build: Callable[[], nn.Module]
    covers: tuple[str, ...]
    event_shape: tuple[int, ...]
    context: int = 0
    identity: bool = True
    slow: Literal["forward", "inverse", None] = None
    bound: float | None = None
    networks: int = 0

    def make(
        self, scale: float | None = None, dtype: torch.dtype = torch.float64, device: Any = "cpu"
    ) -> nn.Module:
        """The module, re-drawn where a scale is given; the same numbers for all dtypes."""
        torch.manual_seed(0)
        module = self.build()
        if scale is not None:
            redraw_(module, scale)
        return module.to(device, dtype)

    def points(
        self, count: int = 6, dtype: torch.dtype = torch.float64, device: Any = "cpu"
    ) -> Tensor:
        """Values ``(count, *event)``: near zero, farther out, then edges and what lies beyond."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(count, *self.event_shape, generator=generator, dtype=torch.float64)
        x[1::2] *= 3
        if self.bound is not None and count > 4:
            x[0] = 0.0
            x[1] = self.bound
            x[2] = -self.bound
            x[3] = x[3].sign() * (self.bound + 1)
        return x.to(device, dtype)

    def generic(self, count: int = 3) -> Tensor:
        """Standard normal values in float64, away from knots."""
        generator = torch.Generator().manual_seed(2)
        return torch.randn(count, *self.event_shape, generator=generator, dtype=torch.float64)

    def contexts(
        self, count: int = 6, dtype: torch.dtype = torch.float64, device: Any = "cpu"
    ) -> Tensor | None:
        """Contexts ``(count, context)``, or None."""
        if not self.context:
            return None
        generator = torch.Generator().manual_seed(3)
        context = torch.randn(count, self.context, generator=generator, dtype=torch.float64)
        return context.to(device, dtype)


class Held(nn.Module):
    """A bare transform as a module: parameters of these shapes, zero at first, in hand."""

    def __init__(
        self, make: Callable[..., torch_transforms.Transform], *shapes: Sequence[int]
    ) -> None:
        super().__init__()
        self.make = make
        self.held = nn.ParameterList(torch.zeros(*shape) for shape in shapes)

    def forward(self, context: Tensor | None = None) -> torch_transforms.Transform:
        return self.make(*self.held)


class Stack(nn.Module):
    """Layers and bare transforms in a row."""

    def __init__(self, *parts: nn.Module, inverted: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.inverted = inverted

    def forward(self, context: Tensor | None = None) -> torch_transforms.Transform:
        composed = pft.ComposedTransform([part(context) for part in self.parts])
        return pft.InverseTransform(composed) if self.inverted else composed


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


class Owned(nn.Module):
    """The transform of a flow as a Pyro ``TransformModule``, without a context."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = pff.FlowTransform([pfl.CouplingLayer(3), pfl.LULinear(3)], (3,))

    def forward(self, context: Tensor | None = None) -> pff.FlowTransform:
        return self.transform


SPLINE = pft.RationalQuadratic(bins=4, bound=3.0)
SMALL = {"hidden_features": (16, 16)}


def spline_in_hand(widths: Tensor, heights: Tensor, slopes: Tensor) -> Any:
    return pft.RationalQuadraticTransform(widths, heights, slopes, bound=3.0)


def steep(raw: Tensor) -> pft.Transform:
    return SPLINE(30 * raw)


def held(name: str, make: Callable[..., Any], *shapes: Sequence[int], **traits: Any) -> Case:
    covers = (f"transforms.{make.__name__}",) if isinstance(make, type) else traits.pop("covers")
    return Case(name, "transform", partial(Held, make, *shapes), covers, (3,), **traits)


TRANSFORMS = [
    held("shift", pft.ShiftTransform, (3,)),
    held("affine", pft.AffineTransform, (3,), (3,)),
    held("diagonal-affine", pft.DiagonalAffineTransform, (3,), (3,)),
    held(
        "rational-quadratic",
        spline_in_hand,
        *((4, 3), (4, 3), (3, 3)),
        covers=("transforms.RationalQuadraticTransform", "numerics.rational_quadratic_spline"),
        bound=3.0,
    ),
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
        networks=1,
    ),
    Case("coupling", "transform", Coupled, ("transforms.CouplingTransform", "layers.Layer"), (4,)),
    Case(
        "autoregressive",
        "transform",
        lambda: pfl.AutoregressiveLayer(3, one_pass="forward", **SMALL),
        ("transforms.AutoregressiveTransform",),
        (3,),
        slow="inverse",
        networks=1,
    ),
    Case("flow-transform", "transform", Owned, ("flows.FlowTransform",), (3,), networks=1),
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


def layer(
    name: str, make: type, features: int = 3, context: int = 0, *args: Any, **options: Any
) -> Case:
    traits = {k: options.pop(k) for k in ("identity", "slow", "bound", "networks") if k in options}
    sizes = (features, context) if context else (features,)
    return Case(
        name,
        "layer",
        lambda: make(*sizes, *args, **options),
        (f"layers.{make.__name__}",),
        (features,),
        context,
        **traits,
    )


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
    layer("coupling", pfl.CouplingLayer, **SMALL, networks=1),
    layer("coupling-1", pfl.CouplingLayer, 1, **SMALL, networks=1),
    layer("coupling-1-context", pfl.CouplingLayer, 1, 2, **SMALL, networks=1),
    layer(
        "coupling-spline-mask",
        pfl.CouplingLayer,
        4,
        2,
        mask=[True, False, False, True],
        univariate=SPLINE,
        **SMALL,
        bound=3.0,
        networks=1,
    ),
    layer("coupling-linear", pfl.CouplingLayer, 3, 2, hidden_features=(), networks=1),
    layer("coupling-all-mapped", pfl.CouplingLayer, 3, 2, mask=[True] * 3, **SMALL, networks=1),
    layer("autoregressive", pfl.AutoregressiveLayer, **SMALL, slow="forward", networks=1),
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
        networks=1,
    ),
    layer(
        "autoregressive-narrow",
        pfl.AutoregressiveLayer,
        6,
        2,
        hidden_features=(3, 4, 4),
        slow="forward",
        networks=1,
    ),
    layer(
        "autoregressive-linear",
        pfl.AutoregressiveLayer,
        4,
        2,
        hidden_features=(),
        slow="forward",
        networks=1,
    ),
    layer(
        "autoregressive-tanh",
        pfl.AutoregressiveLayer,
        3,
        activation=nn.Tanh,
        hidden_features=(8, 16),
        slow="forward",
        networks=1,
    ),
]


def flow(recipe: type, features: int, context: int = 0, note: str = "", **options: Any) -> Case:
    """A recipe with small networks; a name is made of what differs."""
    base = options.pop("base", None)
    transforms = options.setdefault("transforms", 1 if features == 64 else 3)
    options.setdefault("hidden_features", (16, 16))
    sequential = recipe is pf.MAF or options.get("autoregressive", False)
    parts = [recipe.__name__, str(features), f"context{context}" if context else "", note]
    return Case(
        "-".join(filter(None, parts)),
        "flow",
        # A base belongs to one flow: each build makes its own.
        lambda: recipe(features, context, base=base() if base else None, **options),
        (f"flows.{recipe.__name__}", f"pyroflows.{recipe.__name__}"),
        (features,),
        context,
        slow="forward" if sequential else "inverse" if recipe is pf.IAF else None,
        bound=options.get("bound", 5.0) if recipe is pf.NSF else None,
        networks=transforms,
    )


RECIPES: list[tuple[type, dict[str, Any]]] = [
    (pf.NICE, {}),
    (pf.RealNVP, {}),
    (pf.MAF, {}),
    (pf.IAF, {}),
    (pf.NSF, {}),
    (pf.NSF, {"autoregressive": True, "note": "autoregressive"}),
]


def based(name: str, base: Callable[[], pfd.Base], shape: tuple[int, ...]) -> Case:
    """A base by itself, as a flow without layers."""
    covers = ("distributions.Base", f"distributions.{type(base()).__name__}")
    covers += ("flows.Flow", "pyroflows.Flow", "distributions.FlowDistribution")
    return Case(name, "flow", lambda: pf.Flow([], shape, base=base()), covers, shape)


FLOWS = [
    *(flow(r, n, **options) for r, options in RECIPES for n in (1, 2, 5, 64)),
    *(flow(r, n, 3, **options) for r, options in RECIPES for n in (1, 4)),
    flow(pf.NSF, 2, note="unmixed", mixing=None),
    flow(pf.MAF, 2, note="unmixed", mixing=None),
    flow(pf.NICE, 2, note="mixed", mixing="lu"),
    flow(pf.RealNVP, 2, note="act-norm", act_norm=True),
    flow(pf.MAF, 3, 2, note="act-norm", act_norm=True),
    # Not in two dimensions: far out, heavy tails are ridges that no grid resolves.
    flow(pf.NSF, 1, note="student-t", base=lambda: pfd.StudentT(1)),
    flow(pf.NSF, 3, note="student-t", base=lambda: pfd.StudentT(3)),
    flow(pf.MAF, 1, note="student-t", base=lambda: pfd.StudentT(1, df=20.0)),
    flow(pf.IAF, 2, 3, note="diagonal", base=lambda: pfd.DiagonalNormal(2)),
    flow(pf.NSF, 2, note="few-bins", bins=2, bound=1.5),
    flow(pf.NSF, 3, note="one-layer", transforms=1),
    flow(pf.MAF, 5, note="narrow", hidden_features=(2,)),
    flow(pf.IAF, 5, note="linear", hidden_features=()),
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
        networks=1,
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
        ),
        "tests/test_nn.py",
    ),
    # Functions with a closed form to compare with.
    **dict.fromkeys(
        (
            "numerics.autoregressive_mask",
            "numerics.binary_code",
            "numerics.bounded_exp",
            "numerics.forked_rng",
            "numerics.hidden_degrees",
            "numerics.soft_clamp",
            "numerics.sum_rightmost",
        ),
        "tests/test_numerics.py",
    ),
}
