"""Bases: densities against scipy, contexts, draws without gradients, distributions handed in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.distributions import (
    DiagonalNormal,
    DistributionBase,
    FullNormal,
    Laplace,
    Mixture,
    StandardNormal,
    StudentT,
    UniformBox,
)
from pyroflows.errors import ContextError, ShapeError
from pyroflows.testing import redraw_

BASES: dict[str, Callable[[], Any]] = {
    "standard normal": lambda: StandardNormal(3),
    "diagonal normal": lambda: DiagonalNormal(3),
    "full normal": lambda: FullNormal(3),
    "student": lambda: StudentT(3),
    "laplace": lambda: Laplace(3),
    "box": lambda: UniformBox(3, torch.tensor([-1.0, -2.0, -3.0]), 4.0),
    "mixture": lambda: Mixture(3, components=4),
    "mixture of one": lambda: Mixture(3, components=1),
}


def normal() -> Any:
    return dist.Normal(torch.zeros(3), 2.0).to_event(1)


def redrawn(base: Any, scale: float = 0.5) -> Any:
    redraw_(base.double(), scale)
    return base


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- densities ----------------------------------------------------------------------------------


@torch.no_grad()
def test_full_normal_against_scipy() -> None:
    base = redrawn(FullNormal(4), 1.0)
    factor = base.factor.tril(-1) + base.log_diagonal.exp().diag()
    exact = stats.multivariate_normal(base.loc.numpy(), (factor @ factor.mT).numpy())
    x = points(50, 4)
    np.testing.assert_allclose(base().log_prob(x), exact.logpdf(x.numpy()), rtol=1e-10)
    draws = base().sample((100_000,))
    assert torch.allclose(draws.mT.cov(), factor @ factor.mT, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_laplace_against_scipy() -> None:
    x = points(50, 3)
    expected = stats.laplace.logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(Laplace(3).double()().log_prob(x), expected, rtol=1e-12)


@torch.no_grad()
def test_box_against_scipy() -> None:
    base = UniformBox(2, torch.tensor([-1.0, 0.0]), 3.0).double()
    x = torch.tensor([[0.0, 1.0], [-1.0, 3.0], [-1.1, 1.0], [0.0, 3.1], [torch.inf, 1.0]]).double()
    expected = stats.uniform.logpdf(x.numpy(), [-1.0, 0.0], [4.0, 3.0]).sum(-1)
    np.testing.assert_allclose(base().log_prob(x), expected, rtol=1e-12)
    draws = base().sample((1000,))
    assert base().log_prob(draws).isfinite().all()


def test_box_gives_nan_for_nan_and_minus_infinity_outside() -> None:
    flow = pf.NSF(2, transforms=1, mixing=None, base=UniformBox(2, -5.0, 5.0))
    redraw_(flow, 0.3)
    x = torch.tensor([[0.0, torch.nan], [0.0, 0.0], [0.0, 6.0]], requires_grad=True)
    log_prob = flow().log_prob(x)
    assert log_prob[0].isnan()
    assert log_prob[1].isfinite()
    assert log_prob[2] == -torch.inf
    log_prob[1:].sum().backward()
    assert x.grad is not None
    assert x.grad[1:].isfinite().all()


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
@torch.no_grad()
def test_mixture_against_scipy(shape: tuple[int, ...]) -> None:
    base = redrawn(Mixture(shape, components=5), 1.0)
    x = points(20, *shape)
    weights = base.logits.softmax(-1)
    scale = base().scale
    expected = np.zeros(20)
    for k in range(5):
        normal = stats.norm(base.loc[k].numpy(), scale[k].numpy())
        expected += weights[k].item() * normal.pdf(x.numpy()).reshape(20, -1).prod(-1)
    np.testing.assert_allclose(base().log_prob(x), np.log(expected), rtol=1e-10)


@torch.no_grad()
def test_mixture_draws_follow_its_density() -> None:
    base = redrawn(Mixture(1, components=4), 1.0)
    mixture = base()
    weights, loc = mixture.logits.softmax(-1).numpy(), mixture.loc[:, 0].numpy()

    def cdf(x: Any) -> Any:
        return sum(
            w * stats.norm.cdf(x, m, s)
            for w, m, s in zip(weights, loc, mixture.scale[:, 0].numpy(), strict=True)
        )

    draws = mixture.sample((5000,))[:, 0].numpy()
    assert stats.kstest(draws, cdf).pvalue > 1e-3


@torch.no_grad()
def test_mixture_starts_with_distinct_components_and_about_unit_variance() -> None:
    base = Mixture(50, components=40)
    assert torch.pdist(base.loc).min() > 1.0
    draws = base().sample((20_000,))
    assert abs(draws.mean()) < 0.1
    assert abs(draws.var(0).mean() - 1) < 0.1
    one = Mixture(2, components=1)()
    x = torch.randn(5, 2)
    assert torch.allclose(one.log_prob(x), StandardNormal(2)().log_prob(x))


def test_no_component_collapses() -> None:
    base = Mixture(1, components=2)
    nn.init.constant_(base.log_scale, -1e6)
    assert base().scale.min() > np.exp(-7.1)
    assert base().log_prob(torch.zeros(1)).isfinite()


@pytest.fixture
def argument_validation() -> Iterator[None]:
    """Dynamo switches the validation of all distributions off, for good."""
    before = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("argument_validation")
@pytest.mark.parametrize("name", [*BASES, "given"])
def test_densities_compile_without_breaks(name: str) -> None:
    base = {**BASES, "given": lambda: DistributionBase(normal())}[name]()
    torch.compiler.reset()
    x = torch.randn(5, 3)
    compiled = torch.compile(lambda x: base().log_prob(x), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), base().log_prob(x))


@pytest.mark.parametrize("name", BASES)
def test_bases_are_saved_with_their_flow(name: str, tmp_path: Any) -> None:
    flow = pf.RealNVP(3, transforms=1, hidden_features=(4,), base=BASES[name]())
    redraw_(flow, 0.3)
    pf.save(flow, tmp_path / "flow")
    x = torch.randn(4, 3)
    assert torch.equal(pf.load(tmp_path / "flow")().log_prob(x), flow().log_prob(x))


# --- contexts -----------------------------------------------------------------------------------


def conditional_mixture() -> Mixture:
    return redrawn(Mixture(2, 3, components=4, hidden_features=(8,)), 1.0)


@torch.no_grad()
def test_mixture_given_a_context() -> None:
    base = conditional_mixture()
    context, x = points(5, 1, 3), points(6, 2)
    assert base(context).batch_shape == (5, 1)
    got = base(context).log_prob(x)
    expected = torch.stack([base(c).log_prob(x) for c in context[:, 0]])
    assert torch.allclose(got, expected)
    assert (expected.std(0) > 0.01).all()
    assert base(context).sample((7,)).shape == (7, 5, 1, 2)


@torch.no_grad()
def test_each_context_draws_for_itself() -> None:
    flow = pf.Flow([], 2, 3, base=conditional_mixture()).double()
    draws = flow(points(1, 3).expand(5, 3)).sample()
    assert len(draws.unique(dim=0)) == 5
    plain = pf.Flow([pf.layers.LULinear(2)], 2, 3, base=Mixture(2, components=3))
    assert len(plain(torch.zeros(5, 3)).sample().unique(dim=0)) == 5


@torch.no_grad()
def test_a_base_gets_the_context_of_the_layers() -> None:
    """Standardised, so that contexts in any units are alike."""
    flow = pf.Flow([], 2, 3, base=conditional_mixture()).double()
    context, x = points(5, 3), points(5, 2)
    expected = flow(context).log_prob(x)
    assert flow.transform.context_standardization is not None
    flow.transform.context_standardization.set_(10.0, 1000.0)
    assert torch.allclose(flow(context * 1000 + 10).log_prob(x), expected)


def test_mixture_refuses_a_context_that_is_missing_or_of_another_size() -> None:
    base = Mixture(2, 3, components=2)
    with pytest.raises(ContextError, match="expects a context of size 3, got none"):
        pf.Flow([], 2, base=base)()
    with pytest.raises(ShapeError, match=r"context: expected shape \(\*batch, 3\), got \(4,\)"):
        base(torch.zeros(4))


# --- draws without gradients --------------------------------------------------------------------


def test_a_mixture_says_that_its_draws_have_no_gradients() -> None:
    flow = pf.RealNVP(2, transforms=1, hidden_features=(4,), base=Mixture(2, components=2))
    assert not flow().has_rsample
    message = "rsample: the base, a NormalMixture, has no reparameterised draws"
    with pytest.raises(NotImplementedError, match=message):
        flow().rsample()
    with torch.no_grad():
        value, log_prob = flow().rsample_and_log_prob((5,))
        assert torch.allclose(flow().log_prob(value), log_prob)
    assert StudentT(2)().has_rsample


def test_pyro_takes_the_score_function_estimator() -> None:
    q = pf.Flow([], 2, base=Mixture(2, components=2))()
    x = q.sample()
    parts = q.score_parts(x)
    assert torch.equal(parts.score_function, parts.log_prob)
    assert parts.entropy_term == 0


def test_svi_fits_a_guide_with_a_mixture_base() -> None:
    flow = pf.Flow([], 1, base=Mixture(1, components=2))

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.tensor([3.0]), 0.5).to_event(1))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(100, vectorize_particles=True)
    )
    before = np.mean([svi.evaluate_loss() for _ in range(10)])
    for _ in range(300):
        svi.step()
    after = np.mean([svi.evaluate_loss() for _ in range(10)])
    assert before > 5
    assert after < 0.5


def test_maximum_likelihood_finds_the_clusters() -> None:
    centres = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    x = centres[torch.randint(3, (1000,))] + 0.3 * torch.randn(1000, 2)
    flow = pf.Flow([], 2, base=Mixture(2, components=6))
    pf.fit_mle(flow, x, steps=500, lr=0.02, progress=False, seed=0)
    truth = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), dist.Normal(centres, 0.3).to_event(1)
    )
    assert (truth.log_prob(x) - flow().log_prob(x)).mean() < 0.1


# --- distributions handed in --------------------------------------------------------------------


def gumbel() -> Any:
    return dist.Gumbel(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).to_event(1)


def test_a_distribution_becomes_buffers() -> None:
    loc = torch.zeros(2, requires_grad=True)
    base = DistributionBase(dist.Normal(loc, 1.0).to_event(1))
    assert not list(base.parameters())
    assert {b.dtype for b in base.double().buffers()} == {torch.float64}
    assert base().log_prob(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
    with torch.no_grad():
        loc += 1.0
    assert (base().mean == 0).all()
    assert base.to("meta")().sample().is_meta


def test_a_flow_takes_a_distribution_as_it_is() -> None:
    flow = pf.Flow([pf.layers.LULinear(2)], 2, base=gumbel())
    assert isinstance(flow.base, DistributionBase)
    x = torch.randn(5, 2)
    assert torch.allclose(flow().log_prob(x), gumbel().log_prob(x))
    twin = copy.deepcopy(flow)
    assert torch.equal(twin().log_prob(x), flow().log_prob(x))
    assert pf.NSF(2, base=gumbel())().sample((3,)).shape == (3, 2)


def test_values_are_not_validated() -> None:
    nan = torch.full((2,), torch.nan)
    assert pf.Flow([], 2, base=gumbel())().log_prob(nan).isnan()
    given = DistributionBase(lambda context: gumbel(), 2)
    assert given().log_prob(nan).isnan()
    box = dist.Uniform(torch.zeros(2), 1.0).to_event(1)
    assert pf.Flow([], 2, base=box)().log_prob(torch.full((2,), 2.0)) == -torch.inf


def test_distributions_of_distributions() -> None:
    mixture = dist.MixtureSameFamily(
        dist.Categorical(logits=torch.randn(3)), dist.Normal(torch.randn(3, 2), 1.0).to_event(1)
    )
    base = DistributionBase(mixture).double()
    x = torch.randn(5, 2)
    assert torch.allclose(base().log_prob(x.double()).float(), mixture.log_prob(x), atol=1e-5)
    assert base().sample((2,)).dtype == torch.float64
    flow = pf.Flow([], 2, base=mixture)
    with pytest.raises(NotImplementedError, match="MixtureSameFamily"):
        flow().rsample()


def test_a_module_that_gives_distributions_trains() -> None:
    prior = pf.RealNVP(2, 3, transforms=1, hidden_features=(4,))
    flow = pf.NSF(2, 3, transforms=1, hidden_features=(4,), base=DistributionBase(prior, 2))
    redraw_(flow, 0.3)
    flow(torch.randn(5, 3)).log_prob(torch.randn(5, 2)).sum().backward()
    assert all(p.grad is not None for p in prior.parameters())
    assert flow(torch.randn(5, 3)).sample().shape == (5, 2)


def test_a_file_cannot_describe_a_distribution(tmp_path: Any) -> None:
    wrapped = pf.NSF(2, base=DistributionBase(gumbel()))
    with pytest.raises(TypeError, match=r"NSF.base.distribution: .* got .*Independent"):
        pf.save(wrapped, tmp_path / "flow")
    with pytest.raises(TypeError, match=r"NSF.base: .* got .*Independent"):
        pf.save(pf.NSF(2, base=gumbel()), tmp_path / "flow")
    torch.save(wrapped.state_dict(), tmp_path / "weights")
    other = pf.NSF(2, base=dist.Gumbel(torch.zeros(2), 1.0).to_event(1))
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    x = torch.randn(3, 2)
    assert torch.equal(other().log_prob(x), wrapped().log_prob(x))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FullNormal((2, 2)), ValueError, "expected features to be an integer, got"),  # type: ignore[arg-type]
        (lambda: UniformBox(2, 1.0, 1.0), ValueError, "expected low < high, got low=1.0"),
        (lambda: UniformBox(2, 0.0, torch.tensor([1.0, -1.0])), ValueError, "expected low < high"),
        (lambda: Mixture(2, components=0), ValueError, "expected components >= 1"),
        (lambda: Mixture(2, -1), ValueError, "expected context >= 0, got context=-1"),
        (lambda: DistributionBase(3), TypeError, "expected a Pyro distribution, or a function"),  # type: ignore[arg-type]
        (lambda: DistributionBase(lambda c: gumbel()), ValueError, "event_shape: expected the"),
        (
            lambda: DistributionBase(torch.distributions.Normal(0.0, 1.0)),
            TypeError,
            "pyro.distributions has torch's distributions under the same names",
        ),
        (
            lambda: DistributionBase(dist.Normal(torch.zeros(2), 1.0)),
            ShapeError,
            r"base: expected batch shape \(\), got \(2,\). .* \.to_event\(n\)",
        ),
        (
            lambda: DistributionBase(gumbel(), 3),
            ShapeError,
            r"base: expected event shape \(3,\), got \(2,\)",
        ),
        (
            lambda: pf.Flow([], 3, base=gumbel()),
            ValueError,
            r"base: expected event shape \(3,\), got \(2,\)",
        ),
        (
            lambda: DistributionBase(lambda c: gumbel().expand([4]), 2)(torch.zeros(5, 3)),
            ShapeError,
            r"base: expected batch shape \(\) or \(5,\), got \(4,\)",
        ),
    ],
)
def test_errors(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
