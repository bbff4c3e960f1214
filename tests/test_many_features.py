"""A thousand features, and many layers: what stays finite, and how fast."""

from __future__ import annotations

import math
import time
from typing import Any

import pyro
import pytest
import torch
from pyro.distributions import Normal, StudentT
from torch import Tensor

import pyroflows as pf
from pyroflows.testing import check_close
from pyroflows.testing.tools import relative

pytestmark = pytest.mark.slow

FEATURES = 1000

# Recipes whose cost for each row is linear in the features times the width, as long as nothing
# mixes all features densely. Not among them: BNAF, whose network is as wide as all features
# together; ResidualFlow, whose log-determinant needs a Jacobian or a series of products; CNF, whose
# trace needs a derivative for each feature or noise; TransformerAR, whose attention is quadratic.
LINEAR: dict[str, dict[str, Any]] = {
    "NSF": {"mixing": None},
    "NCSF": {},
    "RealNVP": {"mixing": None},
    "NICE": {"mixing": None},
    "MAF": {"mixing": None},
    "IAF": {"mixing": None},
    "NAF": {"mixing": None},
    "UNAF": {"mixing": None},
    "SOSPF": {"mixing": None},
    "BPF": {"mixing": None},
    "FlowPP": {"mixing": None},
    "GF": {"mixing": "permutation"},
    "Planar": {},
    "Radial": {},
    "Sylvester": {"rank": 8},
}
# A step moves all weights alike, and a thousand of them add up in each output: at a rate of 1e-3
# MAF, UNAF and SOSPF get worse in the first five steps, by up to 1e7 nats, though all stays finite.
RATE = 1e-4
# In two layers: parameters by the square of the width of their hidden layers, or roots.
LARGE = ("NAF", "UNAF", "SOSPF", "BPF")


def rows(name: str, count: int) -> Tensor:
    """Correlated, standard deviations of about one; angles where the recipe maps these."""
    x = torch.randn(count, FEATURES)
    x = x + x.cumsum(-1) / FEATURES**0.5
    return x.remainder(2 * math.pi) - math.pi if name == "NCSF" else x


def loss(flow: pf.Flow, x: Tensor) -> Tensor:
    """By maximum likelihood; for IAF, whose draws alone are cheap, against a wide normal."""
    if isinstance(flow, pf.IAF):
        draws, score = flow().rsample_and_log_prob((len(x),))
        return (score + draws.square().sum(-1) / 8).mean()
    return -flow().log_prob(x).mean()


@pytest.mark.parametrize(("name", "options"), LINEAR.items(), ids=LINEAR)
def test_a_thousand_features(name: str, options: dict[str, Any]) -> None:
    start = time.perf_counter()
    flow = pf.get_flow(name)(FEATURES, **options)
    assert time.perf_counter() - start < 5.0
    if name in LARGE:
        flow = pf.get_flow(name)(FEATURES, transforms=2, **options)
    x = rows(name, 32)
    optimizer = torch.optim.Adam(flow.parameters(), RATE)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(flow, x)
        value.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        draws = flow().sample((4,))
        assert draws.isfinite().all()
        some = torch.cat([x[:2], draws[:2]])
        single = flow().log_prob(some)
        double = flow.double()().log_prob(some.double())
    assert single.isfinite().all()
    check_close("float32", single.double(), double, relative(1e-4, double))


def deep(features: int) -> pf.Flow:
    """64 couplings, each of which may stretch by exp(2)."""
    return pf.RealNVP(features, transforms=64, hidden_features=(16,), mixing=None)


def test_64_couplings_stay_finite_by_maximum_likelihood() -> None:
    x = torch.randn(4000, 16)
    x = x + 0.5 * x.square().roll(1, -1)
    # Heavy tails, up to hundreds of quartiles.
    x[:, 0] = (3 * x[:, 0]).sinh()
    flow = deep(16)
    fit = pf.fit_mle(flow, x, steps=2000, batch_size=64, patience=None, progress=False)
    assert len(fit.history.losses) == 2000
    assert torch.tensor(fit.history.losses).isfinite().all()
    with torch.no_grad():
        assert flow().sample((1000,)).isfinite().all()
        assert flow().log_prob(x).isfinite().all()
        # Far beyond the data 64 slopes may multiply to 1e28 and more, whose square float32 takes
        # for infinite: a density of zero then, not NaN.
        assert not flow().log_prob(100 * x).isnan().any()


def heavy() -> None:
    """A funnel over fifteen Student-t variables."""
    scale = pyro.sample("scale", Normal(0.0, 1.5)).exp()
    with pyro.plate("variables", 15):
        pyro.sample("x", StudentT(3.0, 0.0, scale))


def test_64_couplings_stay_finite_as_a_guide() -> None:
    guide = pf.AutoFlow(heavy, deep)
    fit = pf.fit_svi(guide, draws=16, steps=200, psis_samples=1000, progress=False)
    losses = torch.tensor(fit.history.losses)
    assert losses.isfinite().all()
    assert losses[-50:].mean() < losses[:10].mean()
    assert all(p.isfinite().all() for p in guide.parameters())
