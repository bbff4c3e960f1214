"""The model's log density over many draws at once, against densities written by hand."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from torch.distributions import biject_to

import pyroflows as pf
from pyroflows.errors import DependentSupportError, ShapeError
from tests.models import (
    COUNTS,
    MIXTURE_DATA,
    gamma_poisson,
    mixture,
    mixture_log_joint,
)

# --- log_joint ------------------------------------------------------------------------------------


def gamma_poisson_density(values: dict[str, Tensor], y: Tensor) -> Tensor:
    rate = values["rate"]
    prior = dist.Gamma(3.0, 2.0).log_prob(rate)
    return prior + dist.Poisson(rate.unsqueeze(-1)).log_prob(y).sum(-1)


def nested(y: Tensor) -> None:
    """Latents in an outer and an inner plate, with event dimensions."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", 3, dim=-1):
        group = pyro.sample("group", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 4, dim=-2):
            row = pyro.sample("row", dist.Normal(group, scale.unsqueeze(-1)).to_event(1))
            pyro.sample("y", dist.Normal(row.sum(-1), 1.0), obs=y)


def nested_density(values: dict[str, Tensor], y: Tensor) -> Tensor:
    scale, group, row = values["scale"], values["group"], values["row"]
    spread = scale[:, None, None, None]
    return (
        dist.LogNormal(0.0, 0.5).log_prob(scale)
        + dist.Normal(0.0, 1.0).log_prob(group).sum((1, 2))
        + dist.Normal(group.unsqueeze(1), spread).log_prob(row).sum((1, 2, 3))
        + dist.Normal(row.sum(-1), 1.0).log_prob(y).sum((1, 2))
    )


def without_plates(y: Tensor) -> None:
    """Batch dimensions that nothing declares, as in many a model of Stan's style."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def without_plates_density(values: dict[str, Tensor], y: Tensor) -> Tensor:
    loc = values["loc"]
    return (dist.Normal(0.0, 1.0).log_prob(loc) + dist.Normal(loc, 1.0).log_prob(y)).sum(-1)


def with_item(y: Tensor) -> None:
    """Reads a number out of a draw, which neither a plate nor vmap can do."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(2.0 * loc.item(), 1.0).expand([3]).to_event(1), obs=y)


def with_item_density(values: dict[str, Tensor], y: Tensor) -> Tensor:
    loc = values["loc"]
    likelihood = dist.Normal(2.0 * loc.unsqueeze(-1), 1.0).log_prob(y).sum(-1)
    return dist.Normal(0.0, 1.0).log_prob(loc) + likelihood


def simplex(y: Tensor) -> None:
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Categorical(share), obs=y)


def simplex_density(values: dict[str, Tensor], y: Tensor) -> Tensor:
    share = values["share"]
    prior = dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).log_prob(share)
    return prior + share.log()[:, y].sum(-1)


Density = Callable[[dict[str, Tensor], Tensor], Tensor]
MODELS: dict[str, tuple[Callable[..., None], Density, Tensor, str]] = {
    "vectorised": (gamma_poisson, gamma_poisson_density, COUNTS, "plate"),
    "nested plates": (nested, nested_density, torch.arange(12.0).reshape(4, 3) / 6, "plate"),
    "enumerated": (mixture, mixture_log_joint, MIXTURE_DATA, "plate"),
    "simplex": (simplex, simplex_density, torch.tensor([0, 2, 2, 1]), "plate"),
    "no plates": (without_plates, without_plates_density, torch.ones(3), "vmap"),
    "item()": (with_item, with_item_density, torch.ones(3), "loop"),
}


def jacobian(guide: pf.AutoFlow, u: Tensor) -> Tensor:
    """log|det dz/du| of all sites together."""
    total = u.new_zeros(len(u))
    sizes = [math.prod(shape) for shape in guide.latent_shapes.values()]
    parts = u.split(sizes, -1)
    for (_, site), part in zip(guide.prototype_trace.iter_stochastic_nodes(), parts, strict=True):
        to_support = biject_to(site["fn"].support)
        x = part.reshape(len(u), *guide.latent_shapes[site["name"]])
        total = total + to_support.log_abs_det_jacobian(x, to_support(x)).reshape(len(u), -1).sum(1)
    return total


@pytest.mark.parametrize("draws", [0, 1, 2, 7])
@pytest.mark.parametrize("name", MODELS)
def test_log_joint(name: str, draws: int, caplog: pytest.LogCaptureFixture) -> None:
    model, density, y, strategy = MODELS[name]
    guide = pf.AutoFlow(model, example_args=(y,))
    u = torch.randn(draws, guide.latent_dim)
    with caplog.at_level(logging.WARNING, "pyroflows"):
        got = guide.log_joint(u, y)
    assert got.shape == (draws,)
    if not draws:
        return
    expected = density(guide.unpack(u), y) + jacobian(guide, u)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    said = "does not broadcast over draws" in caplog.text
    assert said == (draws >= 2 and strategy != "plate")
    if said:
        assert {"vmap": "using vmap", "loop": "one by one"}[strategy] in caplog.text


@pytest.mark.parametrize("name", [name for name in MODELS if name != "item()"])
def test_log_joint_has_the_gradients_of_single_draws(name: str) -> None:
    model, _, y, _ = MODELS[name]
    guide = pf.AutoFlow(model, example_args=(y,))
    u = torch.randn(5, guide.latent_dim, requires_grad=True)
    (together,) = torch.autograd.grad(guide.log_joint(u, y).sum(), u)
    (single,) = torch.autograd.grad(sum(guide.log_joint(row[None], y).sum() for row in u), u)
    assert torch.allclose(together, single, rtol=1e-4, atol=1e-4)


def test_log_joint_of_a_subsampled_likelihood() -> None:
    """All draws see one minibatch, scaled up to the full plate."""

    def model(y: Tensor, index: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        how = {"subsample_size": 3} if index is None else {"subsample": index}
        with pyro.plate("rows", len(y), **how) as chosen:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[chosen])

    y = torch.randn(12)
    guide = pf.AutoFlow(model, example_args=(y,))
    u = torch.randn(6, 1)
    index = torch.tensor([1, 5, 7])
    likelihood = dist.Normal(u, 1.0).log_prob(y[index]).sum(-1) * (12 / 3)
    expected = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + likelihood
    assert torch.allclose(guide.log_joint(u, y, index), expected, rtol=1e-5)
    twice = guide.log_joint(u[:1].expand(4, 1), y)
    assert torch.equal(twice, twice[:1].expand(4))
    assert guide._log_joint.strategy == "plate"


def test_log_joint_is_nan_where_the_model_is_undefined() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, z), obs=y)  # no scale below zero

    y = torch.tensor(0.5)
    guide = pf.AutoFlow(model, init_loc_fn=init_to_value(values={"z": torch.tensor(1.0)}))
    guide.register(y)
    for u in (torch.tensor([[-1.0], [1.0], [-2.0]]), torch.tensor([[-1.0]])):
        assert guide.log_joint(u, y).isnan().tolist() == (u[:, 0] < 0).tolist()
    covariance_of = pf.AutoFlow(_not_always_positive_definite, example_args=())
    got = covariance_of.log_joint(torch.tensor([[0.5], [2.0], [-0.5]]))
    assert got.isnan().tolist() == [False, True, False]


def test_one_matrix_without_a_factor_costs_few_evaluations() -> None:
    calls: list[int] = []

    def model() -> None:
        calls.append(1)
        _not_always_positive_definite()

    guide = pf.AutoFlow(model, example_args=())
    u = torch.linspace(-0.5, 0.5, 64).unsqueeze(-1)
    expected = guide.log_joint(u)
    calls.clear()
    u[10] = 2.0
    got = guide.log_joint(u)
    assert got.isnan().nonzero().tolist() == [[10]]
    torch.testing.assert_close(got[11:], expected[11:])
    assert len(calls) < 2 * 7  # halved six times, not one by one


def _not_always_positive_definite() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 0.1))
    ones, off = torch.ones_like(z), z
    rows = torch.stack([torch.stack([ones, off], -1), torch.stack([off, ones], -1)], -2)
    factor = torch.linalg.cholesky(rows)
    normal = dist.MultivariateNormal(torch.zeros(2), scale_tril=factor)
    pyro.sample("y", normal, obs=torch.ones(2))


def test_log_joint_asks_for_draws_in_rows() -> None:
    guide = pf.AutoFlow(gamma_poisson, example_args=(COUNTS,))
    with pytest.raises(ValueError, match=r"latents: expected shape \(draws, 1\), got \(1,\)"):
        guide.log_joint(torch.zeros(1), COUNTS)
    with pytest.raises(ShapeError, match=r"latents: expected shape \(\*batch, 1\), got \(3, 2\)"):
        guide.log_joint(torch.zeros(3, 2), COUNTS)


def test_a_support_that_depends_on_another_latent_is_named() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Uniform(1.0, 2.0))
        pyro.sample("b", dist.Uniform(0.0, a))

    with pytest.raises(DependentSupportError, match=r"site 'b': its support depends.*'share'"):
        pf.fit_svi(pf.AutoFlow(model), progress=False)


def test_supports_of_all_kinds_may_stay_as_they_are() -> None:
    def model() -> None:
        pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
        pyro.sample("corner", dist.LKJCholesky(3, 2.0))
        pyro.sample("box", dist.Uniform(torch.tensor([0.0, -1.0]), 2.0).to_event(1))
        pyro.sample("count", dist.Gamma(2.0, 1.0))

    report = pf.fit_svi(pf.AutoFlow(model), seed=0, budget=0, progress=False).psis
    assert report.log_evidence == pytest.approx(0.0, abs=0.1)
