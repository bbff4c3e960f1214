"""Linear layers: known matrices, determinants and orders, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from pyroflows.flows.stack import MIXINGS
from pyroflows.testing import redraw_

ROTATIONS = {
    "householder": pfl.Householder,
    "cayley": pfl.OrthogonalLinear,
    "exp": partial(pfl.OrthogonalLinear, parametrization="exp"),
}
DENSE = {**ROTATIONS, "matrix exponential": pfl.MatrixExponential, "lu": pfl.LULinear}


def redrawn(make: Callable[..., Any], *args: Any, scale: float = 1.0, **options: Any) -> Any:
    layer = make(*args, **options).double()
    redraw_(layer, scale)
    return layer


def matrix_of(transform: Any, features: int) -> Tensor:
    """Its columns are the images of the unit vectors, without the bias."""
    eye = torch.eye(features, dtype=torch.float64)
    return (transform(eye) - transform(torch.zeros_like(eye))).mT


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("features", [1, 2, 5, 64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e2, 1e6])
@torch.no_grad()
def test_rotations_are_orthogonal(name: str, features: int, scale: float) -> None:
    """Whatever the parameters: columns orthonormal, determinant 1."""
    matrix = matrix_of(redrawn(ROTATIONS[name], features, scale=scale)(), features)
    eye = torch.eye(features, dtype=torch.float64)
    assert (matrix.mT @ matrix - eye).abs().max() < 1e-12
    assert abs(matrix.det() - 1) < 1e-12


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_log_determinants_are_those_of_the_matrix(name: str) -> None:
    transform = redrawn(DENSE[name], 5)()
    expected = torch.linalg.slogdet(matrix_of(transform, 5))[1]
    ladj = transform.call_and_ladj(torch.ones(2, 5, dtype=torch.float64))[1]
    assert torch.allclose(ladj, expected, atol=1e-12)
    assert name not in ROTATIONS or (ladj == 0).all()


@torch.no_grad()
def test_householder_is_the_product_of_its_reflections() -> None:
    layer = redrawn(pfl.Householder, 5, reflections=3)
    eye = torch.eye(5, dtype=torch.float64)
    expected = torch.diag(torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    for i in reversed(range(3)):
        v = layer.vectors[i].clone()
        v[i] = 1.0
        expected = (eye - 2 * torch.outer(v, v) / v.dot(v)) @ expected
    assert torch.allclose(matrix_of(layer(), 5), expected, atol=1e-14)


@torch.no_grad()
def test_cayley_and_exponential_of_a_known_angle() -> None:
    """W has one entry a: the exponential turns by a, Cayley by 2 atan(a / 2)."""
    a = torch.tensor(0.7, dtype=torch.float64)
    for name, angle in (("exp", a), ("cayley", 2 * (a / 2).atan())):
        layer = ROTATIONS[name](2).double()
        layer.weight[1, 0] = a
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        assert torch.allclose(matrix_of(layer(), 2), turn, atol=1e-14)


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_learn_a_rotation(name: str) -> None:
    """From the identity to a random rotation: no parameter is stuck at the start."""
    torch.manual_seed(3)
    target = torch.linalg.qr(torch.randn(4, 4))[0]
    target[:, 0] *= target.det().sign()
    layer = ROTATIONS[name](4)
    gradient = torch.autograd.grad(
        (layer()(torch.eye(4)).mT - target).square().sum(), layer.parameters()
    )
    free = 1 - torch.eye(4)
    assert (gradient[0][free.bool()] != 0).all()
    optimiser = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(400):
        loss = (layer()(torch.eye(4)).mT - target).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1e-3


@torch.no_grad()
def test_matrix_exponential_round_trip_at_64_features() -> None:
    layer = redrawn(pfl.MatrixExponential, 64)
    x = torch.randn(100, 64, dtype=torch.float64)
    y, ladj = layer().call_and_ladj(x)
    back, inverse_ladj = layer().inverse_and_ladj(y)
    assert (back - x).abs().max() < 1e-8
    assert torch.equal(ladj, -inverse_ladj)
    assert torch.allclose(ladj[0], layer.weight.trace())


@torch.no_grad()
def test_conv1x1_is_a_convolution() -> None:
    layer = redrawn(pfl.InvertibleConv1x1, 3)
    x = torch.randn(5, 3, 4, 6, dtype=torch.float64)
    y, ladj = layer().call_and_ladj(x)
    kernel = matrix_of(layer.linear(), 3)
    expected = torch.nn.functional.conv2d(x, kernel[..., None, None], layer.linear.bias)
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(ladj, 24 * layer.linear.log_diagonal.sum().expand(5))


def test_a_pixelwise_transform_is_as_slow_as_its_part() -> None:
    inner = pfl.AutoregressiveLayer(2, hidden_features=())()
    pixelwise = pft.PixelwiseTransform(inner)
    assert pixelwise.sequential_forward
    assert not pixelwise.sequential_inverse


# --- orders -------------------------------------------------------------------------------------


def test_a_random_permutation_is_fixed_and_saved() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (pfl.Permutation.random(50, generator) for _ in range(2))
    assert sorted(first.order.tolist()) == list(range(50))
    assert not torch.equal(first.order, second.order)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.order, second.order)


def test_learned_order_follows_the_share_that_is_explained() -> None:
    x = torch.randn(1000, 5, dtype=torch.float64)
    x[:, 1] += x[:, 3] + x[:, 4]
    x[:, 0] += x[:, 2] / 2
    unexplained = []
    for i in range(5):
        rows = x - x.mean(0)
        others = torch.cat([rows[:, :i], rows[:, i + 1 :]], 1)
        fitted = others @ torch.linalg.lstsq(others, rows[:, i]).solution
        unexplained.append((rows[:, i] - fitted).var() / rows[:, i].var())
    by_hand = torch.stack(unexplained).argsort(descending=True)
    layer = pfl.LearnedPermutation(5)
    layer.initialize_(x)
    # On the base's side: the least explained first.
    assert torch.equal(layer().inv(torch.arange(5)), by_hand)
    assert by_hand[-1] == 1


def test_learned_order_is_set_once_and_takes_degenerate_columns() -> None:
    layer = pfl.LearnedPermutation(3)
    column = torch.randn(20)
    layer.initialize_(torch.stack([column, torch.ones(20), 2 * column], -1))
    order = layer.order.clone()
    assert layer().inv(torch.arange(3))[0] == 1
    layer.initialize_(torch.randn(20, 3))
    assert torch.equal(layer.order, order)


def test_fits_initialise_every_layer_that_asks_for_it() -> None:
    x = torch.randn(200, 3)
    x[:, 0] += x[:, 1:].sum(-1)
    layers = [pfl.CouplingLayer(3, hidden_features=(4,)), pfl.LearnedPermutation(3)]
    flow = pf.Flow([*layers, pfl.ActNorm(3)], 3)
    pf.fit_mle(flow, x, steps=1, progress=False)
    assert layers[1].initialized
    assert layers[1]().inv(torch.arange(3))[-1] == 0


# --- mixing and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", MIXINGS)
def test_every_mixing_is_saved(mixing: Any, tmp_path: Any) -> None:
    flow = pf.RealNVP(4, transforms=2, hidden_features=(4,), mixing=mixing)
    redraw_(flow, 0.3)
    pf.save(flow, tmp_path / "flow")
    x = torch.randn(3, 4)
    assert torch.equal(pf.load(tmp_path / "flow")().log_prob(x), flow().log_prob(x))


@pytest.mark.parametrize("layer", [*DENSE.values(), pfl.LearnedPermutation])
def test_layers_by_hand_are_saved(layer: Any, tmp_path: Any) -> None:
    flow = pf.Flow([layer(4)], 4)
    redraw_(flow, 0.3)
    pf.save(flow, tmp_path / "flow")
    x = torch.randn(3, 4)
    assert torch.equal(pf.load(tmp_path / "flow")().log_prob(x), flow().log_prob(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pfl.Householder(3, 4), "reflections: expected 1 to 3, got 4"),
        (lambda: pfl.Householder(3, 0), "reflections: expected 1 to 3, got 0"),
        (lambda: pfl.Householder(0), "expected features >= 1"),
        (
            lambda: pfl.OrthogonalLinear(3, "qr"),  # type: ignore[arg-type]
            "parametrization: expected 'cayley' or 'exp', got 'qr'",
        ),
        (
            lambda: pf.NSF(2, mixing="qr"),  # type: ignore[arg-type]
            "mixing: expected 'lu', 'orthogonal', 'householder', 'permutation' or None, got 'qr'",
        ),
    ],
)
def test_errors(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("shapes", [((3,), (1,)), ((3,), ()), ((3,), (2, 3)), ((3,), (2, 1))])
def test_scales_of_several_features_count_for_each(shapes: tuple[Any, Any]) -> None:
    shift, log_scale = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    transform, x = pft.DiagonalAffineTransform(shift, log_scale), torch.randn(2, 3).double()
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(y, x * log_scale.exp() + shift)
    torch.testing.assert_close(ladj, log_scale.expand(2, 3).sum(-1))
    torch.testing.assert_close(transform.inverse_and_ladj(y), (x, -ladj))
