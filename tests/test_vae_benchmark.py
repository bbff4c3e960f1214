"""The benchmark of autoencoders: its bound, and the lead of flows on digits."""

from __future__ import annotations

import pyro
import pytest
import torch

from tests.benchmarks import vae


def test_the_bound_rises_with_the_draws_and_is_near_the_likelihood() -> None:
    """With a decoder that ignores its latent the likelihood is known, whatever the weights."""
    pytest.importorskip("sklearn")
    x = vae.digits(0)[1][:20]
    auto = vae.Autoencoder(flows=True)
    last = auto.decoder[-1]  # type: ignore[index]
    torch.nn.init.zeros_(last.weight)
    exact = torch.distributions.Binomial(16, logits=last.bias).log_prob(x).sum(-1)
    bounds = [vae.importance_bound(auto, x, draws) for draws in (1, 2000)]
    assert bounds[0].mean() < bounds[1].mean() + 1e-3
    torch.testing.assert_close(bounds[1], exact, rtol=0.02, atol=0.5)


@pytest.mark.slow
def test_flows_lead_on_digits() -> None:
    """By four nats on the page: here, two standard errors above one."""
    pytest.importorskip("sklearn")
    pyro.clear_param_store()
    bounds, _ = vae.run(seed=0, steps=vae.STEPS)
    gain = bounds[1] - bounds[0]
    assert gain.mean() - 2 * gain.std() / len(gain) ** 0.5 > 1.0
