"""Neural likelihood estimation: a flow in the simulator's place, and MCMC over the latents."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyroflows as pf
from pyroflows.errors import DataError, ShapeError

NOISE = 0.5


def simulator(rows: int = 3) -> None:
    """Rows of two columns around a mean, without a likelihood."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.Uniform(0.2, 1.0))
    with pyro.plate("rows", rows):
        spread = scale.unsqueeze(-1).expand(*scale.shape, 2)
        centre = mean.expand(*torch.broadcast_shapes(mean.shape[:-1], (rows,)), 2)
        noise = spread * torch.randn(centre.shape)
        pyro.deterministic("y", centre + noise, event_dim=1)


def exact(y: Tensor) -> Any:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.Uniform(0.2, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    return model


def small(features: int, context: int) -> pf.Flow:
    return pf.RealNVP(features, context, transforms=2, hidden_features=(32, 32))


@pytest.fixture(scope="module")
def by_rows() -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"observed": "y", "rows": "rows", "flow": small, "vectorized": True}
    return pf.fit_nle(
        simulator, simulations=4000, steps=600, lr=5e-3, seed=0, progress=False, **options
    )


def moments(model: Any) -> tuple[Tensor, Tensor]:
    guide = pf.AutoFlow(model)
    pf.fit_svi(guide, seed=0, budget=0, psis_samples=0, progress=False)
    draws = guide.sample(10_000)
    values = torch.cat([draws["mean"], draws["scale"].unsqueeze(-1)], -1)
    return values.mean(0), values.std(0)


def test_one_row_is_learned_and_any_number_scored(by_rows: Any) -> None:
    assert by_rows.flow.event_shape == (2,)
    assert by_rows.flow.context_size == 3
    assert "4000 simulations" in str(by_rows)
    for rows in (3, 20):
        y = 0.7 + 0.6 * torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows))
        got, reference = moments(by_rows.model(y)), moments(exact(y))
        assert ((got[0] - reference[0]).abs() / reference[1]).max() < 0.35
        assert (got[1] / reference[1]).log().abs().max() < 0.25


def test_pyros_nuts_and_run_mcmc(by_rows: Any) -> None:
    y = 0.7 + 0.6 * torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    model = by_rows.model(y)
    mcmc = MCMC(NUTS(model), num_samples=40, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["mean"].shape == (40, 2)
    idata = pf.run_mcmc(model, chains=1, draws=40, warmup=40, seed=0, precondition=False)
    reference = moments(exact(y))
    for draws in (mcmc.get_samples()["mean"], torch.tensor(idata.posterior["mean"].values[0])):
        error = (draws.mean(0) - reference[0][:2]).abs() / reference[1][:2]
        assert error.max() < 0.8


def test_the_whole_data_at_once_and_a_second_round() -> None:
    options: dict[str, Any] = {"observed": "y", "flow": small, "vectorized": True, "seed": 0}
    fit = pf.fit_nle(simulator, 2, simulations=500, steps=20, progress=False, **options)
    assert fit.flow.event_shape == (4,)
    guide = pf.AutoFlow(fit.model(torch.zeros(2, 2)))
    pf.fit_svi(guide, 2, seed=0, budget=0, psis_samples=0, progress=False)
    sites = ["mean", "scale", "y"]
    more = pf.simulate(
        simulator, 2, sites=sites, count=50, given=guide.sample(50), vectorized=True, seed=0
    )
    both = fit.simulations.joined(more)
    again = pf.fit_nle(simulator, 2, **{**options, "simulations": both, "steps": 20})
    assert len(again.simulations) == 550
    with pytest.raises(ShapeError, match=r"'y': expected data of shape \(2, 2\), got \(3, 2\)"):
        fit.model(torch.zeros(3, 2))


def test_one_by_one_in_workers() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", torch.tensor(float(z) + 0.1 * torch.randn(()).item()))

    options: dict[str, Any] = {"observed": "y", "steps": 5, "progress": False, "seed": 0}
    alone = pf.fit_nle(model, simulations=60, **options)
    several = pf.fit_nle(model, simulations=60, workers=2, **options)
    assert torch.equal(alone.simulations.values["y"], several.simulations.values["y"])
    assert alone.history.losses == several.history.losses


# --- what is refused ------------------------------------------------------------------------------


def local() -> None:
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0))


def counts() -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Poisson(rate))


def without_latents() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (simulator, {"observed": "x"}, ValueError, "no site 'x'; it has 'mean', 'scale', 'y'"),
        (simulator, {"rows": "row"}, ValueError, "site 'y' is in the plates 'rows', got 'row'"),
        (local, {}, NotImplementedError, "'z' is in the plates 'rows': write latents"),
        (counts, {}, ValueError, "'y': its values are discrete"),
        (without_latents, {}, ValueError, "no latent sites"),
    ],
)
def test_errors(model: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pf.fit_nle(model, **{"observed": "y", "simulations": 20, "steps": 1, **options})


def test_simulations_must_have_the_sites(by_rows: Any) -> None:
    values = {"y": by_rows.simulations.values["y"]}
    lacking = pf.diagnostics.Simulations(values, {}, True, 0.0)
    with pytest.raises(DataError, match="'mean' is missing"):
        pf.fit_nle(simulator, observed="y", simulations=lacking)
    with pytest.raises(ShapeError, match=r"'y': expected data of shape \(rows, 2\), got \(5, 3\)"):
        by_rows.model(torch.zeros(5, 3))


def test_a_flow_in_double_precision() -> None:
    """Of a model in single precision, by the option of `fit_mle`."""
    options: dict[str, Any] = {"observed": "y", "flow": small, "vectorized": True, "seed": 0}
    fit = pf.fit_nle(
        simulator, 2, simulations=200, steps=5, dtype=torch.float64, progress=False, **options
    )
    assert fit.flow.dtype == torch.float64
    trace = pyro.poutine.trace(fit.model(torch.zeros(2, 2))).get_trace(2)
    trace.compute_log_prob()
    assert trace.nodes["mean"]["value"].dtype == torch.float32
    assert trace.nodes["y"]["log_prob"].dtype == torch.float64
