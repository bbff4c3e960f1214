"""Fitting: one loop behind maximum likelihood and variational inference."""

from pyroflows.training.amortized import AmortizedELBO
from pyroflows.training.annealing import Annealing
from pyroflows.training.files import RowFile
from pyroflows.training.flow_matching import FlowMatchingLoss, fit_flow_matching
from pyroflows.training.losses import NegativeELBO, NegativeLogLikelihood
from pyroflows.training.mle import fit_mle
from pyroflows.training.nle import NLEFit, fit_nle
from pyroflows.training.npe import NegativeLogPosterior, NPEFit, fit_npe, refine
from pyroflows.training.result import FlowMatchingFit, History, MLEFit, SVIFit
from pyroflows.training.selection import Selection, select
from pyroflows.training.svi import fit_svi

__all__ = [
    "AmortizedELBO",
    "Annealing",
    "FlowMatchingFit",
    "FlowMatchingLoss",
    "History",
    "MLEFit",
    "NLEFit",
    "NPEFit",
    "NegativeELBO",
    "NegativeLogLikelihood",
    "NegativeLogPosterior",
    "RowFile",
    "SVIFit",
    "Selection",
    "fit_flow_matching",
    "fit_mle",
    "fit_nle",
    "fit_npe",
    "fit_svi",
    "refine",
    "select",
]
