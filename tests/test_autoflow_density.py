"""AutoFlow's density: packing, summaries, where it starts, and the flows it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_mean, init_to_value
from torch import Tensor
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import ContextError, ShapeError
from pyroflows.guides import default_flow
from tests.models import (
    exact_gaussian_guide,
    gaussian_data,
    gaussian_posterior,
)

# --- pack, unpack, log_prob -----------------------------------------------------------------------


def several() -> None:
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 3):
        pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    pyro.sample("factor", dist.LKJCholesky(3, 1.0))


def double(guide: pf.AutoFlow) -> pf.AutoFlow:
    guide.flow.double()
    return guide


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (4, 1)])
def test_pack_undoes_unpack(leading: tuple[int, ...]) -> None:
    guide = pf.AutoFlow(several, example_args=())
    assert guide.latent_shapes == {"scale": (), "loc": (3, 2), "share": (2,), "factor": (3,)}
    u = torch.randn(*leading, 12, dtype=torch.float64)
    values = guide.unpack(u)
    shapes = {"scale": (), "loc": (3, 2), "share": (3,), "factor": (3, 3)}
    assert {k: tuple(v.shape) for k, v in values.items()} == {
        k: (*leading, *shape) for k, shape in shapes.items()
    }
    assert torch.allclose(guide.pack(values), u, atol=1e-8)


def test_pack_broadcasts_leading_dimensions() -> None:
    guide = pf.AutoFlow(several, example_args=())
    values = guide.unpack(torch.randn(5, 1, 12))
    values["scale"] = torch.rand(4)
    packed = guide.pack(values)
    assert packed.shape == (5, 4, 12)
    assert torch.allclose(packed[..., 0].exp(), values["scale"].expand(5, 4))
    assert guide.log_prob(values).shape == (5, 4)


def test_pack_and_unpack_say_what_is_wrong() -> None:
    guide = pf.AutoFlow(several, example_args=())
    values = guide.unpack(torch.randn(2, 12))
    with pytest.raises(ShapeError, match=r"latents: expected shape \(\*batch, 12\), got \(11,\)"):
        guide.unpack(torch.zeros(11))
    with pytest.raises(ValueError, match=r"expected the sites \['scale', .*\], got \['scale'\]"):
        guide.pack({"scale": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"got .*'surplus'"):
        guide.pack({**values, "surplus": torch.tensor(1.0)})
    with pytest.raises(ShapeError, match=r"loc: expected shape \(\*batch, 3, 2\), got \(2, 3\)"):
        guide.pack({**values, "loc": torch.zeros(2, 3)})
    fresh = pf.AutoFlow(several)
    for call in (lambda: fresh.unpack(torch.zeros(12)), lambda: fresh.latent_shapes):
        with pytest.raises(RuntimeError, match=r"call guide.*once, or pass example_args"):
            call()


ONE_DIMENSIONAL: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "real": (lambda: dist.Normal(0.0, 2.0), torch.linspace(-60, 60, 40_001)),
    "positive": (lambda: dist.LogNormal(0.0, 1.0), torch.linspace(-20, 6, 40_001).exp()),
    "interval": (lambda: dist.Uniform(-1.0, 3.0), torch.linspace(-1 + 1e-6, 3 - 1e-6, 40_001)),
}


@pytest.mark.parametrize("name", ONE_DIMENSIONAL)
def test_log_prob_integrates_to_one_on_constrained_values(name: str) -> None:
    prior, grid = ONE_DIMENSIONAL[name]
    grid = grid.double()
    guide = double(pf.AutoFlow(lambda: pyro.sample("z", prior()), example_args=(), init_scale=0.5))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        density = guide.log_prob({"z": grid}).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-3)


def test_log_prob_in_closed_form() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide, posterior = exact_gaussian_guide(y), gaussian_posterior(y)
    values = posterior.sample((3, 4))
    assert torch.allclose(guide.log_prob({"mean": values}, y), posterior.log_prob(values))
    log_normal = pf.AutoFlow(
        lambda: pyro.sample("z", dist.LogNormal(1.5, 0.3)),
        init_loc_fn=init_to_value(values={"z": torch.tensor(1.5).exp()}),
        init_scale=0.3,
        example_args=(),
    )
    z = torch.tensor([0.5, 3.0, 9.0])
    expected = dist.LogNormal(1.5, 0.3).log_prob(z)
    assert torch.allclose(log_normal.log_prob({"z": z}), expected, rtol=1e-4)


# --- summaries ------------------------------------------------------------------------------------


def test_sample_has_one_leading_dimension_and_no_gradient() -> None:
    guide = pf.AutoFlow(several, example_args=())
    draws = guide.sample(6)
    shapes = {"scale": (6,), "loc": (6, 3, 2), "share": (6, 3), "factor": (6, 3, 3)}
    assert {name: tuple(value.shape) for name, value in draws.items()} == shapes
    assert not any(value.requires_grad for value in draws.values())
    assert guide.sample(0)["share"].shape == (0, 3)


def test_quantiles_and_median() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide, posterior = exact_gaussian_guide(y), gaussian_posterior(y)
    state = torch.random.get_rng_state()
    quantiles = guide.quantiles([0.05, 0.5, 0.95], y)["mean"]
    median = guide.median(y)["mean"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert quantiles.shape == (3, 2)
    # Standard error of a 5% quantile of 10,000 draws: 0.02 standard deviations.
    z = torch.tensor([-1.6449, 0.0, 1.6449], dtype=torch.float64).unsqueeze(-1)
    expected = posterior.mean + z * posterior.stddev
    assert ((quantiles - expected).abs() < 0.08 * posterior.stddev).all()
    assert torch.equal(median, quantiles[1])


def test_quantiles_are_taken_before_the_constraint() -> None:
    guide = pf.AutoFlow(several, example_args=())
    quantiles = guide.quantiles(torch.tensor([0.1, 0.9]))
    assert quantiles["share"].shape == (2, 3)
    assert torch.allclose(quantiles["share"].sum(-1), torch.ones(2))
    assert constraints.corr_cholesky.check(quantiles["factor"]).all()
    assert quantiles["scale"][0] < quantiles["scale"][1]


# --- where it starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("init_scale", [0.1, 2.0])
def test_it_starts_at_the_model_with_the_given_scale(init_scale: float) -> None:
    values = {"scale": torch.tensor(3.0), "loc": torch.arange(6.0).reshape(3, 2)}
    guide = pf.AutoFlow(
        several, init_loc_fn=init_to_value(values=values), init_scale=init_scale, example_args=()
    )
    with torch.no_grad():
        u = guide.get_posterior().sample((20_000,))
    start = torch.cat([values["scale"].log()[None], values["loc"].flatten()])
    assert torch.allclose(u.mean(0)[:7], start, atol=5 * init_scale / 20_000**0.5)
    assert torch.allclose(u.std(0), torch.full((12,), init_scale), rtol=0.03)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_init_scale_is_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="init_scale: expected a positive number"):
        pf.AutoFlow(several, init_scale=scale)


def test_a_start_outside_the_support() -> None:
    init = init_to_value(values={"z": torch.tensor(float("inf"))})
    with pytest.raises(ValueError, match="init_loc_fn: expected finite unconstrained values"):
        pf.AutoFlow(
            lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), init_loc_fn=init, example_args=()
        )


# --- flows it is given ----------------------------------------------------------------------------


def test_the_transform_is_fresh_per_call() -> None:
    guide = pf.AutoFlow(several, example_args=())
    first = guide.get_transform()
    assert first is not guide.get_transform()
    z = torch.randn(12)
    before = first(z).detach()
    with torch.no_grad():
        guide.flow.transform.standardization.loc.add_(1.0)
    assert torch.allclose(guide.get_transform()(z), before + 1.0)
    x = guide.get_transform()(z)
    posterior, base = guide.get_posterior(), guide.get_base_dist()
    expected = base.log_prob(z) - guide.get_transform().log_abs_det_jacobian(z, x)
    assert torch.allclose(posterior.log_prob(x.clone()), expected, rtol=1e-4)


def test_a_fitted_flow_keeps_its_place() -> None:
    flow = pf.RealNVP(12, transforms=2, hidden_features=(8,))
    x = 5.0 + 2.0 * torch.randn(100, 12)
    pf.fit_mle(flow, x, steps=2, seed=0, progress=False)
    before = flow().log_prob(x).detach()
    guide = pf.AutoFlow(several, flow, init_loc_fn=init_to_mean, example_args=())
    assert guide.flow is flow
    assert torch.equal(guide.get_posterior().log_prob(x), before)


@pytest.mark.parametrize("flow", [pf.RealNVP(3), lambda features: pf.NSF(features + 1)])
def test_a_flow_of_another_size(flow: Any) -> None:
    with pytest.raises(ValueError, match="expected 12 features, the model's latent dimension, got"):
        pf.AutoFlow(several, flow, example_args=())


@pytest.mark.parametrize("flow", ["nsf", 3])
def test_something_that_is_no_flow(flow: Any) -> None:
    with pytest.raises(TypeError, match="flow: expected a pyroflows Flow or a callable"):
        pf.AutoFlow(several, flow)
    with pytest.raises(TypeError, match="flow: expected a pyroflows Flow, got"):
        pf.AutoFlow(several, lambda features: flow, example_args=())


@pytest.mark.parametrize("features", [1, 2, 501])
def test_the_default_flow_is_the_identity_in_one_pass(features: int) -> None:
    flow = default_flow(features)
    assert not flow.transform.sequential_forward
    assert not flow.transform.sequential_inverse
    x = torch.randn(3, features)
    assert torch.allclose(flow.transform(x), x, atol=1e-5)


class Amortised(pf.AutoFlow):
    """The posterior of one group given its data, by a context of summaries."""

    def get_context(self, *args: Any, **kwargs: Any) -> Tensor:
        (y,) = args
        return torch.stack([y.mean(-1), y.std(-1)], -1)


def one_group(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", y.shape[-1]):
        pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


def test_a_conditional_flow_by_an_overridden_context() -> None:
    flow = pf.RealNVP(1, context=2, transforms=2, hidden_features=(16,))
    guide = Amortised(one_group, flow, init_scale=0.3, example_args=(torch.randn(8),))
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    for _ in range(300):
        y = torch.randn(()) + 0.5 * torch.randn(8)
        loss = pf.training.NegativeELBO(guide, draws=16)((y,))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for center in (-1.0, 1.5):
        y = center + 0.5 * torch.randn(8)
        expected = 4 * y.sum() / (1 + 4 * 8)
        assert guide.median(y)["loc"].item() == pytest.approx(expected.item(), abs=0.15)
    with pytest.raises(ContextError, match="expected a context of shape"):
        pf.AutoFlow(one_group, flow, name="plain").get_posterior(torch.randn(8))
