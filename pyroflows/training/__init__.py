"""Fitting: one loop behind maximum likelihood and variational inference."""

from pyroflows.training.losses import NegativeELBO, NegativeLogLikelihood
from pyroflows.training.mle import fit_mle
from pyroflows.training.result import History, MLEFit, SVIFit
from pyroflows.training.svi import fit_svi

__all__ = [
    "History",
    "MLEFit",
    "NegativeELBO",
    "NegativeLogLikelihood",
    "SVIFit",
    "fit_mle",
    "fit_svi",
]
