"""AutoFlow in Pyro's hands: every ELBO, Predictive, NeuTra, and the models it must take."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoGuideList, init_to_value
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import LocalLatentError
from tests.models import (
    MIXTURE_DATA,
    SCHOOL_ERRORS,
    SCHOOLS,
    eight_schools,
    exact_gaussian_guide,
    gaussian,
    gaussian_data,
    gaussian_evidence,
    gaussian_posterior,
    mixture,
)


class FiniteAdam(pyro.optim.PyroOptim):
    """Adam that fails where a gradient is not finite."""

    def __init__(self, lr: float) -> None:
        super().__init__(torch.optim.Adam, {"lr": lr})

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        assert all(p.grad is None or p.grad.isfinite().all() for p in params)
        super().__call__(params, *args, **kwargs)


def train(
    model: Callable[..., Any], guide: Any, elbo: Any, *args: Any, steps: int, lr: float = 0.01
) -> Tensor:
    svi = SVI(model, guide, FiniteAdam(lr), elbo)
    return torch.tensor([float(svi.step(*args)) for _ in range(steps)])


def drawn(guide: Any, *args: Any) -> Tensor:
    """The unconstrained latents of one run of the guide."""
    trace = poutine.trace(guide).get_trace(*args)
    return trace.nodes[f"_{guide.name}_latent"]["value"]


# --- objectives -----------------------------------------------------------------------------------


ELBOS: dict[str, Callable[[], Any]] = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "Renyi": partial(RenyiELBO, alpha=0.0, num_particles=1),
    "TraceEnum": partial(TraceEnum_ELBO, max_plate_nesting=1),
    "JitTrace": partial(JitTrace_ELBO, ignore_jit_warnings=True),
}

CONSTRAINED: dict[str, Callable[[], Any]] = {
    "real": lambda: dist.Normal(0.3, 2.0),
    "positive": lambda: dist.Gamma(3.0, 2.0),
    "interval": lambda: dist.Uniform(-1.0, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "LKJ Cholesky": lambda: dist.LKJCholesky(3, 2.0),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
    ),
    "positive vector": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
}


def one_latent(prior: Callable[[], Any]) -> None:
    pyro.sample("z", prior())


stock_warnings = pytest.mark.filterwarnings(
    # TraceEnum without anything to enumerate, and JitTrace at all.
    "ignore:TraceEnum_ELBO found no sample sites:UserWarning",
    "ignore:`torch.jit.trace:DeprecationWarning",
)


@stock_warnings
@pytest.mark.parametrize("constraint", CONSTRAINED)
@pytest.mark.parametrize("elbo", ELBOS)
def test_the_objective_is_right_draw_by_draw(elbo: str, constraint: str) -> None:
    """Its value is log q - log p at the very draw, constants and Jacobians included."""
    model = partial(one_latent, CONSTRAINED[constraint])
    guide = pf.AutoFlow(model, example_args=())
    loss = ELBOS[elbo]().loss_and_grads
    loss(model, guide)  # the jitted one compiles at the first call
    pyro.set_rng_seed(3)
    u = drawn(guide)
    with torch.no_grad():
        expected = guide.get_posterior().log_prob(u) - guide.log_joint(u[None])[0]
    pyro.set_rng_seed(3)
    assert loss(model, guide) == pytest.approx(expected.item(), abs=2e-5)


@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_vectorised_particles_are_the_mean_over_draws(constraint: str) -> None:
    model = partial(one_latent, CONSTRAINED[constraint])
    guide = pf.AutoFlow(model, example_args=())
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=0)
    loss = elbo.loss(model, guide)
    with torch.no_grad():
        u, log_q = guide.get_posterior().rsample_and_log_prob((500,))
        terms = log_q - guide.log_joint(u)
    # Two independent means of 500 draws.
    assert abs(loss - terms.mean()) < 5 * terms.std() * (2 / 500) ** 0.5


TRAINED: dict[str, Callable[[], Any]] = {
    "Trace": partial(Trace_ELBO, num_particles=4),
    "Trace, vectorised": partial(Trace_ELBO, num_particles=32, vectorize_particles=True),
    "TraceGraph": partial(TraceGraph_ELBO, num_particles=4),
    "TraceMeanField": partial(TraceMeanField_ELBO, num_particles=4),
    "TraceMeanField, vectorised": partial(
        TraceMeanField_ELBO, num_particles=32, vectorize_particles=True
    ),
    "Renyi": partial(RenyiELBO, alpha=0.5, num_particles=32, vectorize_particles=True),
    "TraceEnum, vectorised": partial(TraceEnum_ELBO, num_particles=32, vectorize_particles=True),
    "JitTrace, vectorised": partial(
        JitTrace_ELBO, num_particles=32, vectorize_particles=True, ignore_jit_warnings=True
    ),
}


@stock_warnings
@pytest.mark.parametrize("elbo", TRAINED)
def test_every_elbo_trains_to_the_evidence(elbo: str) -> None:
    y = gaussian_data()
    guide = pf.AutoFlow(gaussian)
    kwargs = {} if "Enum" not in elbo else {"max_plate_nesting": 1}
    losses = train(gaussian, guide, TRAINED[elbo](**kwargs), y, steps=120)
    assert losses.isfinite().all()
    # The best loss there is, up to noise and what is left of the training.
    assert losses[:5].mean() > -gaussian_evidence(y) + 0.5
    assert losses[-20:].mean() == pytest.approx(-gaussian_evidence(y), abs=0.2)


def test_enumerated_discretes_train() -> None:
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=8, vectorize_particles=True)
    init = init_to_value(values={"loc": torch.tensor([-1.0, 1.0])})
    guide = pf.AutoFlow(mixture, init_loc_fn=init)
    losses = train(mixture, guide, elbo, MIXTURE_DATA, steps=120)
    assert losses[-20:].mean() < losses[:20].mean() - 0.3
    assert guide.median()["loc"].tolist() == pytest.approx([-1.7, 1.6], abs=0.5)


def test_path_gradients_vanish_at_the_posterior() -> None:
    """Under stock Pyro too, and not by accident: RenyiELBO's total derivative does not."""
    y = gaussian_data(dtype=torch.float64)
    guide = exact_gaussian_guide(y)

    def largest_gradient(elbo: Any) -> float:
        guide.zero_grad()
        elbo.loss_and_grads(gaussian, guide, y)
        return max(float(p.grad.abs().max()) for p in guide.parameters() if p.grad is not None)

    for path in (Trace_ELBO(), TraceGraph_ELBO(), TraceMeanField_ELBO()):
        assert largest_gradient(path) < 1e-10
    assert largest_gradient(RenyiELBO(alpha=0.0, num_particles=1)) > 0.1


# --- Pyro's other doors ---------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel: bool) -> None:
    def model(y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 3):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 4):
                pyro.sample("y", dist.Normal(loc, scale), obs=y)

    y = torch.randn(4, 3)
    guide = pf.AutoFlow(model, example_args=(y,))
    draws = Predictive(model, guide=guide, num_samples=11, parallel=parallel)()
    assert draws["y"].shape == (11, 4, 3)
    latents = Predictive(guide, num_samples=11, parallel=parallel)()
    assert latents["scale"].flatten().shape == (11,)
    assert latents["loc"].flatten().shape == (33,)
    assert latents["loc"].flatten().unique().numel() == 33
    posterior = Predictive(model, posterior_samples=guide.sample(11), parallel=False)()
    assert posterior["y"].shape == (11, 4, 3)


def test_neutra_and_nuts() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    train(gaussian, guide, Trace_ELBO(32, vectorize_particles=True), y, steps=60, lr=0.02)
    guide.requires_grad_(False)
    neutra = NeuTraReparam(guide)
    kernel = NUTS(neutra.reparam(gaussian))
    mcmc = MCMC(kernel, num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(y)
    z = mcmc.get_samples()["mean_shared_latent"]
    draws = neutra.transform_sample(z)["mean"]
    posterior = gaussian_posterior(y)
    # 150 draws, whitened, so nearly independent: four standard errors.
    error = 4 * posterior.stddev / 150**0.5
    assert ((draws.mean(0) - posterior.mean).abs() < error).all()
    assert torch.allclose(draws.std(0), posterior.stddev, rtol=0.3)


def test_inside_a_guide_list() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.full((2,), 3.0), 0.5).to_event(1))
        pyro.sample("scale", dist.LogNormal(1.0, 0.5))

    guide = AutoGuideList(model)
    guide.append(pf.AutoFlow(poutine.block(model, expose=["z"])))
    guide.append(AutoDelta(poutine.block(model, expose=["scale"])))
    losses = train(model, guide, Trace_ELBO(16, vectorize_particles=True), steps=150)
    assert losses[-20:].mean() < losses[:5].mean() - 0.5
    assert guide.median()["z"].tolist() == pytest.approx([3.0, 3.0], abs=0.3)
    names = set(pyro.get_param_store())
    assert any(name.startswith("AutoGuideList.0.flow$$$") for name in names)
    assert not any(name.startswith("AutoFlow") for name in names)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_constrained_latents_train(constraint: str) -> None:
    """The prior is the posterior: the divergence goes to zero, and draws obey the constraint."""
    model = partial(one_latent, CONSTRAINED[constraint])
    guide = pf.AutoFlow(model)
    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    losses = train(model, guide, elbo, steps=120, lr=0.02)
    assert losses[-20:].mean() < 0.35
    assert losses[-20:].mean() > -0.05
    draws = guide.sample(200)["z"]
    assert CONSTRAINED[constraint]().support.check(draws).all()


def test_improper_priors() -> None:
    def model(y: Tensor) -> None:
        support = constraints.positive
        scale = pyro.sample("scale", dist.ImproperUniform(support, (), ()))
        loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), (2,)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=y)

    y = 4.0 + torch.randn(40, 2)
    guide = pf.AutoFlow(model, example_args=(y,))
    assert guide.latent_shapes == {"scale": (), "loc": (2,)}
    train(model, guide, Trace_ELBO(16, vectorize_particles=True), y, steps=200, lr=0.02)
    assert guide.median()["loc"].tolist() == pytest.approx(y.mean(0).tolist(), abs=0.15)
    assert float(guide.median()["scale"]) == pytest.approx(float(y.std()), abs=0.15)


def test_double_models_get_a_double_guide() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    losses = train(gaussian, guide, Trace_ELBO(), y, steps=3)
    assert losses.isfinite().all()
    draws = guide.sample(4)["mean"]
    assert draws.dtype == torch.float64
    assert guide.log_prob({"mean": draws}).dtype == torch.float64
    assert guide.log_joint(draws, y).dtype == torch.float64


def test_a_far_and_narrow_prior_is_found() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(50.0 * torch.ones(20), 0.1).to_event(1))

    guide = pf.AutoFlow(model)
    losses = train(model, guide, Trace_ELBO(), steps=300, lr=0.005)
    assert losses[-50:].mean() < 5


def test_modules_and_parameters_of_the_model_train_along() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](1, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
            self.scale = PyroParam(torch.tensor(3.0), constraint=constraints.positive)

        def forward(self, x: Tensor, y: Tensor) -> None:
            shift = pyro.param("shift", torch.tensor(0.0))
            mean = self.linear(x).squeeze(-1) + shift
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(mean, self.scale), obs=y)

    model = Model()
    x = torch.randn(50, 1)
    y = 2.0 * x.squeeze(-1) + 1.0 + 0.3 * torch.randn(50)
    guide = pf.AutoFlow(model)
    # With a draw a step, and a scale as small as this, runs end anywhere.
    losses = train(model, guide, Trace_ELBO(num_particles=8), x, y, steps=300, lr=0.02)
    assert losses[-20:].mean() < losses[:20].mean() - 30
    assert float(model.scale.detach()) == pytest.approx(0.3, abs=0.15)
    bias = model.linear.bias.detach() + pyro.param("shift")
    assert bias.item() == pytest.approx(1.0, abs=0.2)
    # The model's parameters are not the guide's.
    assert not any(name.split(".")[-1] == "scale" for name, _ in guide.named_parameters())


def test_subsampled_likelihood() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=10) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    y = 1.0 + torch.randn(100)
    guide = pf.AutoFlow(model)
    losses = train(model, guide, Trace_ELBO(), y, steps=150)
    assert losses.isfinite().all()
    posterior_mean = y.sum() / 101
    assert float(guide.median()["loc"]) == pytest.approx(float(posterior_mean), abs=0.15)


# --- models it cannot take ------------------------------------------------------------------------


def test_a_model_without_latents() -> None:
    with pytest.raises(RuntimeError, match="no latent variables"):
        pf.AutoFlow(lambda: None, example_args=())


def test_a_discrete_that_is_not_enumerated() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("coin", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"discrete sample site 'coin'.*numerat"):
        pf.AutoFlow(model, example_args=())


@pytest.mark.parametrize("given", [False, True])
def test_local_latents_in_a_subsampled_plate(given: bool) -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        how = {"subsample": torch.arange(4)} if given else {"subsample_size": 4}
        with pyro.plate("stars", 10, **how) as index:
            local = pyro.sample("brightness", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(local, 1.0), obs=y[index])

    with pytest.raises(LocalLatentError, match=r"'brightness'.*'stars' \(4 of 10\)"):
        pf.AutoFlow(model, example_args=(torch.zeros(10),))


def test_sequential_plates_with_latents() -> None:
    def model() -> None:
        for i in pyro.plate("steps", 2):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="sequential"):
        pf.AutoFlow(model, example_args=())


@pytest.mark.parametrize("vectorized", [False, True])
def test_svi_with_plates_needs_no_example_arguments(vectorized: bool) -> None:
    """The guide meets its model, and makes its plates, within the first step's own trace."""
    guide = pf.AutoFlow(eight_schools)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
    svi = SVI(eight_schools, guide, FiniteAdam(0.01), elbo)
    for _ in range(2):
        assert math.isfinite(svi.step(SCHOOL_ERRORS, SCHOOLS))
