"""The benchmark's posteriors are those of their reference draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from tests.benchmarks.vi import models
from tests.benchmarks.vi.models import REFERENCES

#: Batches of consecutive draws, ten in each chain, whose means give the standard errors.
BATCHES = 100
#: Standard errors; of 168 of them, one beyond has a chance of 2 in 100.
TOLERANCE = 4.0
NAMES = [posterior.name for posterior in models.POSTERIORS]
POSTERIORS = {posterior.name: posterior for posterior in models.POSTERIORS}


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def deviations(values: Tensor, expected: float) -> Tensor:
    """Means of ``(draws, D)`` less what is expected, in their standard errors."""
    batches = values.reshape(BATCHES, -1, values.shape[-1]).mean(1)
    return (batches.mean(0) - expected) / (batches.std(0) / BATCHES**0.5)


def score_identities(model: Callable[..., Any], name: str) -> Tensor:
    r"""Both identities of the score over the reference draws, in standard errors.

    For draws u of a density p, :math:`E[\nabla \log p(u)] = 0` and, coordinate by coordinate,
    :math:`E[(u - E u) \nabla \log p(u)] = -1`.
    """
    args = POSTERIORS[name].args()
    guide = pf.AutoFlow(model, example_args=args)
    u = guide.pack(REFERENCES[name].draws()).requires_grad_()
    parts = [guide.log_joint(part, *args).sum() for part in u.split(1000)]
    (score,) = torch.autograd.grad(torch.stack(parts).sum(), u)
    u = u.detach()
    return torch.cat([deviations(score, 0.0), deviations((u - u.mean(0)) * score, -1.0)])


@pytest.mark.data
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_translation(name: str) -> None:
    posterior = POSTERIORS[name]
    assert score_identities(posterior.model, name).abs().max() < TOLERANCE
    # What the model's draws are compared by is what the reference has.
    derived = posterior.scalars(REFERENCES[name].draws())
    for scalar, value in REFERENCES[name].scalars().items():
        assert torch.allclose(derived[scalar], value, rtol=1e-6, atol=1e-6), scalar


def schools_with_a_wider_prior(errors: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 6.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta_trans, errors), obs=y)


WRONG = {
    # Its prior of the noise is half Cauchy, in a data set of 434 rows.
    "kidscore_momiq": models.flat_regression,
    "eight_schools_noncentered": schools_with_a_wider_prior,
}


@pytest.mark.data
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prior_shows(name: str) -> None:
    assert score_identities(WRONG[name], name).abs().max() > TOLERANCE
