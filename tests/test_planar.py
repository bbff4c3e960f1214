"""Planar, radial and Sylvester maps: constraints, known values, their directions, peers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor
from torch.nn import functional

import pyroflows as pf
from pyroflows.layers import PlanarLayer, RadialLayer, SylvesterLayer
from pyroflows.testing import check_close, jacobian, redraw_
from pyroflows.transforms import (
    ConditionalTransform,
    DiagonalAffineTransform,
    PlanarTransform,
    RadialTransform,
    SylvesterTransform,
    Transform,
)
from pyroflows.transforms.planar import CONTRACTION, orthonormal_columns, shortened

RECIPES = [pf.Planar, pf.Radial, pf.Sylvester]
LAYERS = [PlanarLayer, RadialLayer, SylvesterLayer]
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def sylvester(features: int, rank: int, scale: float = 1.0) -> SylvesterTransform:
    return SylvesterTransform(
        scale * randn(rank, features),
        scale * randn(rank, rank),
        scale * randn(rank, rank),
        randn(rank),
    )


# --- constraints ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_never_reaches_the_limit(dtype: torch.dtype) -> None:
    p = torch.cat([torch.linspace(-5, 5, 101), torch.tensor([-1e12, -1e4, 1e4])]).to(dtype)
    factor, product = shortened(p)
    assert (factor > 0).all()
    assert (product >= -CONTRACTION).all()
    assert (1 + product > 1e-3).all()
    check_close("product", product, factor * p, 1e-5 * (1 + p.abs()))
    check_close("at zero", shortened(p[50])[0], torch.ones_like(p[50]), 1e-6)


def test_gradients_are_those_of_the_constrained_product() -> None:
    p = torch.tensor([-1e3, -2.0, -CONTRACTION, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shortened, p)
    assert torch.autograd.gradgradcheck(shortened, p)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("kind", ["planar", "radial", "sylvester"])
def test_invertible_whatever_the_parameters(kind: str, scale: float) -> None:
    """Also where the raw parameters contract as hard as they can."""
    for seed in range(20):
        torch.manual_seed(seed)
        weight = scale * randn(3)
        maps: dict[str, Transform] = {
            "planar": PlanarTransform(weight, -weight, randn(())),
            "radial": RadialTransform(randn(3), randn(()), -scale * randn(()).abs()),
            "sylvester": sylvester(3, 2, scale),
        }
        x = randn(50, 3)
        y, ladj = maps[kind].call_and_ladj(x)
        # No slope is below 0.002, in any of three dimensions.
        assert ladj.isfinite().all()
        assert (ladj > 3 * torch.tensor(0.0019).log()).all()
        back, back_ladj = maps[kind].inverse_and_ladj(y)
        check_close("round trip", back, x, 1e-8 * (1 + y.abs() + scale))
        check_close("ladj", back_ladj, -ladj, 1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1.0, 1e6])
def test_columns_are_orthonormal(scale: float) -> None:
    for rank, features in ((1, 1), (2, 5), (8, 8), (8, 64)):
        columns = orthonormal_columns(scale * randn(3, rank, features))
        expected = torch.eye(rank, dtype=torch.float64).expand(3, -1, -1)
        check_close("Q'Q", columns.mT @ columns, expected, 1e-12)


def test_columns_are_those_of_the_reflections() -> None:
    vectors = randn(3, 5)
    vectors.diagonal().fill_(1.0)
    product = torch.eye(5, dtype=torch.float64)
    for v in vectors:
        product = product @ (torch.eye(5) - 2 * torch.outer(v, v) / v.dot(v))
    # The diagonal is not read.
    raw = vectors + 7 * torch.eye(3, 5)
    check_close("Q", orthonormal_columns(raw), -product[:, :3], 1e-12)


# --- known values -----------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "rank"), [(1, 1), (4, 2), (4, 4), (64, 8)])
def test_sylvester_determinant_of_the_full_matrix(features: int, rank: int) -> None:
    """det(I + Q R D S Q'), where D are the slopes of tanh; S and R alone would not do."""
    transform = sylvester(features, rank)
    x = randn(10, features)
    frame = orthonormal_columns(transform.vectors)
    inner, outer = transform.inner.triu(), transform.outer.triu()
    limited = shortened(inner.diagonal() * outer.diagonal())[0]
    outer = outer.triu(1) + (outer.diagonal() * limited).diag()
    v = x @ (inner @ frame.mT).mT + transform.bias
    slopes = (1 - v.tanh() ** 2).diag_embed()
    matrix = torch.eye(features, dtype=torch.float64) + frame @ outer @ slopes @ inner @ frame.mT
    y, ladj = transform.call_and_ladj(x)
    check_close("value", y, x + v.tanh() @ (frame @ outer).mT, 1e-12)
    check_close("log-determinant", ladj, matrix.slogdet()[1], 1e-9)
    check_close("autodiff", matrix, jacobian(transform, x, 1), 1e-9)


def test_sylvester_of_rank_one_is_planar() -> None:
    transform = sylvester(5, 1)
    frame = orthonormal_columns(transform.vectors)[:, 0]
    planar = PlanarTransform(
        transform.inner[0, 0] * frame, transform.outer[0, 0] * frame, transform.bias[0]
    )
    x = randn(10, 5)
    for got, expected in zip(transform.call_and_ladj(x), planar.call_and_ladj(x), strict=True):
        check_close("rank one", got, expected, 1e-12)


def test_radial_known_value() -> None:
    """alpha = 1 and beta = 1 at the distance 1: a growth by a half."""
    strength = CONTRACTION * torch.tensor(1 / CONTRACTION).log1p().sinh()
    transform = RadialTransform(torch.zeros(2), torch.tensor(0.0), strength)
    y, ladj = transform.call_and_ladj(torch.tensor([1.0, 0.0]))
    check_close("value", y, torch.tensor([1.5, 0.0]), 1e-6)
    check_close("log-determinant", ladj, torch.tensor(1.5 * 1.25).log(), 1e-6)


def test_radial_at_its_centre() -> None:
    """All derivatives are finite, although the distance has none there."""
    center = torch.zeros(3, dtype=torch.float64)
    transform = RadialTransform(center, randn(()), randn(()))
    for direction in (transform.call_and_ladj, transform.inverse_and_ladj):
        x = center.clone().requires_grad_()
        y, ladj = direction(x)
        (slope,) = torch.autograd.grad(y.sum() + ladj, x, create_graph=True)
        assert torch.equal(y, center)
        assert slope.isfinite().all()
        assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


# --- peers ------------------------------------------------------------------------------------


def test_planar_is_pyros_forwards() -> None:
    """Pyro's own cannot score values that it did not draw."""
    peer = pyro_transforms.Planar(4)
    weight, moved = peer.w.detach(), peer.u_hat(peer.u, peer.w).detach()
    product = weight.dot(moved)
    factor = 2 * (product / CONTRACTION).log1p().sigmoid()
    ours = PlanarTransform(weight, moved / factor, peer.bias.detach()[0])
    x = torch.randn(50, 4)
    y = peer(x)
    check_close("value", ours(x), y.detach(), 1e-5)
    check_close("ladj", ours.call_and_ladj(x)[1], peer.log_abs_det_jacobian(x, y).detach(), 1e-5)


def test_radial_is_pyros_forwards() -> None:
    peer = pyro_transforms.Radial(4)
    alpha = functional.softplus(peer.alpha_prime).detach()[0]
    strength = (functional.softplus(peer.beta_prime).detach()[0] - alpha) / alpha
    raw = CONTRACTION * (strength / CONTRACTION).log1p().sinh()
    # The soft bound of the logarithm, undone.
    bound = 10 / torch.pi
    log_radius = bound * (alpha.log() / bound).tan()
    ours = RadialTransform(peer.x0.detach(), log_radius, raw)
    x = torch.randn(50, 4)
    y = peer(x)
    check_close("value", ours(x), y.detach(), 1e-5)
    check_close("ladj", ours.call_and_ladj(x)[1], peer.log_abs_det_jacobian(x, y).detach(), 1e-5)


@every_recipe
@pytest.mark.parametrize("one_pass", ["forward", "inverse"])
def test_scores_values_that_it_did_not_draw(recipe: Any, one_pass: str) -> None:
    """And the densities of draws are those that came with them."""
    torch.manual_seed(0)
    flow = recipe(3, transforms=4, one_pass=one_pass).double()
    redraw_(flow, 1.0)
    draw, log_prob = flow().rsample_and_log_prob((20,))
    strange = draw.detach().clone()
    check_close("density", flow().log_prob(strange), log_prob, 1e-8)
    assert flow().log_prob(randn(20, 3)).isfinite().all()


# --- layers and recipes -----------------------------------------------------------------------


@every_layer
def test_one_pass_exchanges_the_directions(layer: Any) -> None:
    forward, inverse = layer(3, one_pass="forward").double(), layer(3).double()
    redraw_(forward, 1.0)
    inverse.load_state_dict(forward.state_dict())
    x = randn(5, 3)
    for got, expected in zip(
        forward().call_and_ladj(x), inverse().inverse_and_ladj(x), strict=True
    ):
        assert torch.equal(got, expected)


@every_layer
@pytest.mark.parametrize("hidden_features", [(8,), ()])
def test_amortised_layers_leave_the_identity(layer: Any, hidden_features: tuple[int, ...]) -> None:
    """From the start on, gradients reach the network: not all of what is multiplied is zero."""
    module = layer(3, 2, hidden_features=hidden_features)
    x, context = torch.randn(64, 3), torch.randn(64, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        z, ladj = module(context).inverse_and_ladj(0.5 * x + context[:, :1])
        losses.append((z.square().sum(-1) / 2 - ladj).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is not None and (p.grad != 0).any() for p in module.parameters())
    batches = module(context.unsqueeze(1))(x[:7])
    assert batches.shape == (64, 7, 3)


@every_layer
def test_constant_parameters_keep_the_context(layer: Any) -> None:
    module = layer(3, 2, hidden_features=(8,)).double()
    redraw_(module, 1.0)
    context = randn(5, 2).requires_grad_()
    constant = module(context).detach_params(keep_context=True)
    constant.inverse_and_ladj(randn(5, 3))[1].sum().backward()
    assert (context.grad != 0).any()  # type: ignore[union-attr]
    assert all(p.grad is None for p in module.parameters())


def test_conditional_transform_builds_from_both() -> None:
    build = partial(DiagonalAffineTransform, torch.zeros(2))
    learned = ConditionalTransform(build, torch.ones(2))
    given = ConditionalTransform(build, lambda x: torch.ones(1, *x.shape[:-1], 2))
    x = torch.randn(3, 2)
    assert torch.equal(learned(x), given(x))
    assert not learned.sequential_inverse
    assert ConditionalTransform(build, x, sequential_inverse=True).sequential_inverse


@every_recipe
@pytest.mark.parametrize("context", [0, 2])
def test_save_and_load(recipe: Any, context: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 2} if recipe is pf.Sylvester else {}
    flow = recipe(3, context, transforms=2, one_pass="forward", mixing="lu", **options)
    redraw_(flow, 1.0)
    pf.save(flow, tmp_path / "flow")
    again = pf.load(tmp_path / "flow")
    x = torch.randn(4, 3)
    c = torch.randn(4, context) if context else None
    assert type(again) is recipe
    assert torch.equal(again(c).log_prob(x), flow(c).log_prob(x))


@every_recipe
def test_learns(recipe: Any) -> None:
    """A normal of another location and scale, from the identity."""
    torch.manual_seed(0)
    flow = recipe(2, transforms=4)
    x = 0.4 * torch.randn(256, 2) + torch.tensor([1.0, -0.5])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        losses.append(-flow().log_prob(x).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.4


@every_layer
def test_wrong_direction(layer: Any) -> None:
    with pytest.raises(ValueError, match="one_pass: expected 'forward' or 'inverse', got 'both'"):
        layer(2, one_pass="both")


@every_layer
def test_wrong_sizes(layer: Any) -> None:
    with pytest.raises(ValueError, match="features=0"):
        layer(0)


@pytest.mark.parametrize("rank", [0, 4])
def test_wrong_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: expected 1 to 3 .* got {rank}"):
        pf.Sylvester(3, rank=rank)
