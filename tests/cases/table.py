"""What a row of the table of cases is, and short ways to write one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions import transforms as torch_transforms

import pyroflows as pf
from pyroflows import distributions as pfd
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
        Half-width of a spline's box: knots lie within, a straight line beyond.
    support
        Of the data, where that is not the whole space.
    base_support
        Of the base, where that is not the whole space: the density need not vanish at its ends.
    magnitudes
        How far out its tails are tried.
    tolerance
        Of round trips and log-determinants; more than rounding only where a direction stops at a
        stated tolerance of its own.
    vmap
        Whether ``torch.func.vmap`` can go through it.
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
    support: Any = None
    base_support: Any = None
    magnitudes: tuple[float, ...] = (10.0, 100.0, 1e4)
    tolerance: float = 1e-8
    vmap: bool = True

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
        """Base values ``(count, *event)``, see `numbers`, in the support of the base."""
        x = self.numbers(count, dtype, device)
        return x if self.base_support is None else biject_to(self.base_support)(x)

    def numbers(
        self, count: int = 6, dtype: torch.dtype = torch.float64, device: Any = "cpu"
    ) -> Tensor:
        """Near zero, farther out, then edges of a box and what lies beyond."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(count, *self.event_shape, generator=generator, dtype=torch.float64)
        x[1::2] *= 3
        if self.bound is not None and count > 4:
            x[0] = 0.0
            x[1] = self.bound
            x[2] = -self.bound
            x[3] = x[3].sign() * (self.bound + 1)
        return x.to(device, dtype)

    def data(
        self, count: int = 6, dtype: torch.dtype = torch.float64, device: Any = "cpu"
    ) -> Tensor:
        """As `numbers`, in the support of the data."""
        return self.supported(self.numbers(count, dtype, device))

    def generic(self, count: int = 3) -> Tensor:
        """Data in float64, away from knots."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(count, *self.event_shape, generator=generator, dtype=torch.float64)
        return self.supported(x)

    def supported(self, x: Tensor) -> Tensor:
        """Unconstrained values as data."""
        return x if self.support is None else biject_to(self.support)(x)

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


SMALL = {"hidden_features": (16, 16)}


def held(name: str, make: Callable[..., Any], *shapes: Sequence[int], **traits: Any) -> Case:
    covers = traits.pop("covers", None) or (f"transforms.{make.__name__}",)
    return Case(name, "transform", partial(Held, make, *shapes), covers, (3,), **traits)


# Traits of a case that the short forms take among a constructor's options.
TRAITS = tuple(f.name for f in fields(Case) if f.default is not MISSING and f.name != "context")


def layer(
    name: str, make: type, features: int = 3, context: int = 0, *args: Any, **options: Any
) -> Case:
    """A layer: traits are taken from the options, the rest goes to the constructor."""
    traits = {k: options.pop(k) for k in TRAITS if k in options}
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


def flow(recipe: type, features: int, context: int = 0, note: str = "", **options: Any) -> Case:
    """A recipe with small networks; a name is made of what differs.

    Traits are taken from the options. A base belongs to one flow: give a function that makes it.
    """
    traits = {k: options.pop(k) for k in TRAITS if k in options}
    base = options.pop("base", None)
    parameters = inspect.signature(recipe).parameters
    if "bound" in parameters:
        traits.setdefault("bound", parameters["bound"].default)
        options["bound"] = traits["bound"]
    if "transforms" in parameters:
        options.setdefault("transforms", 1 if features == 64 else 3)
    if "hidden_features" in parameters:
        options.setdefault("hidden_features", (16, 16))
    parts = [recipe.__name__, str(features), f"context{context}" if context else "", note]
    return Case(
        "-".join(filter(None, parts)),
        "flow",
        lambda: recipe(features, context, base=base() if base else None, **options),
        (f"flows.{recipe.__name__}", f"pyroflows.{recipe.__name__}"),
        (features,),
        context,
        **traits,
    )


def based(name: str, base: Callable[[], pfd.Base], shape: tuple[int, ...]) -> Case:
    """A base by itself, as a flow without layers."""
    covers = ("distributions.Base", f"distributions.{type(base()).__name__}")
    covers += ("flows.Flow", "pyroflows.Flow", "distributions.FlowDistribution")
    return Case(name, "flow", lambda: pf.Flow([], shape, base=base()), covers, shape)
