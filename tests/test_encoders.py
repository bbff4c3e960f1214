"""Encoders: any batch, any length, and what they must not depend on."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pyroflows.errors import ShapeError
from pyroflows.nn import AttentionPooling, ConvEncoder, DeepSet, GRUEncoder, ImageEncoder

SETS = [DeepSet, partial(DeepSet, standardize=True), AttentionPooling]
ENCODERS = [*SETS, GRUEncoder, ConvEncoder]


@pytest.mark.parametrize("make", ENCODERS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("length", [1, 7])
def test_batches_and_lengths(make: Any, batch: tuple[int, ...], length: int) -> None:
    encoder = make(2, 8)
    x = torch.randn(*batch, length, 2)
    out = encoder(x)
    assert out.shape == (*batch, 8)
    if batch == (2, 3):
        torch.testing.assert_close(out[1, 2], encoder(x[1, 2]), rtol=1e-5, atol=1e-6)
    assert encoder.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("make", ENCODERS)
def test_wrong_features(make: Any) -> None:
    with pytest.raises(ShapeError, match=r"x: expected shape .* 2\), got \(5, 3\)"):
        make(2, 8)(torch.zeros(5, 3))


@pytest.mark.parametrize("make", SETS)
def test_a_set_has_no_order_but_a_size(make: Any) -> None:
    encoder = make(2, 8).double()
    x = torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(encoder(x.flip(0)), encoder(x))
    assert not torch.allclose(encoder(torch.cat([x, x])), encoder(x))
    with pytest.raises(ValueError, match="at least one element"):
        encoder(x[:0])


def test_a_standardised_set_shows_its_scale_however_small() -> None:
    encoder = DeepSet(2, 8, standardize=True).double()
    x = torch.randn(6, 2, dtype=torch.float64)
    outputs = [encoder(1e-4 * scale * x) for scale in (1, 10, 100)]
    steps = [(b - a).abs().max() for a, b in pairwise(outputs)]
    assert min(steps) > 0.1
    equal = torch.ones(6, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(equal).sum(), equal)
    assert gradient.isfinite().all()


def test_attention_finds_the_one_element_that_matters() -> None:
    """The largest of thirty, which a mean over them hardly shows."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for make in (AttentionPooling, DeepSet):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = make(1, 1, hidden_features=(16,))
        adam = torch.optim.Adam(encoder.parameters(), 1e-2)
        for _ in range(300):
            x = torch.randn(64, 30, 1, generator=generator)
            loss = (encoder(x) - x.amax(-2)).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        errors.append(loss.item())
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("make", [GRUEncoder, ConvEncoder])
def test_a_sequence_has_an_order(make: Any) -> None:
    x = torch.randn(6, 2)
    encoder = make(2, 8)
    assert not torch.allclose(encoder(x.flip(0)), encoder(x))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (28, 20)])
def test_images_of_any_size(batch: tuple[int, ...], size: tuple[int, int]) -> None:
    encoder = ImageEncoder(2, 8).double()
    x = torch.randn(*batch, 2, *size, dtype=torch.float64)
    out = encoder(x)
    assert out.shape == (*batch, 8)
    if batch == (2, 3):
        torch.testing.assert_close(out[1, 2], encoder(x[1, 2]))
    with pytest.raises(ShapeError, match=r"x: expected shape .*2, \d+, \d+\), got"):
        encoder(x[..., :1, :, :])


def test_an_image_has_places() -> None:
    encoder, x = ImageEncoder(1, 8), torch.zeros(1, 16, 16)
    x[0, 2, 2] = 1
    assert not torch.allclose(encoder(x.transpose(-1, -2).flip(-1)), encoder(x))


def test_options() -> None:
    assert DeepSet(2, 8, hidden_features=(4,), activation=nn.GELU).element[0].out_features == 4
    assert GRUEncoder(2, 8, state_features=5, layers=2).gru.num_layers == 2
    assert ConvEncoder(2, 8, hidden_features=(4, 6)).layers[2].out_channels == 6
    with pytest.raises(ValueError, match="kernel: expected an odd positive width, got 4"):
        ConvEncoder(2, 8, kernel=4)
    assert AttentionPooling(2, 8, queries=3, heads=2).queries.shape == (3, 64)
    with pytest.raises(ValueError, match="heads that divide the width 64, got 4 and 5"):
        AttentionPooling(2, 8, heads=5)
    assert ImageEncoder(1, 8, grid=3, kernel=5).out.in_features == 32 * 9
    with pytest.raises(ValueError, match="grid: expected at least one field, got 0"):
        ImageEncoder(1, 8, grid=0)
    with pytest.raises(ValueError, match="hidden_features"):
        DeepSet(2, 8, hidden_features=(0,))
