"""Gaussians that match the scores of a density, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(-2, keepdim=True)
    return centred.mT @ centred / rows.shape[-2]


def _square(vector: Tensor) -> Tensor:
    return vector.unsqueeze(-1) * vector.unsqueeze(-2)
