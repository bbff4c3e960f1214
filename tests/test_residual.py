"""Residual and block autoregressive flows: bounds, fixed points, estimated log-determinants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.errors import InversionError
from pyroflows.layers import BlockLayer, ResidualLayer
from pyroflows.nn import BlockLinear, BlockNetwork, LipschitzMLP, contracted
from pyroflows.numerics import batched_vjp, contraction_root, fixed_point, value_and_jacobian
from pyroflows.testing import check_close, jacobian, redraw_
from pyroflows.transforms import ResidualTransform


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def contraction(weight: Tensor) -> Any:
    """Of a matrix of spectral norm below 2."""
    return lambda x: 0.45 * (x @ weight.mT).sin()


def orthogonal(features: int) -> Tensor:
    return torch.linalg.qr(randn(features, features)).Q


# --- fixed points -----------------------------------------------------------------------------


@pytest.mark.parametrize("newton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_roots_near_and_far(
    dtype: torch.dtype, newton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixed_point, "NEWTON_FEATURES", 64 if newton else 0)
    function = contraction(2 * orthogonal(5).to(dtype))
    x = (randn(100, 5) * torch.logspace(-3, 4, 100)[:, None]).to(dtype)
    found = contraction_root(function, x + function(x), lipschitz=0.9)
    check_close("root", found, x, 2000 * torch.finfo(dtype).eps * (1 + x.abs().amax(-1, True)))


@pytest.mark.parametrize("newton", [True, False])
def test_root_has_implicit_gradients(newton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_point, "NEWTON_FEATURES", 64 if newton else 0)
    y, weight = randn(3, 2).requires_grad_(), randn(2, 2).requires_grad_()

    def root(y: Tensor, weight: Tensor) -> Tensor:
        solved: Tensor = contraction_root(contraction(weight / weight.norm()), y, 0.45)
        return solved

    assert torch.autograd.gradcheck(root, (y, weight))
    assert torch.autograd.gradgradcheck(root, (y, weight))
    with torch.no_grad():
        rows = torch.func.vmap(lambda y: root(y, weight))(y)
        check_close("vmap", rows, root(y, weight), 1e-12)


def test_few_passes_suffice() -> None:
    """Newton's steps: the plain iteration takes hundreds at this Lipschitz constant."""
    calls = []
    weight = 2 * orthogonal(5)

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return 0.485 * (x @ weight.mT).sin()

    with torch.no_grad():
        contraction_root(function, 3 * randn(100, 5), lipschitz=0.97)
    assert len(calls) < 40


def test_a_nan_stays_in_its_event() -> None:
    y = randn(3, 2)
    y[1, 0] = torch.nan
    x = contraction_root(contraction(orthogonal(2)), y, 0.45)
    assert x.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("newton", [True, False])
def test_no_root_is_an_error(newton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a function that is no contraction, whatever was said."""
    monkeypatch.setattr(fixed_point, "NEWTON_FEATURES", 64 if newton else 0)
    monkeypatch.setattr(fixed_point, "STEPS", 50)
    with pytest.raises(InversionError, match=r"2 of 3 event\(s\).*worst residual is .*float64"):
        contraction_root(torch.square, torch.tensor([[0.5], [-1.0], [-3.0]]), 0.9)


def test_jacobian_of_a_batch() -> None:
    weight, x = randn(3, 3), randn(4, 2, 3)
    value, matrix = value_and_jacobian(contraction(weight), x)
    assert torch.equal(value, contraction(weight)(x))
    check_close("jacobian", matrix, jacobian(contraction(weight), x, 1), 1e-12)


def test_a_context_brings_jacobians_of_its_own() -> None:
    context, x = randn(4, 1, 1), randn(3)

    def function(x: Tensor) -> Tensor:
        return (context * x).sin()

    value, product = batched_vjp(function, x)
    check_close("product", product(torch.ones_like(value))[0], context * (context * x).cos(), 1e-12)
    expected = (context * (context * x).cos()).diag_embed()
    check_close("jacobian", value_and_jacobian(function, x)[1], expected, 1e-12)


# --- contractions -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 8), (64, 128)])
def test_spectral_norm_stays_below_its_bound(shape: tuple[int, int], scale: float) -> None:
    weight = scale * torch.randn(*shape)
    norm = torch.linalg.matrix_norm(contracted(weight, 0.9), 2)
    assert norm <= 0.9 * (1 + 1e-6)
    # The bound is not loose either.
    exact = torch.linalg.matrix_norm(weight, 2)
    assert norm >= 0.9 * exact / (1 + exact**2).sqrt() * min(shape) ** (-1 / 64) * (1 - 1e-5)


def test_gradients_of_contracted_are_its_own() -> None:
    """Also at zero, and where singular values are equal."""
    for weight in (randn(2, 3), torch.zeros(2, 2).double(), torch.eye(3).double()):
        leaf = weight.requires_grad_()
        assert torch.autograd.gradcheck(lambda w: contracted(w, 0.9), leaf)
        assert torch.autograd.gradgradcheck(lambda w: contracted(w, 0.9), leaf)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("hidden_features", [(), (16,), (16, 32)])
def test_network_contracts_whatever_its_parameters(
    hidden_features: tuple[int, ...], scale: float
) -> None:
    network = LipschitzMLP(3, 2, hidden_features, lipschitz=0.8).double()
    redraw_(network, scale)
    x, context = 3 * randn(200, 3), randn(200, 2)
    norms = torch.linalg.matrix_norm(jacobian(lambda x: network(x, context), x, 1), 2)
    assert norms.max() <= 0.8
    assert norms.max() > 0.01
    assert not torch.equal(network(x, context), network(x, context + 1))


def test_network_starts_at_zero() -> None:
    for hidden_features in ((), (8,)):
        assert not LipschitzMLP(3, 2, hidden_features)(torch.randn(5, 3), torch.randn(5, 2)).any()


# --- log-determinants -------------------------------------------------------------------------


def test_estimated_log_determinant_is_unbiased() -> None:
    basis = orthogonal(16)
    function = contraction(2 * basis @ torch.rand(16).double().diag() @ basis.T)
    exact, estimated = (ResidualTransform(function, 0.9, kind) for kind in ("exact", "unbiased"))
    x = 0.3 * randn(1, 16)
    y, expected = exact.call_and_ladj(x)
    # Each call draws one number of terms for all rows.
    got = torch.stack([estimated.call_and_ladj(x.expand(20, 16))[1].mean() for _ in range(500)])
    error = got.std() / len(got) ** 0.5
    assert torch.equal(estimated(x), y)
    assert expected.abs() > 2
    assert error < 0.1
    assert (got.mean() - expected).abs() < 4 * error


def test_estimated_gradients_are_unbiased() -> None:
    weight = (0.9 * orthogonal(3)).requires_grad_()

    def gradient(log_det: Any, rows: int) -> Tensor:
        transform = ResidualTransform(contraction(weight), 0.45, log_det)
        ladj = transform.call_and_ladj(x.expand(rows, 3))[1]
        return torch.autograd.grad(ladj.mean(), weight)[0]

    x = randn(1, 3)
    expected = gradient("exact", 1)
    got = torch.stack([gradient("unbiased", 100) for _ in range(200)])
    error = got.std(0) / 200**0.5
    check_close("gradient", got.mean(0), expected, 4 * error + 1e-12)


def test_exact_in_64_features() -> None:
    flow = pf.ResidualFlow(64, transforms=1, hidden_features=(32,)).double()
    redraw_(flow, 1.0)
    draw, log_prob = flow().rsample_and_log_prob((4,))
    check_close("density", flow().log_prob(draw.detach().clone()), log_prob, 1e-8)
    assert torch.equal(flow().log_prob(draw), flow().log_prob(draw.detach()))
    layer = flow.transform.layers[0]()
    x = randn(2, 64)
    expected = jacobian(layer.inv, x, 1).slogdet()[1]
    check_close("ladj", layer.inv.call_and_ladj(x)[1], expected, 1e-8)


def test_many_features_are_estimated_and_inverted() -> None:
    flow = pf.ResidualFlow(70, transforms=1, hidden_features=(16,), mixing=None)
    redraw_(flow, 1.0)
    layer = flow.transform.layers[0]()
    x = torch.randn(3, 70)
    assert layer.inv.log_det == "unbiased"
    with torch.no_grad():
        check_close("round trip", layer(layer.inv(x)), x, 1e-4)
    assert flow().log_prob(x).shape == (3,)


# --- recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 2])
def test_save_and_load(context: int, tmp_path: Path) -> None:
    flow = pf.ResidualFlow(3, context, transforms=2, hidden_features=(8,), lipschitz=0.9)
    redraw_(flow, 1.0)
    pf.save(flow, tmp_path / "flow")
    again = pf.load(tmp_path / "flow")
    x, c = torch.randn(4, 3), torch.randn(4, context) if context else None
    assert torch.equal(again(c).log_prob(x), flow(c).log_prob(x))


def test_one_pass_exchanges_the_directions() -> None:
    forward = ResidualLayer(3, one_pass="forward").double()
    inverse = ResidualLayer(3).double()
    redraw_(forward, 1.0)
    inverse.load_state_dict(forward.state_dict())
    x = randn(5, 3)
    (y, ladj), (z, inverse_ladj) = forward().call_and_ladj(x), inverse().inverse_and_ladj(x)
    assert torch.equal(y, z)
    assert torch.equal(ladj, inverse_ladj)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"one_pass": "both"}, "one_pass: expected 'forward' or 'inverse', got 'both'"),
        ({"log_det": "fast"}, "log_det: expected 'auto', 'exact' or 'unbiased', got 'fast'"),
        ({"lipschitz": 1.0}, "lipschitz: expected a number between 0 and 1, got 1.0"),
        ({"hidden_features": (0,)}, "hidden_features: expected positive integers"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pf.ResidualFlow(2, **options)


# --- block networks ---------------------------------------------------------------------------


def test_block_network_is_triangular_and_increasing() -> None:
    network = BlockNetwork(4, 2, (3, 5), order=[2, 0, 3, 1]).double()
    redraw_(network, 2.0)
    x, context = 3 * randn(50, 4), randn(50, 2)
    value, log_slope = network(x, context).chunk(2, -1)
    matrix = jacobian(lambda x: network(x, context)[..., :4], x, 1)
    ordered = matrix[:, network.order][:, :, network.order]
    assert not ordered.triu(1).any()
    assert (ordered.tril(-1) != 0).all(0).tril(-1).sum() == 6
    check_close("slope", log_slope.exp(), matrix.diagonal(dim1=-2, dim2=-1), 1e-12)
    assert not torch.equal(value, network(x, context + 1)[..., :4])


def test_block_network_feature_by_feature() -> None:
    network = BlockNetwork(4, 2, (3, 5), order=[2, 0, 3, 1]).double()
    redraw_(network, 2.0)
    x, context = randn(50, 4), randn(50, 2)
    value, log_slope = network(x, context).chunk(2, -1)
    order, steps = network.unroll(x, context)
    function = next(steps)
    for i, feature in enumerate(order.tolist()):
        got, slope = function(x[:, feature])
        check_close("value", got, value[:, feature], 1e-12)
        check_close("slope", slope, log_slope[:, feature], 1e-12)
        if i < 3:
            function = steps.send(x[:, feature])


def test_block_linear_keeps_its_signs() -> None:
    layer = BlockLinear(3, 2, 4, 0)
    redraw_(layer, 100.0)
    assert (layer.blocks() > 0).all()
    assert layer.blocks().isfinite().all()
    weight = layer.earlier.masked_weight().unflatten(0, (3, 4)).unflatten(-1, (3, 2))
    assert not weight[torch.arange(3), :, torch.arange(3)].any()
    assert (weight[2, :, 1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_block_flow_reaches_every_value(dtype: torch.dtype) -> None:
    """A bounded activation alone would stop short of these, whatever its weights."""
    flow = pf.BNAF(3).to(dtype)
    redraw_(flow, 1.0)
    transform = flow.transform.condition()
    x = torch.tensor([[1e4, -1e4, 1e3], [-300.0, 5.0, 1e5]], dtype=dtype)
    with torch.no_grad():
        for there, back in ((transform, transform.inv), (transform.inv, transform)):
            y = there(x)
            assert y.isfinite().all()
            check_close("there and back", back(y), x, 1e6 * torch.finfo(dtype).eps * (1 + x.abs()))


def test_block_flow_in_64_features() -> None:
    flow = pf.BNAF(64, transforms=1, hidden_features=(4,)).double()
    redraw_(flow, 1.0)
    draw, log_prob = flow().rsample_and_log_prob((4,))
    check_close("density", flow().log_prob(draw.detach().clone()), log_prob, 1e-8)


def test_block_flow_starts_near_the_identity() -> None:
    x = torch.randn(100, 5)
    y, ladj = pf.BNAF(5).transform.inv.call_and_ladj(x)
    assert (y - x).abs().mean() < 0.6
    assert ladj.abs().mean() < 5.0


def test_block_flow_learns() -> None:
    """A density with two modes, from the start given above."""
    flow = pf.BNAF(2)
    x = torch.randn(256, 2) * 0.3
    x = x + torch.where(x[:, :1] > 0, 1.0, -1.0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        losses.append(-flow().log_prob(x).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < torch.distributions.Normal(0.0, x.std()).entropy() * 2 - 0.5


@pytest.mark.parametrize("context", [0, 2])
def test_block_flow_saves_and_loads(context: int, tmp_path: Path) -> None:
    flow = pf.BNAF(3, context, hidden_features=(4,), one_pass="forward", mixing=None)
    redraw_(flow, 1.0)
    pf.save(flow, tmp_path / "flow")
    again = pf.load(tmp_path / "flow")
    x, c = torch.randn(4, 3), torch.randn(4, context) if context else None
    assert torch.equal(again(c).log_prob(x), flow(c).log_prob(x))


def test_wrong_order_of_blocks() -> None:
    with pytest.raises(ValueError, match="order: expected a permutation of 3 features"):
        BlockLayer(3, order=[0, 1])
    with pytest.raises(ValueError, match="one_pass: expected 'forward' or 'inverse'"):
        BlockLayer(3, one_pass="both")  # type: ignore[arg-type]


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize("recipe", [pf.Planar, pf.Radial, pf.Sylvester, pf.ResidualFlow, pf.BNAF])
def test_float32_is_near_float64(recipe: Any, features: int) -> None:
    """At the default size, after parameters were drawn afresh."""
    flow = recipe(features)
    redraw_(flow, 0.3)
    x = torch.randn(64, features)
    with torch.no_grad():
        single = flow().log_prob(x).double()
        double = flow.double()().log_prob(x.double())
    check_close("float32", single, double, 1e-4)
