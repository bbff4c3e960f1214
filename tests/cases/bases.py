"""Base distributions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import distributions as pfd
from tests.cases.table import SMALL, Case, based, flow


class Shifted(nn.Module):
    """From contexts to normals, learned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, context: Tensor | None) -> dist.Normal:
        loc = self.linear(context)
        return dist.Normal(loc, torch.ones_like(loc), validate_args=False).to_event(1)


def wide(context: Tensor | None) -> dist.Normal:
    """One distribution whatever the context, which only lends its dtype and device."""
    assert context is not None
    zero = context.new_zeros(2)
    return dist.Normal(zero, zero + 2, validate_args=False).to_event(1)


def normal() -> dist.Normal:
    """Pyro's own, without a wrapper."""
    return dist.Normal(torch.zeros(2), 2.0).to_event(1)


def nested() -> pfd.DistributionBase:
    """Tensors in a distribution in a distribution, and in a transform."""
    inner = dist.Normal(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])).to_event(1)
    shear = pyro_transforms.AffineTransform(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5]))
    return pfd.DistributionBase(dist.TransformedDistribution(inner, [shear]))


def placed() -> pfd.Modes:
    """Three modes, near enough that a grid sees them all."""
    modes = pfd.Modes(2)
    loc = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 1.5]])
    factor = torch.tensor([[0.5, 0.0], [0.2, 0.4]]).expand(3, -1, -1)
    modes.set_(torch.tensor([0.2, 0.3, 0.5]), loc, factor)
    return modes


def conditional(name: str, base: Callable[[], pfd.Base], note: str) -> Case:
    """A base that depends on a context of three, as a flow without layers."""
    covers = (f"distributions.{name}", "distributions.FlowDistribution")
    return Case(f"{name}-{note}", "flow", lambda: pf.Flow([], 2, 3, base=base()), covers, (2,), 3)


CASES: list[Case] = [
    *(based(f"full-normal-{n}", partial(pfd.FullNormal, n), (n,)) for n in (1, 2, 5)),
    based("laplace", lambda: pfd.Laplace(1), (1,)),
    based("laplace-matrix", lambda: pfd.Laplace((2, 2)), (2, 2)),
    # Three features: no grid sees the mass at the edges.
    Case(
        "uniform-box",
        "flow",
        lambda: pf.Flow([], 3, base=pfd.UniformBox(3, -1.0, torch.tensor([1.0, 2.0, 5.0]))),
        ("distributions.UniformBox",),
        (3,),
        support=constraints.independent(constraints.interval(-1.0, 1.0), 1),
    ),
    *(based(f"mixture-{n}", partial(pfd.Mixture, n, components=3), (n,)) for n in (1, 2, 5)),
    based("mixture-one", lambda: pfd.Mixture(2, components=1), (2,)),
    based("mixture-matrix", lambda: pfd.Mixture((2, 2), components=3), (2, 2)),
    conditional("Mixture", lambda: pfd.Mixture(2, 3, components=3, **SMALL), "context"),
    flow(pf.NSF, 2, note="mixture", base=lambda: pfd.Mixture(2, components=3)),
    flow(pf.NICE, 1, 3, note="mixture", base=lambda: pfd.Mixture(1, 3, components=2, **SMALL)),
    *(based(f"modes-{n}", partial(pfd.Modes, n), (n,)) for n in (1, 2)),
    based("modes-placed", placed, (2,)),
    based("given", nested, (3,)),
    conditional("DistributionBase", lambda: pfd.DistributionBase(Shifted(), 2), "learned"),
    conditional("DistributionBase", lambda: pfd.DistributionBase(wide, 2), "function"),
    flow(pf.MAF, 2, note="given", slow="forward", base=normal),
]
ELSEWHERE: dict[str, str] = {}
