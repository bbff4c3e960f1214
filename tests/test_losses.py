"""The negative ELBO: its value, and the expectation and variance of its gradients."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.training import NegativeELBO
from tests.models import (
    exact_gaussian_guide,
    gaussian,
    gaussian_data,
    gaussian_evidence,
)


def gradients(guide: pf.AutoFlow, estimator: Any, draws: int, *args: Any) -> Tensor:
    loss = NegativeELBO(guide, draws, estimator)(args)
    grads = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_the_estimators_have_one_expectation() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide = exact_gaussian_guide(y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    samples = {
        estimator: torch.stack([gradients(guide, estimator, 256, y) for _ in range(120)])
        for estimator in ("stl", "total")
    }
    difference = samples["stl"].mean(0) - samples["total"].mean(0)
    error = ((samples["stl"].var(0) + samples["total"].var(0)) / 120).sqrt()
    assert (difference.abs() <= 5 * error + 1e-12).all()
    # And they are not one and the same thing.
    assert not torch.allclose(samples["stl"], samples["total"])
    assert samples["stl"].mean(0).norm() > 5 * error.norm()


def test_path_gradients_have_no_variance_at_the_posterior() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide = exact_gaussian_guide(y)
    assert gradients(guide, "stl", 16, y).abs().max() < 1e-10
    assert gradients(guide, "total", 16, y).abs().max() > 1e-2
    loss = NegativeELBO(guide, 4)((y,))
    assert loss.item() == pytest.approx(-gaussian_evidence(y), abs=1e-10)


def test_the_loss_is_the_mean_over_its_draws() -> None:
    y = gaussian_data()
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    for estimator in ("stl", "total"):
        pyro.set_rng_seed(4)
        u, log_q = guide.get_posterior().rsample_and_log_prob((8,))
        expected = (log_q - guide.log_joint(u, y)).mean().item()
        pyro.set_rng_seed(4)
        loss = NegativeELBO(guide, 8, estimator)((y,))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
