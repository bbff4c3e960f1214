"""Classifier two-sample tests, against reference draws and without."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.diagnostics.calibration import held_out
from pyroflows.diagnostics.simulation import Simulations
from pyroflows.errors import DataError, ShapeError
from pyroflows.guides import AutoAmortizedFlow
from pyroflows.numerics import forked_rng


def c2st(x: Any, y: Any, *, folds: int = 5, seed: int = 0) -> float:
    """Classifier two-sample test: the cross-validated accuracy of telling two samples apart.

    One half where they are alike, 1 where they do not overlap. The classifier is that of the
    benchmark of simulation-based inference: two hidden layers of ten times as many units as
    columns, on columns standardised by ``x``. The cost is that of its training in every fold: a
    minute for 10,000 rows each. Needs scikit-learn.

    Parameters
    ----------
    x, y
        Samples ``(rows, columns)``, of equally many rows: the reference first.
    folds
        Of the cross-validation.
    seed
        Of classifier and folds.

    References
    ----------
    Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", ICLR 2017; Lueckmann et al.,
    "Benchmarking simulation-based inference", AISTATS 2021.

    Examples
    --------
    >>> x = torch.randn(200, 2)
    >>> pf.c2st(x, x + 10)
    1.0
    """
    from sklearn.model_selection import KFold, cross_val_score

    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape:
        raise ShapeError(
            f"x, y: expected two samples of one shape (rows, columns), got {first.shape} and "
            f"{second.shape}"
        )
    loc, scale = first.mean(0), first.std(0)
    both = (np.concatenate([first, second]) - loc) / np.where(scale > 0, scale, 1.0)
    if not np.isfinite(both).all():
        raise DataError("x, y: expected finite numbers")
    labels = np.repeat([0, 1], len(first))
    shuffled = KFold(folds, shuffle=True, random_state=seed)
    scores = cross_val_score(_classifier(both.shape[1], seed), both, labels, cv=shuffled)
    return float(scores.mean())


def _classifier(columns: int, seed: int, early_stopping: bool = False) -> Any:
    from sklearn.neural_network import MLPClassifier

    hidden = (10 * columns, 10 * columns)
    return MLPClassifier(hidden, max_iter=1000, early_stopping=early_stopping, random_state=seed)


@dataclass(frozen=True)
class LocalC2ST:
    """Result of `local_c2st`.

    Attributes
    ----------
    statistic
        Mean squared distance of the classifier's probability from one half, at the observation.
    null
        The same of classifiers trained on two samples that are alike.
    """

    statistic: float
    null: np.ndarray = field(repr=False)

    @property
    def p_value(self) -> float:
        """How often a right posterior looks at least as wrong."""
        return float((1 + (self.null >= self.statistic).sum()) / (1 + len(self.null)))


def local_c2st(
    guide: AutoAmortizedFlow,
    data: Tensor | Mapping[str, Tensor],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    simulations: int | Simulations = 2000,
    trials: int = 50,
    seed: int | None = None,
) -> LocalC2ST:
    """Test an amortised posterior at one observation, without reference draws.

    In the flow's base space a right posterior turns the true values of simulations into draws of
    the base, whatever the data. A classifier learns to tell them apart, given the encoded data, and
    is asked at the observation. It is trained ``trials`` times more on draws of the base alone, for
    what chance does. Needs scikit-learn.

    Parameters
    ----------
    guide
        An `AutoAmortizedFlow` whose latents are all global and amortised.
    data
        The observation, see `AutoAmortizedFlow.posterior`.
    *args
        The model's arguments.
    model_kwargs
        The model's keyword arguments.
    simulations
        Their number, or simulations that the guide has not been trained on.
    trials
        Classifiers behind the p-value.
    seed
        Seed of all that is random.

    References
    ----------
    Linhart, Gramfort and Rodrigues, "L-C2ST: local diagnostics for posterior approximations in
    simulation-based inference", NeurIPS 2023.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 0.5))
    >>> guide = pf.AutoAmortizedFlow(model, observed=["y"])
    >>> fit = pf.fit_npe(guide, simulations=500, steps=5, seed=0)
    >>> test = pf.local_c2st(guide, torch.tensor(1.0), simulations=300, trials=9, seed=0)
    >>> 0.1 <= test.p_value <= 1.0
    True
    """
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    kwargs = dict(model_kwargs or {})
    with torch.no_grad(), forked_rng(seed) if seed is not None else nullcontext():
        u, contexts = held_out(guide, simulations, args, kwargs)
        here = guide.posterior(data, *args, **kwargs).get_context()
        flow = guide.flow()
        true = flow.transform.condition(contexts).inverse_and_ladj(u)[0]

        def base() -> np.ndarray:
            return np.asarray(flow.base(contexts).expand(contexts.shape[:1]).sample().cpu())

        loc, scale = contexts.mean(0), contexts.std(0).clamp(min=1e-12)
        given = np.asarray(((contexts - loc) / scale).cpu())
        place = np.asarray(((here - loc) / scale).cpu())
        asked = base()
        at_place = np.concatenate([asked, np.broadcast_to(place, (len(asked), len(place)))], 1)

        def statistic(one: np.ndarray, number: int) -> float:
            rows = np.concatenate([np.concatenate([z, given], 1) for z in (one, base())])
            # Not cross-validated: a classifier that learns its rows by heart sees differences.
            classifier = _classifier(rows.shape[1], number, early_stopping=True)
            classifier.fit(rows, np.repeat([0, 1], len(given)))
            return float(((classifier.predict_proba(at_place)[:, 0] - 0.5) ** 2).mean())

        null = np.array([statistic(base(), number) for number in range(1, trials + 1)])
        return LocalC2ST(statistic(np.asarray(true.cpu()), 0), null)
