"""Conditioner networks in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.nn import Conditioner, ResidualMLP
from pyroflows.numerics.precision import full_precision, reduced_precision
from pyroflows.testing.tools import redraw_
from pyroflows.training.losses import NegativeLogLikelihood, ReducedPrecision


def rows(count: int = 600) -> Tensor:
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return torch.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], -1)


def flow_of(recipe: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return recipe(2, transforms=2, hidden_features=(16, 16), **options)


def fit(flow: Any, **options: Any) -> Any:
    return pf.fit_mle(flow, rows(), **{"steps": 200, "seed": 0, "progress": False, **options})


def test_a_network_is_rounded_and_its_output_is_not() -> None:
    network = ResidualMLP(3, 2, 8)
    redraw_(network, 0.5)
    conditioner = Conditioner(network, 4, torch.randn(7, 2), reducible=True)
    x = torch.randn(7, 3)
    exact = conditioner(x).detach()
    with reduced_precision() as evaluations:
        rounded = conditioner(x)
        with full_precision():
            assert torch.equal(conditioner(x), exact)
    assert len(evaluations) == 1
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.05 * float(exact.abs().max()), rtol=0)
    assert torch.equal(conditioner(x), exact)


@pytest.mark.parametrize("recipe", [pf.NSF, pf.MAF, pf.RealNVP, pf.TransformerAR])
def test_the_density_stays_in_single_precision(recipe: Any) -> None:
    """Only parameters are rounded: the density is that of a flow nearby, and so is its gradient."""
    options = {"width": 16, "blocks": 1} if recipe is pf.TransformerAR else {}
    if options:
        torch.manual_seed(1)
        flow = recipe(2, transforms=2, **options)
    else:
        flow = flow_of(recipe)
    redraw_(flow, 0.2)
    loss = NegativeLogLikelihood(flow)
    values, gradients = [], []
    for module in (loss, ReducedPrecision(loss)):
        value = module(rows(), None)
        assert value.dtype == torch.float32
        found = torch.autograd.grad(value, [p for p in flow.parameters() if p.requires_grad])
        assert {g.dtype for g in found} == {torch.float32}
        values.append(value.detach())
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
    assert values[0] != values[1]
    torch.testing.assert_close(*values, rtol=0.02, atol=0.02)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


@pytest.mark.parametrize("recipe", [pf.NSF, pf.MAF])
def test_training_gets_as_far(recipe: Any) -> None:
    best = [fit(flow_of(recipe), precision=p).history.best[1] for p in (None, "bf16")]
    start = fit(flow_of(recipe), steps=1, lr=1e-9).history.best[1]
    assert best[0] < start - 0.3
    assert best[1] == pytest.approx(best[0], abs=0.03)


def test_what_bf16_is_not_for() -> None:
    with pytest.raises(ValueError, match="precision: expected 'bf16' or None, got 'fp16'"):
        fit(flow_of(pf.NSF), precision="fp16")
    with pytest.raises(ValueError, match="'bf16' is not compiled"):
        fit(flow_of(pf.NSF), precision="bf16", compile=True)
    for flow in (flow_of(pf.NSF).double(), flow_of(pf.IAF), pf.Planar(2)):
        with pytest.raises(ValueError, match="in float32 with conditioner networks"):
            fit(flow, precision="bf16", steps=2)
