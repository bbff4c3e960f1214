"""Orthogonal linear layers: they turn the features and leave volumes alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.transforms import HouseholderTransform, OrthogonalTransform


class OrthogonalLinear(Layer):
    r"""Learned rotation by the skew-symmetric matrix :math:`A = W - W^\top`.

    .. math:: y = Q x, \qquad Q = (I - A/2)^{-1} (I + A/2) \quad\text{or}\quad Q = e^{A}

    Starts as the identity; ``log|det|`` is exactly 0. Making the matrix costs one linear solve
    (Cayley) or one matrix exponential, once per call of the layer; then either direction is one
    matrix product. The gradient of an exponential is one of twice the size: several times a pass.

    Parameters
    ----------
    features
        Size of the event.
    parametrization
        ``"cayley"``, the cheaper, reaches every rotation but those by exactly half a turn, which
        are infinitely far away; ``"exp"`` reaches all.

    Raises
    ------
    ValueError
        For another parametrization, or no features.

    References
    ----------
    Lezcano-Casado and Martínez-Rubio, "Cheap orthogonal constraints in neural networks", ICML 2019;
    Helfrich, Willmott and Ye, "Orthogonal recurrent neural networks with scaled Cayley transform",
    ICML 2018.

    Examples
    --------
    >>> layer = OrthogonalLinear(3, "exp")
    >>> torch.nn.init.normal_(layer.weight)[0, 0].shape
    torch.Size([])
    >>> layer()(torch.tensor([3.0, 0.0, 4.0])).norm().round(decimals=4)
    tensor(5., grad_fn=<RoundBackward1>)
    """

    def __init__(self, features: int, parametrization: Literal["cayley", "exp"] = "cayley") -> None:
        super().__init__()
        check_sizes(features, 0)
        if parametrization not in ("cayley", "exp"):
            raise ValueError(
                f"parametrization: expected 'cayley' or 'exp', got {parametrization!r}"
            )
        self.parametrization = parametrization
        self.weight = nn.Parameter(torch.zeros(features, features))

    def forward(self, context: Tensor | None = None) -> OrthogonalTransform:
        skew = self.weight - self.weight.mT
        eye = torch.ones_like(self.weight[0]).diag()
        if self.parametrization == "exp":
            matrix = torch.linalg.matrix_exp(skew)
        else:
            # Never singular, so nothing to check: the check would make a GPU wait.
            matrix = torch.linalg.solve_ex(eye - skew / 2, eye + skew / 2).result
        # Large weights magnify rounding; a Newton-Schulz step squares what is left of it.
        return OrthogonalTransform(matrix @ (3 * eye - matrix.mT @ matrix) / 2)


class Householder(Layer):
    r"""Learned rotation by Householder reflections, :math:`y = H_1 \cdots H_k F x`.

    Starts as the identity, with every entry trainable from there; ``log|det|`` is exactly 0. Each
    direction costs two products with the ``reflections`` vectors and a triangular solve; see
    `pyroflows.transforms.HouseholderTransform`.

    Parameters
    ----------
    features
        Size of the event.
    reflections
        How many, 1 to ``features``; by default ``features``, enough for every rotation. Fewer are
        cheaper, and turn fewer planes.

    Raises
    ------
    ValueError
        For a number of reflections beyond these limits.

    References
    ----------
    Tomczak and Welling, "Improving variational auto-encoders using Householder flow", 2016.

    Examples
    --------
    >>> Householder(3, reflections=2)()(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1., 2., 3.], grad_fn=<ViewBackward0>)
    """

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__()
        check_sizes(features, 0)
        reflections = features if reflections is None else reflections
        if not 1 <= reflections <= features:
            raise ValueError(f"reflections: expected 1 to {features}, got {reflections}")
        self.vectors = nn.Parameter(torch.zeros(reflections, features))

    def forward(self, context: Tensor | None = None) -> HouseholderTransform:
        return HouseholderTransform(self.vectors)
