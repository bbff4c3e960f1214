"""Gaussians that match the scores of a density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Rounds of `low_rank_match`, and the largest ratio of precisions that it finds at a time.
ALTERNATIONS, EXTREME = 6, 1e4


def batch_and_match(
    loc: Tensor, covariance: Tensor, draws: Tensor, scores: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    r"""One closed-form update of a Gaussian towards a density with the given scores.

    Minimises the mean squared difference of the Gaussian's score and the density's over the draws,
    in the Gaussian's own metric, plus :math:`2/\lambda` times the divergence from the Gaussian
    before. With means :math:`\bar z, \bar g` and covariances :math:`C, \Gamma` of draws and scores,

    .. math::

        U &= \lambda \Gamma + \tfrac{\lambda}{1 + \lambda} \bar g \bar g^\top, \qquad
        V = \Sigma + \lambda C + \tfrac{\lambda}{1 + \lambda} (\mu - \bar z)(\mu - \bar z)^\top, \\
        \Sigma' &= 2 V \left(I + (I + 4 U V)^{1/2}\right)^{-1}, \qquad
        \mu' = \tfrac{1}{1 + \lambda} \mu + \tfrac{\lambda}{1 + \lambda}
               (\Sigma' \bar g + \bar z).

    The result is positive definite whatever the scores, and the update commutes with affine maps:
    badly scaled densities cost no more than well scaled ones. Costs two decompositions of a
    :math:`D \times D` matrix.

    Parameters
    ----------
    loc, covariance
        Of the Gaussian before, shapes ``(*batch, D)`` and ``(*batch, D, D)``.
    draws
        From that Gaussian, shape ``(*batch, S, D)``.
    scores
        Gradients of the log density there, shape ``(*batch, S, D)``.
    rate
        :math:`\lambda`, how far to go; at infinity the Gaussian before is forgotten.

    Returns
    -------
    tuple of Tensor
        Location and covariance of the Gaussian after; NaN where scores are so large that their
        squares overflow.

    References
    ----------
    Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul, "Batch and match: black-box
    variational inference with a score-based divergence", ICML 2024.

    Examples
    --------
    >>> draws = torch.randn(50, 2, dtype=torch.float64)
    >>> loc, covariance = batch_and_match(
    ...     torch.zeros(2).double(), torch.eye(2).double(), draws, -(draws - 3) / 4, rate=1e9
    ... )
    >>> loc.round(decimals=4), covariance.diagonal().round(decimals=4)
    (tensor([3., 3.], dtype=torch.float64), tensor([4., 4.], dtype=torch.float64))
    """
    share = rate / (1 + rate)
    mean, pull = draws.mean(-2), scores.mean(-2)
    precision = rate * _covariance(scores) + share * _square(pull)
    spread = covariance + rate * _covariance(draws) + share * _square(loc - mean)
    # With V = L L', the matrix (I + 4 U V)^(1/2) is similar to a symmetric one.
    factor, failed = torch.linalg.cholesky_ex(spread)
    product = factor.mT @ precision @ factor
    defined = (failed == 0) & product.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(defined[..., None, None], product, 0.0))
    shrunk = (2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt())).sqrt()
    half = factor @ vectors * shrunk.unsqueeze(-2)
    covariance = torch.where(defined[..., None, None], half @ half.mT, math.nan)
    step = (covariance @ pull.unsqueeze(-1)).squeeze(-1)
    return (1 - share) * loc + share * (step + mean), covariance


def low_rank_match(
    draws: Tensor, scores: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""A Gaussian of low rank plus diagonal that matches a density's scores at a Gaussian's draws.

    Models the precision as diagonal minus low rank, :math:`P = \Delta - W H W^\top`. Then the
    scores are :math:`g = -P (z - \mu)`, and the rows :math:`g + \Delta z` have the rank of
    :math:`W`. A factorisation of these rows and regressions of each column on its own draws and the
    factors are alternated; :math:`H` is the regression within :math:`W`. The covariance is

    .. math:: \Sigma = S \left(I + U (V - I) U^\top\right) S, \qquad S = \Delta^{-1/2}

    Exact for a Gaussian of this kind, from more draws than the rank, however few they are beside
    the dimension. For any other density the draws' mean precision is matched,
    :math:`-E \nabla^2 \log p`, which is that of the best Gaussian once the draws come from it.
    Directions are chosen in the draws' units: standardise them. Costs some products of ``S`` by
    ``D`` numbers with ``S``.

    Parameters
    ----------
    draws
        From a Gaussian, shape ``(S, D)``.
    scores
        Gradients of the log density there, of the same shape.
    rank
        Number of columns of :math:`U`, below ``S`` and ``D``.

    Returns
    -------
    tuple of Tensor
        Location ``(D,)``, :math:`S` as ``(D,)``, :math:`U` with orthonormal columns ``(D, rank)``,
        and the diagonal of :math:`V` ``(rank,)``. Directions in which the precision found is not
        positive have variance 1. All are NaN where scores are so large that their squares overflow.

    References
    ----------
    Opper and Archambeau, "The variational Gaussian approximation revisited", Neural Computation
    2009; Modi, Cai and Saul, "Batch, match, and patch: low-rank approximations for score-based
    variational inference", 2024.

    Examples
    --------
    >>> line = torch.ones(4, 1, dtype=torch.float64)
    >>> precision = torch.linalg.inv(torch.eye(4) + line @ line.mT)
    >>> draws = torch.randn(50, 4, dtype=torch.float64)
    >>> loc, scale, basis, variance = low_rank_match(draws, -(draws - 3) @ precision, rank=1)
    >>> loc.round(decimals=4), variance.round(decimals=4)
    (tensor([3., 3., 3., 3.], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """
    if not rank < min(draws.shape):
        raise ValueError(f"rank: expected less than draws and features {draws.shape}, got {rank}")
    mean, pull = draws.mean(0), scores.mean(0)
    z, g = draws - mean, scores - pull
    precision, factors = _diagonal(z, g), z[:, :0]
    for _ in range(ALTERNATIONS):
        rows = g + precision * z
        gram = rows @ rows.mT
        if not gram.isfinite().all():
            nan = torch.full_like(z[: rank + 1], math.nan)
            return nan[0], nan[0], nan[1:].mT, nan[1:, 0]
        factors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        precision = _diagonal(z - factors @ (factors.mT @ z), g)
    rows = g + precision * z
    basis, _ = torch.linalg.qr(rows.mT @ factors)
    within = torch.linalg.lstsq(z @ basis, rows @ basis).solution
    scale = precision.rsqrt()
    # In units of the scale the precision is I - U h U'.
    basis, triangle = torch.linalg.qr(scale.unsqueeze(-1) * basis)
    h, vectors = torch.linalg.eigh(triangle @ (within + within.mT) / 2 @ triangle.mT)
    basis = basis @ vectors
    variance = torch.where(h < 1, 1 / (1 - h), 1.0).clamp(1 / EXTREME, EXTREME)
    step = scale * pull
    step = step + basis @ ((variance - 1) * (basis.mT @ step))
    return mean + scale * step, scale, basis, variance


def _diagonal(z: Tensor, g: Tensor) -> Tensor:
    """Slopes of the regressions of the scores' columns on the draws', with the sign turned."""
    slope = -(g * z).sum(0) / z.square().sum(0)
    return slope.clamp(1 / EXTREME, EXTREME)


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(-2, keepdim=True)
    return centred.mT @ centred / rows.shape[-2]


def _square(vector: Tensor) -> Tensor:
    return vector.unsqueeze(-1) * vector.unsqueeze(-2)
