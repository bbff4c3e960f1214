"""What the README says of Pyro alone. A failure is good news: then the README's table changes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_autoregressive, affine_coupling, planar
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.optim import Adam

coupling = partial(affine_coupling, hidden_dims=[16])


def model() -> None:
    loc, scale = torch.full((3,), 3.0), torch.tensor([1.0, 0.1, 0.5])
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def losses(model: Callable[[], Any], guide: Any, steps: int, lr: float = 0.02) -> list[float]:
    svi = SVI(model, guide, Adam({"lr": lr}), Trace_ELBO())
    return [svi.step() for _ in range(steps)]


def standard(transform: Any, features: int) -> Any:
    base = dist.Normal(torch.zeros(features), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [transform])


def test_a_planar_flow_does_not_score_data() -> None:
    with pytest.raises(KeyError):
        standard(planar(2), 2).log_prob(torch.zeros(2))


def test_an_autoregressive_score_takes_a_pass_for_each_feature() -> None:
    transform, calls = affine_autoregressive(4, hidden_dims=[16]), []
    transform.arn.register_forward_hook(lambda *_: calls.append(1))
    standard(transform, 4).log_prob(torch.zeros(4))
    assert len(calls) == 4


def test_a_second_guide_does_not_train() -> None:
    first = AutoNormalizingFlow(model, coupling)
    assert fmean(losses(model, first, 200)[-20:]) < 10
    second = losses(model, AutoNormalizingFlow(model, coupling), 200)
    assert fmean(second[-20:]) > 0.5 * fmean(second[:20])


def test_a_loaded_param_store_is_ignored(tmp_path: Path) -> None:
    guide = AutoNormalizingFlow(model, coupling)
    trained = fmean(losses(model, guide, 200)[-20:])
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    del guide
    gc.collect()
    pyro.get_param_store().load(tmp_path / "store")
    guide = AutoNormalizingFlow(model, coupling)
    guide()
    assert fmean(Trace_ELBO().loss(model, guide) for _ in range(20)) > 10 * trained


def test_a_double_model_gets_a_single_precision_guide() -> None:
    def double() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))

    assert AutoNormalizingFlow(double, coupling)()["z"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_flow_guide_under_the_jit_fails() -> None:
    svi = SVI(model, AutoNormalizingFlow(model, coupling), Adam({}), JitTrace_ELBO())
    with pytest.raises(AssertionError):
        svi.step()


def test_a_far_prior_is_not_found() -> None:
    def far() -> None:
        pyro.sample("z", dist.Normal(torch.full((20,), 50.0), 0.1).to_event(1))

    assert losses(far, AutoNormalizingFlow(far, coupling), 300, lr=0.005)[-1] > 1e5


def test_local_latents_are_guided_without_a_word() -> None:
    def local() -> None:
        with pyro.plate("rows", 100, subsample_size=10):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    losses(local, AutoNormalizingFlow(local, coupling), 2)


def test_arviz_takes_no_guide() -> None:
    guide = AutoNormalizingFlow(model, coupling)
    guide()
    with pytest.raises(AttributeError):
        arviz.from_pyro(guide)
