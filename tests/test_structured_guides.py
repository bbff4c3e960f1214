"""Guides made of parts: groups of sites, Pyro's own autoguides beside, handlers around."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import Tensor

import pyroflows as pf
from pyroflows.distributions import Modes, StudentT
from pyroflows.layers import Chain
from tests.models import gaussian, gaussian_data, gaussian_evidence

FIT: dict[str, Any] = {"seed": 0, "progress": False, "psis_samples": 2000}


def three(y: Tensor | None = None) -> None:
    """A bent posterior of three sites: b depends on a, c on both."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a.unsqueeze(-1) ** 2 * torch.ones(2), 0.3).to_event(1))
    c = pyro.sample("c", dist.LogNormal(a, 0.5))
    pyro.sample("y", dist.Normal(b.sum(-1) + c.log(), 0.5), obs=y)


# --- groups ---------------------------------------------------------------------------------------


def grouped(*groups: list[str], flow: Any = None) -> pf.AutoFlow:
    return pf.AutoFlow(three, flow, groups=groups, example_args=(torch.tensor(1.0),))


def test_later_groups_depend_on_earlier_ones_and_not_the_other_way() -> None:
    guide = grouped(["c"], ["b", "a"], flow=pf.NSF)
    assert list(guide.latent_shapes) == ["c", "b", "a"]
    for parameter in guide.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    transform = guide.get_transform()
    jacobian = torch.autograd.functional.jacobian(transform, torch.randn(4))
    assert jacobian[0, 0] != 0
    assert (jacobian[0, 1:] == 0).all()
    assert (jacobian[1:] != 0).all()
    x = torch.randn(5, 4)
    torch.testing.assert_close(transform.inv(transform(x)), x, rtol=1e-4, atol=1e-4)


def test_values_follow_their_names() -> None:
    guide = grouped(["c"], ["b", "a"])
    assert isinstance(guide.flow.base, Modes)
    draws = guide.sample(50)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {"c": (50,), "b": (50, 2), "a": (50,)}
    assert (draws["c"] > 0).all()
    latents = guide.pack(draws)
    torch.testing.assert_close(latents[:, 0].exp(), draws["c"])
    torch.testing.assert_close(latents[:, 3], draws["a"])
    trace = poutine.trace(guide).get_trace(torch.tensor(1.0))
    assert trace.nodes["b"]["value"].shape == (2,)


@pytest.mark.parametrize("flow", [None, [None, pf.RealNVP]], ids=["default", "a list"])
def test_groups_reach_the_posterior(flow: Any) -> None:
    y = torch.tensor(1.0)
    # Given a, y is normal: the evidence is an integral over a.
    a = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    given = dist.Normal(2 * a**2 + a, (2 * 0.3**2 + 0.5**2 + 0.5**2) ** 0.5).log_prob(y)
    evidence = (dist.Normal(0.0, 1.0).log_prob(a) + given).logsumexp(0) + math.log(16 / 4000)
    guide = pf.AutoFlow(three, flow, groups=[["a"], ["b", "c"]])
    report = pf.fit_svi(guide, y, steps=150, draws=64, **FIT).psis
    assert report is not None
    assert report.log_evidence == pytest.approx(evidence.item(), abs=0.1)
    assert report.ess > 0.6 * 2000


def test_one_group_of_all_is_the_flow_itself() -> None:
    guide = grouped(["b", "a", "c"], flow=pf.NSF)
    assert isinstance(guide.flow, pf.NSF)
    assert list(guide.latent_shapes) == ["b", "a", "c"]


def test_grouped_guides_are_saved_copied_and_used_by_pyro(tmp_path: Path) -> None:
    y = torch.tensor(1.0)
    guide = grouped(["c"], ["b", "a"], flow=pf.NSF)
    values = guide.sample(5)
    twin = copy.deepcopy(guide)
    torch.testing.assert_close(twin.log_prob(values), guide.log_prob(values))
    pickle.loads(pickle.dumps(guide.state_dict()))
    path = tmp_path / "guide.safetensors"
    pf.save(guide, path)
    again = pf.load(path, model=three, example_args=(y,))
    assert list(again.latent_shapes) == ["c", "b", "a"]
    assert torch.equal(again.log_prob(values), guide.log_prob(values))
    second = tmp_path / "again.safetensors"
    pf.save(again, second)
    svi = SVI(three, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert torch.tensor(svi.step(y)).isfinite()
    assert Predictive(three, guide=guide, num_samples=3)(y)["b"].shape[:1] == (3,)


@pytest.mark.parametrize(
    ("groups", "flow", "error", "message"),
    [
        ([["a", "b"]], None, ValueError, r"\['a', 'b', 'c'\] in one group, but 'c' is in none"),
        ([["a", "b"], ["c", "d"]], None, ValueError, "no latent site 'd'"),
        ([["a", "b"], ["c", "a"]], None, ValueError, "'a' is in two"),
        ([["a", "b", "c"], []], None, ValueError, "one group is empty"),
        (["a", "b"], None, TypeError, "lists of names"),
        ([["a"], ["b", "c"]], [pf.NSF], ValueError, "one for each of 2 groups, got 1"),
        ([["a"], ["b", "c"]], pf.NSF(4), TypeError, "callables from features and context"),
        ([["a"], ["b", "c"]], lambda *n: 3, TypeError, r"group 0 \['a'\]: .* got 3 from"),
        (
            [["a"], ["b", "c"]],
            lambda features, context=0: pf.NSF(features),
            ValueError,
            r"group 1 \['b', 'c'\]: expected 3 features and a context of size 1, .* of size 0",
        ),
        (
            [["a"], ["b", "c"]],
            lambda *n: pf.NSF(*n, base=StudentT(n[0])),
            ValueError,
            "standard normal as base, got StudentT",
        ),
    ],
)
def test_groups_that_are_refused(groups: Any, flow: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pf.AutoFlow(three, flow, groups=groups, example_args=(torch.tensor(1.0),))


def test_a_chain_wants_a_size_for_each_part() -> None:
    with pytest.raises(ValueError, match="one for each of 1 parts"):
        Chain([pf.layers.LULinear(2)], [2, 3])


# --- beside Pyro's own guides ---------------------------------------------------------------------


def hierarchy(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def steps(
    model: Any, guide: Any, *args: Any, count: int, lr: float = 0.02, elbo: Any = None
) -> list[float]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(count)]


@pytest.mark.parametrize(
    "other", [AutoDelta, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal]
)
def test_beside_every_guide_of_pyro(other: Any) -> None:
    y = 3 + torch.randn(6)
    guide = AutoGuideList(hierarchy)
    guide.append(pf.AutoFlow(poutine.block(hierarchy, expose=["loc", "scale"])))
    guide.append(other(poutine.block(hierarchy, expose=["z"])))
    losses = steps(hierarchy, guide, y, count=100)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert set(guide(y)) == {"loc", "scale", "z"}
    assert guide.median(y)["z"].shape == (6,)


def test_an_amortised_flow_and_a_normal_side_by_side() -> None:
    y = 6 + torch.randn(50)

    def model(y: Tensor) -> None:
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 50, subsample_size=10) as rows:
            z = pyro.sample("z", dist.Normal(3.0, 1.0))
            pyro.sample("y", dist.Normal(z + offset, 0.5), obs=y[rows])

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["offset"])))
    encoders = {"z": torch.nn.Linear(1, 4)}
    guide.append(pf.AutoAmortizedFlow(poutine.block(model, hide=["offset"]), encoders))
    losses = steps(model, guide, y, count=100, lr=0.003)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    trace = poutine.trace(guide).get_trace(y)
    seen = poutine.trace(poutine.replay(model, trace=trace)).get_trace(y)
    assert torch.equal(seen.nodes["y"]["value"], y[trace.nodes["rows"]["value"]])


def test_enumerated_sites_beside_groups() -> None:
    y = torch.cat([torch.randn(10) - 3, torch.randn(10) + 3])

    def model(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        low = pyro.sample("low", dist.Normal(-3.0, 1.0))
        high = pyro.sample("high", dist.Normal(3.0, 1.0))
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(low + (high - low) * k, 1.0), obs=y)

    guide = pf.AutoFlow(model, groups=[["low", "high"], ["weight"]])
    report = pf.fit_svi(guide, y, budget=0, **FIT).psis
    assert report is not None
    assert report.verdict == "good"
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=50, vectorize_particles=True)
    assert -elbo.loss(model, guide, y) == pytest.approx(report.log_evidence, abs=0.2)
    assert len(steps(model, guide, y, count=3, elbo=elbo)) == 3


# --- handlers and reparameterisers ----------------------------------------------------------------


def pair(x: Tensor, y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


def masked(x: Tensor, y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=False):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


def scaled(x: Tensor, y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=3.0):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (pair, (1.0, 1.0, 1.0)),
        (masked, (1.0, 0.0, 1.0)),
        (scaled, (1.0, 3.0, 1.0)),
        (poutine.scale(pair, scale=0.5), (0.5, 0.5, 0.5)),
        (poutine.block(pair, hide=["y"]), (1.0, 1.0, 0.0)),
    ],
    ids=["plain", "mask", "scale", "scale all", "block"],
)
def test_handlers_weigh_sites_as_they_do_for_pyro(model: Any, weights: tuple[float, ...]) -> None:
    """The posterior in closed form: prior, x and y count as often as the handlers say."""
    x, y = torch.tensor(2.0), torch.tensor(-1.0)
    guide = pf.AutoFlow(model)
    fit = pf.fit_svi(guide, x, y, budget=200, **FIT)
    assert fit.psis is not None
    prior, of_x, of_y = weights
    precision = prior + of_x + 4 * of_y
    mean = (of_x * x + 4 * of_y * y) / precision
    draws = guide.sample(20_000)["loc"]
    assert draws.mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert draws.std().item() == pytest.approx(precision**-0.5, rel=0.03)


def test_conditioned_models() -> None:
    data = gaussian_data()
    model = poutine.condition(gaussian, data={})
    guide = pf.AutoFlow(model)
    report = pf.fit_svi(guide, data, **FIT).psis
    assert report is not None
    assert report.log_evidence == pytest.approx(gaussian_evidence(data), abs=0.01)
    fixed = poutine.condition(three, data={"a": torch.tensor(0.5)})
    part = pf.AutoFlow(fixed)
    pf.fit_svi(part, torch.tensor(1.0), budget=0, **FIT)
    assert list(part.latent_shapes) == ["b", "c"]


def test_location_scale_reparameterisation() -> None:
    y = torch.tensor([2.0, -1.0, 0.5])
    model = poutine.reparam(hierarchy, config={"z": LocScaleReparam(0.0)})
    guide = pf.AutoFlow(model, groups=[["loc", "scale"], ["z_decentered"]])
    report = pf.fit_svi(guide, y, steps=150, draws=64, **FIT).psis
    assert report is not None
    assert report.ess > 0.6 * 2000
    assert "z_decentered" in guide.latent_shapes
    assert Predictive(model, guide=guide, num_samples=7)(y)["z"].shape == (7, 3)
    plain = pf.fit_svi(pf.AutoFlow(hierarchy), y, budget=0, **FIT).psis
    assert plain is not None
    assert report.log_evidence == pytest.approx(plain.log_evidence, abs=0.1)


def test_transform_reparameterisation() -> None:
    def model(y: Tensor) -> None:
        bend = dist.transforms.AffineTransform(1.0, 10.0)
        z = pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [bend]))
        pyro.sample("y", dist.Normal(z, 10.0), obs=y)

    inner = poutine.reparam(model, config={"z": TransformReparam()})
    guide = pf.AutoFlow(inner)
    report = pf.fit_svi(guide, torch.tensor(21.0), budget=0, **FIT).psis
    assert report is not None
    evidence = dist.Normal(1.0, 200**0.5).log_prob(torch.tensor(21.0)).item()
    assert report.log_evidence == pytest.approx(evidence, abs=0.01)
    assert list(guide.latent_shapes) == ["z_base"]
