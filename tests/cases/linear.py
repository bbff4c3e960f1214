"""Linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import transforms as pft
from tests.cases.table import SMALL, Case, flow, held, layer


def rotation(raw: Tensor) -> pft.OrthogonalTransform:
    return pft.OrthogonalTransform(torch.linalg.matrix_exp(raw - raw.mT))


def ordered() -> pfl.LearnedPermutation:
    """As after a fit: the features that the others explain come last."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 4, generator=generator)
    x[:, 0] += x[:, 1:3].sum(-1)
    permutation = pfl.LearnedPermutation(4)
    permutation.initialize_(x)
    return permutation


def triangular(raw: Tensor, bias: Tensor) -> pft.TriangularAffineTransform:
    return pft.TriangularAffineTransform(raw.tril(-1) + raw.diagonal().exp().diag(), bias)


def whitened() -> pfl.Whitening:
    """As after a start: strongly correlated, of very different scales."""
    whitening = pfl.Whitening(3)
    root = torch.tensor([[10.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.02, 0.01]])
    whitening.set_covariance_(torch.tensor([5.0, -1.0, 0.0]), root @ root.mT)
    return whitening


def stretched(scale: Tensor, along: Tensor, bias: Tensor) -> pft.LowRankAffineTransform:
    basis = scale.new_tensor([[0.6, 0.0], [0.8, 0.0], [0.0, 1.0]])
    return pft.LowRankAffineTransform(scale.exp(), bias, basis, along.exp())


def correlated() -> pfl.LowRankWhitening:
    """As after a start of many latents."""
    generator = torch.Generator().manual_seed(5)
    whitening = pfl.LowRankWhitening(5, rank=2)
    basis, _ = torch.linalg.qr(torch.randn(5, 2, generator=generator))
    scale = torch.tensor([0.01, 0.1, 1.0, 1.0, 10.0])
    whitening.set_low_rank_(torch.arange(5.0), scale, basis, torch.tensor([0.05, 20.0]))
    return whitening


LOW_RANK = ("transforms.LowRankAffineTransform",)


class Pixels(pfl.Layer):
    """A nonlinear map of the channels, which the pixelwise transform takes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.coupling = pfl.CouplingLayer(2, **SMALL)

    def forward(self, context: Tensor | None = None) -> pft.PixelwiseTransform:
        return pft.PixelwiseTransform(self.coupling(context))


def convolution(channels: int) -> Case:
    return Case(
        f"conv1x1-{channels}",
        "layer",
        lambda: pfl.InvertibleConv1x1(channels),
        ("layers.InvertibleConv1x1", "transforms.PixelwiseTransform"),
        (channels, 2, 3),
    )


def mixing(name: str, recipe: Any = pf.NICE, features: int = 3, **options: Any) -> Case:
    return flow(recipe, features, note=f"{name}-mixing", mixing=name, **options)


CASES: list[Case] = [
    held("householder", pft.HouseholderTransform, (2, 3)),
    held("triangular", triangular, (3, 3), (3,), covers=("transforms.TriangularAffineTransform",)),
    layer("whitening", pfl.Whitening),
    Case("whitening-set", "layer", whitened, ("layers.Whitening",), (3,), identity=False),
    held("low-rank", stretched, (3,), (2,), (3,), covers=LOW_RANK),
    layer("low-rank-whitening", pfl.LowRankWhitening, 5, rank=2),
    Case(
        "low-rank-whitening-set",
        "layer",
        correlated,
        ("layers.LowRankWhitening",),
        (5,),
        identity=False,
    ),
    held("orthogonal", rotation, (3, 3), covers=("transforms.OrthogonalTransform",)),
    held("matrix-exponential", pft.MatrixExponentialTransform, (3, 3), (3,)),
    *(
        layer(f"{name}-{n}", make, n)
        for name, make in (
            ("householder", pfl.Householder),
            ("cayley", pfl.OrthogonalLinear),
            ("matrix-exponential", pfl.MatrixExponential),
        )
        for n in (1, 2, 5, 64)
    ),
    layer("householder-few", pfl.Householder, 5, reflections=2),
    *(layer(f"rotation-{n}", pfl.OrthogonalLinear, n, parametrization="exp") for n in (1, 5, 64)),
    convolution(1),
    convolution(3),
    Case("pixelwise-coupling", "layer", Pixels, ("transforms.PixelwiseTransform",), (2, 2, 2)),
    Case(
        "image-flow",
        "flow",
        lambda: pf.Flow([pfl.InvertibleConv1x1(3), pfl.InvertibleConv1x1(3)], (3, 2, 2)),
        ("layers.InvertibleConv1x1",),
        (3, 2, 2),
    ),
    Case(
        "permutation-random",
        "layer",
        lambda: pfl.Permutation.random(4),
        ("layers.Permutation",),
        (4,),
        identity=False,
    ),
    layer("learned-permutation", pfl.LearnedPermutation),
    Case(
        "learned-permutation-set",
        "layer",
        ordered,
        ("layers.LearnedPermutation",),
        (4,),
        identity=False,
    ),
    mixing("orthogonal"),
    mixing("householder"),
    mixing("permutation", identity=False),
    mixing("orthogonal", pf.NSF, 2),
    mixing("householder", pf.MAF, 1, slow="forward"),
    mixing("permutation", pf.RealNVP, 1),
]
ELSEWHERE = dict.fromkeys(
    ("numerics.ascend", "numerics.batch_and_match", "numerics.low_rank_match"),
    "tests/test_start.py",
)
