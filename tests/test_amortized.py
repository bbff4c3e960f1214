"""Amortised guides: latents local to plates, in minibatches, nested, on rows never seen."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.errors import LocalLatentError, SavedFileError, ShapeError
from pyroflows.guides.reading import read_model
from pyroflows.nn import DeepSet

PRIOR, NOISE = 10.0, 0.5


def encoder(features: int = 1, size: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 16), nn.SiLU(), nn.Linear(16, size))


def rows_model(y: Tensor, batch: int | None = None, index: Tensor | None = None) -> None:
    """A latent of each row, in random minibatches or in given ones."""
    with pyro.plate("rows", len(y), subsample_size=batch, subsample=index) as rows:
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), PRIOR))
        pyro.sample("y", dist.Normal(z, NOISE), obs=y[rows])


def rows_data(rows: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = PRIOR * torch.randn(rows, generator=generator)
    return truth, truth + NOISE * torch.randn(rows, generator=generator)


def check_rows(guide: Any, truth: Tensor, y: Tensor) -> None:
    draws = guide.sample(1000, y)["z"]
    correlation = torch.corrcoef(torch.stack([draws.mean(0), truth]))[0, 1]
    assert correlation > 0.98
    precision = 1 / PRIOR**2 + 1 / NOISE**2
    error = (draws.mean(0) - y / NOISE**2 / precision) * precision**0.5
    assert error.square().mean().sqrt() < 0.5


@pytest.mark.parametrize("size", [10, 30])
def test_subsampled_plate_with_pyros_svi(size: int) -> None:
    """100 rows; in batches of 30 the last one is shorter."""
    truth, y = rows_data()
    guide = pf.AutoAmortizedFlow(rows_model, {"z": encoder()})
    svi = SVI(rows_model, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}), Trace_ELBO())
    done = 0
    while done < 500:
        for index in torch.randperm(len(y)).split(size):
            svi.step(y, index=index)
            done += 1
    check_rows(guide, truth, y)


def test_subsampled_plate_with_fit_svi() -> None:
    """The model draws the minibatch; guide and model must see the same rows."""
    truth, y = rows_data()
    guide = pf.AutoAmortizedFlow(rows_model, {"z": encoder()})
    fit = pf.fit_svi(
        guide, y, model_kwargs={"batch": 10}, steps=500, lr=0.01, seed=0, progress=False
    )
    assert fit.psis is None
    check_rows(guide, truth, y)
    # The exact evidence, 100 rows in all: subsampling scales both sides alike.
    evidence = dist.Normal(0.0, (PRIOR**2 + NOISE**2) ** 0.5).log_prob(y).sum()
    mean = torch.tensor(fit.history.losses[-100:]).mean()
    assert mean == pytest.approx(-evidence, abs=20.0)


def groups_model(y: Tensor, batch: int | None = None) -> None:
    """Five members a group, one latent a group, an unknown mean of all."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 5.0))
    groups = pyro.plate("groups", y.shape[-1], subsample_size=batch, dim=-1)
    with groups as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        with pyro.plate("members", y.shape[-2], dim=-2):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, index])


def groups_data(groups: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = 3.0 + torch.randn(groups, generator=generator)
    return z + torch.randn(5, groups, generator=generator)


def test_a_set_in_each_row() -> None:
    y = groups_data(7, seed=0)
    shapes = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return x.mean(-2)

    guide = pf.AutoAmortizedFlow(groups_model, {"z": Watch()})
    assert guide(y)["z"].shape == (7,)
    assert guide(y, batch=3)["z"].shape == (3,)
    assert guide(y[:4])["z"].shape == (7,)
    assert shapes[1:] == [(7, 5, 1), (3, 5, 1), (7, 4, 1)]
    assert guide.flow("groups").context_size == 2
    assert guide.flow().context_size == 0


@pytest.mark.slow
def test_ten_thousand_groups_agree_with_the_conjugate_posterior() -> None:
    """On each of a thousand rows never trained on."""
    y, new = groups_data(10_000, seed=0), groups_data(1_000, seed=1)
    guide = pf.AutoAmortizedFlow(groups_model, {"z": DeepSet(1, 8)})
    pf.fit_svi(guide, y, model_kwargs={"batch": 250}, steps=3000, seed=0, progress=False)
    draws = guide.sample(5_000, new)
    exact = (y.mean() + new.sum(0)) / (1 + len(new))
    deviation = (1 / (1 + len(new))) ** 0.5
    assert ((draws["z"].mean(0) - exact) / deviation).abs().max() < 0.1
    assert (draws["z"].std(0) / deviation - 1).abs().max() < 0.1
    assert draws["mean"].mean().item() == pytest.approx(y.mean().item(), abs=0.02)


def nested_model(y: Tensor, batch: int | None = None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("outer", y.shape[0], dim=-2, subsample_size=batch) as index:
        a = pyro.sample("a", dist.Normal(0.0, scale))
        with pyro.plate("inner", y.shape[1], dim=-1):
            b = pyro.sample("b", two(a))
            positive = pyro.sample("positive", dist.Exponential(1.0))
            pyro.sample("y", dist.Normal(b.sum(-1), positive), obs=y[index])


def two(a: Tensor) -> Any:
    return dist.Normal(a.unsqueeze(-1) * torch.ones(2), 1.0).to_event(1)


def test_nested_plates() -> None:
    """Latents of an outer plate read all that is inside; those of both plates one row each."""
    y = torch.randn(6, 4)
    encoders = {"a": DeepSet(1, 3), "b": encoder(1, 2)}
    guide = pf.AutoAmortizedFlow(nested_model, encoders)
    values = guide(y)
    assert {k: tuple(v.shape) for k, v in values.items()} == {
        "scale": (),
        "a": (6, 1),
        "b": (6, 4, 2),
        "positive": (6, 4),
    }
    assert guide.flow("outer_inner").event_shape == (3,)
    # Encoder, global latent, latent of the outer plate.
    assert guide.flow("outer_inner").context_size == 2 + 1 + 1
    flat = pf.AutoAmortizedFlow(nested_model, encoders, hierarchical=False)
    flat(y)
    assert flat.flow("outer_inner").context_size == 2
    for elbo in (
        Trace_ELBO(),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
    ):
        svi = SVI(nested_model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        assert torch.tensor(svi.step(y, batch=2)).isfinite()
    draws = guide.sample(5, y[:3])
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        "scale": (5,),
        "a": (5, 3, 1),
        "b": (5, 3, 4, 2),
        "positive": (5, 3, 4),
    }
    assert (draws["positive"] > 0).all()
    predictive = Predictive(nested_model, guide=guide, num_samples=4)
    assert predictive(y)["b"].shape == (4, 6, 4, 2)


def test_guide_density_is_that_of_its_flows() -> None:
    """Auxiliary vectors and deltas together: the change of variables, row by row."""
    y = torch.randn(6, 4)
    guide = pf.AutoAmortizedFlow(nested_model, {"a": DeepSet(1, 3), "b": encoder(1, 2)})
    trace = poutine.trace(guide).get_trace(y)
    trace.compute_log_prob()
    nodes = trace.nodes
    vector = nodes["_AutoAmortizedFlow_outer_inner"]["value"]
    torch.testing.assert_close(nodes["positive"]["value"], vector[..., 2].exp())
    torch.testing.assert_close(nodes["positive"]["log_prob"], -vector[..., 2])
    assert nodes["b"]["log_prob"].shape == (6, 4)


def test_minibatch_scales_the_guide_as_the_model() -> None:
    _, y = rows_data(20)
    guide = pf.AutoAmortizedFlow(rows_model, {"z": encoder()})
    trace = poutine.trace(guide).get_trace(y, batch=5)
    assert trace.nodes["z"]["scale"] == 4.0
    model = poutine.trace(poutine.replay(rows_model, trace=trace)).get_trace(y, batch=5)
    assert torch.equal(model.nodes["rows"]["value"], trace.nodes["rows"]["value"])
    assert torch.equal(model.nodes["y"]["value"], y[trace.nodes["rows"]["value"]])


def test_covariates_by_deterministic_sites() -> None:
    def model(x: Tensor, y: Tensor, event_dim: int | None = 0) -> None:
        with pyro.plate("rows", len(y)):
            pyro.deterministic("x", x, event_dim=event_dim)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y], -1)

    x, y = torch.randn(5), torch.randn(5)
    guide = pf.AutoAmortizedFlow(model, {"z": Two()}, observed=["x", "y"])
    assert guide(x, y)["z"].shape == (5,)
    assert guide.flow("rows").context_size == 2
    with pytest.raises(ShapeError, match="event_dim="):
        pf.AutoAmortizedFlow(model, {"z": Two()}, observed=["x", "y"])(x, y, event_dim=None)


def test_float64_and_enumerated_sites() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            flip = pyro.sample(
                "flip", dist.Bernoulli(y.new_tensor(0.5)), infer={"enumerate": "parallel"}
            )
            pyro.sample("y", dist.Normal(z * (1 - 2 * flip), 1.0), obs=y)

    y = torch.randn(5, dtype=torch.float64)
    guide = pf.AutoAmortizedFlow(model, {"z": encoder()})
    assert guide(y)["z"].dtype == torch.float64
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    assert torch.tensor(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(y)).isfinite()


def test_store_copies_and_state(caplog: pytest.LogCaptureFixture) -> None:
    _, y = rows_data(10)
    guide = pf.AutoAmortizedFlow(rows_model, {"z": encoder()})
    guide(y)
    names = set(pyro.get_param_store().keys())
    assert any("encoders" in name for name in names)
    assert any("flows" in name for name in names)
    again = pf.AutoAmortizedFlow(rows_model, {"z": encoder()})
    again(y)
    assert again.name == "AutoAmortizedFlow_1"
    again.load_state_dict(guide.state_dict())
    with poutine.block():
        pyro.set_rng_seed(0)
        first = guide.sample(3, y)["z"]
        pyro.set_rng_seed(0)
        assert torch.equal(again.sample(3, y)["z"], first)
        twin = copy.deepcopy(guide)
        pyro.set_rng_seed(0)
        assert torch.equal(twin.sample(3, y)["z"], first)
    pickle.loads(pickle.dumps(guide.state_dict()))


def test_reading_leaves_no_trace_in_outer_handlers() -> None:
    _, y = rows_data(10)
    with poutine.trace() as outer:
        read_model(rows_model, (y,), {}, None)
    assert not outer.trace.nodes.keys() - {"_INPUT", "_RETURN"}


def test_a_guide_is_saved_and_restored_into_one_made_anew(tmp_path: Any) -> None:
    _, y = rows_data(10)
    guide = pf.AutoAmortizedFlow(rows_model, {"z": encoder()})
    path = tmp_path / "guide.safetensors"
    with pytest.raises(ValueError, match="nothing to save"):
        pf.save(guide, path)
    pf.fit_svi(guide, y, steps=5, seed=0, progress=False)
    next(guide.flow("rows").parameters()).requires_grad_(False)
    pf.save(guide, path)
    pyro.clear_param_store()
    again = pf.load(
        path, guide=pf.AutoAmortizedFlow(rows_model, {"z": encoder()}), example_args=(y,)
    )
    assert not next(again.flow("rows").parameters()).requires_grad
    first = []
    for one in (guide, again):
        with poutine.block():
            pyro.set_rng_seed(0)
            first.append(one.sample(3, y[:4])["z"])
    assert torch.equal(*first)

    def other(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("w", dist.Normal(y.new_zeros(()), PRIOR))
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    for wrong, args, message in (
        (pf.AutoAmortizedFlow(other, {"w": encoder()}), (y,), r"saved with the latents 'z' \(\)"),
        (
            pf.AutoAmortizedFlow(rows_model, {"z": encoder(size=3)}),
            (y,),
            r"shape \(8, 16\) in the file, shape \(3, 16\) in this guide",
        ),
        (
            pf.AutoAmortizedFlow(rows_model, {"z": encoder()}),
            (y.double(),),
            "float32 in the file, torch.float64 in this guide",
        ),
    ):
        with pytest.raises(SavedFileError, match=message):
            pf.load(path, guide=wrong, example_args=args)
    with pytest.raises(ValueError, match="holds an amortised guide"):
        pf.load(path, model=rows_model, example_args=(y,))
    flow_path = tmp_path / "flow.safetensors"
    pf.save(pf.RealNVP(2, transforms=1), flow_path)
    with pytest.raises(ValueError, match="holds no amortised guide"):
        pf.load(flow_path, guide=again)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(SavedFileError, match="not what was saved"):
        pf.load(path, guide=again, example_args=(y,))


# --- what is refused ------------------------------------------------------------------------------


def plain(y: Tensor, size: int = 3) -> None:
    pyro.sample("loc", dist.Normal(torch.zeros(size), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def unobserved(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def two_plates(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    with pyro.plate("others", 10, subsample_size=2):
        pyro.sample("w", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (plain, {"encoders": {"zz": encoder()}}, ValueError, "no latent site 'zz'; it has 'loc'"),
        (plain, {"encoders": {"loc": encoder()}}, ValueError, "site 'loc' is in no plate"),
        (
            plain,
            {"encoders": {"z": encoder()}, "observed": ["x"]},
            ValueError,
            "no site 'x'; it has 'loc', 'z', 'y'",
        ),
        (unobserved, {"encoders": {"z": encoder()}}, ValueError, "no observed site inside"),
        (two_plates, {"encoders": {"z": encoder()}}, LocalLatentError, "'w' is local"),
        (
            plain,
            {"encoders": {"z": nn.Flatten(0)}},
            ShapeError,
            r"'z': expected an output of shape \(5, size\), got \(5,\)",
        ),
        (plain, {"encoders": {"z": 3}}, TypeError, r"\['z'\]: expected a torch module, got 3"),
        (plain, {"encoder": 3}, TypeError, "encoder: expected a torch module, got 3"),
        (
            plain,
            {"encoders": {"z": DeepSet(2, 8)}},
            ShapeError,
            r"encoder of 'z': x: expected shape .*, 2\), got \(5, 1\)",
        ),
        (plain, {}, ValueError, "expected encoders="),
        (plain, {"encoders": {"z": encoder()}, "init_scale": 0.0}, ValueError, "init_scale"),
        (plain, {"encoders": {"z": encoder()}, "flow": pf.NSF(1)}, TypeError, "flow: expected a"),
        (
            plain,
            {"encoders": {"z": encoder()}, "flow": lambda features, context: pf.NSF(features)},
            ValueError,
            "context of size 11, got event shape",
        ),
        (
            plain,
            {"encoders": {"z": encoder()}, "flow": lambda features, context: 3},
            TypeError,
            "expected a pyroflows Flow, got 3",
        ),
    ],
)
def test_errors(model: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pf.AutoAmortizedFlow(model, **options)(torch.randn(5))


def test_what_may_change_between_calls_and_what_may_not() -> None:
    guide = pf.AutoAmortizedFlow(plain, {"z": encoder()})
    with pytest.raises(RuntimeError, match="does not know its model's latents"):
        guide.flow()
    guide(torch.randn(5))
    assert guide(torch.randn(8))["z"].shape == (8,)
    with pytest.raises(ShapeError, match=r"'loc': expected unconstrained shape \(3,\).*\(4,\)"):
        guide(torch.randn(5), size=4)
    with pytest.raises(ValueError, match="block: expected one of 'global', 'rows', got 'z'"):
        guide.flow("z")
    with pytest.raises(TypeError, match="local to plates are 'z'"):
        guide.posterior(torch.randn(5), torch.randn(5))


def test_data_must_be_there_and_of_one_shape() -> None:
    def model(y: Tensor | None, columns: int = 2) -> None:
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z.unsqueeze(-1).expand(*z.shape, columns)
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    guide = pf.AutoAmortizedFlow(model, {"z": encoder(2)}, observed=["y"])
    guide(torch.randn(5, 2))
    with pytest.raises(ValueError, match="'y' has no data in this call"):
        guide(None)
    with pytest.raises(ShapeError, match=r"'y': expected data \(5, ..., 2\), got \(5, 3\)"):
        guide(torch.randn(5, 3), columns=3)


def test_encoder_output_that_changes_its_size() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("groups", y.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("members", y.shape[-2], dim=-2):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = pf.AutoAmortizedFlow(model, {"z": nn.Flatten(1)})
    guide(torch.randn(5, 7))
    with pytest.raises(ShapeError, match=r"expected a context of size 5.*got 4.*DeepSet"):
        guide(torch.randn(4, 7))


def test_a_sequential_plate_is_refused() -> None:
    def model(y: Tensor) -> None:
        for i in pyro.plate("rows", len(y)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=y[i])

    with pytest.raises(NotImplementedError, match="'z0' is in a sequential plate"):
        pf.AutoAmortizedFlow(model, {"z0": encoder()})(torch.randn(2))


def test_priors_without_draws_start_somewhere(caplog: pytest.LogCaptureFixture) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with caplog.at_level(logging.ERROR):
        assert pf.AutoAmortizedFlow(model, {"z": encoder()})(torch.randn(4))["z"].shape == (4,)
