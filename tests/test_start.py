"""The Gaussian start of a guide: ascents, score matching, several modes."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyroflows as pf
from pyroflows.diagnostics.psis import MISSED
from pyroflows.guides.default import DENSE
from pyroflows.numerics import ascend, batch_and_match, low_rank_match
from pyroflows.training.density import Density
from pyroflows.training.gaussians import (
    Gaussians,
    find_gaussians,
    mixture_weights,
    separated,
)
from pyroflows.training.low_rank import LowRankGaussian
from pyroflows.training.start import find_start, missed_mass, starting_points
from pyroflows.training.walk import walk
from tests.models import gaussian, gaussian_data, gaussian_posterior


def normal(size: int, condition: float) -> MultivariateNormal:
    """With deviations spread over so many orders of magnitude, strongly correlated."""
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator).double())
    scale = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    loc = 10 * torch.randn(size, generator=generator).double()
    return MultivariateNormal(loc, rotation * scale**2 @ rotation.mT)


def scores(target: MultivariateNormal, z: Tensor) -> Tensor:
    return -(z - target.loc) @ target.precision_matrix


def test_batch_and_match_is_exact_for_a_gaussian_at_a_large_rate() -> None:
    target = normal(5, 1e3)
    draws = torch.randn(20, 5, dtype=torch.float64)
    found = batch_and_match(
        torch.zeros(5).double(), torch.eye(5).double(), draws, scores(target, draws), 1e12
    )
    assert torch.allclose(found[0], target.loc, rtol=1e-4)
    assert torch.allclose(found[1], target.covariance_matrix, rtol=1e-4)


def test_batch_and_match_solves_its_quadratic_equation() -> None:
    r"""At any rate the covariance satisfies :math:`\Sigma U \Sigma + \Sigma = V`."""
    generator = torch.Generator().manual_seed(0)
    z, g = torch.randn(2, 7, 4, generator=generator).double()
    loc, before, rate = torch.ones(4).double(), torch.eye(4).double(), 3.0
    _, after = batch_and_match(loc, before, z, g, rate)
    share = rate / (1 + rate)
    u = rate * g.T.cov(correction=0) + share * torch.outer(g.mean(0), g.mean(0))
    away = loc - z.mean(0)
    v = before + rate * z.T.cov(correction=0) + share * torch.outer(away, away)
    assert torch.allclose(after @ u @ after + after, v, rtol=1e-10)


def test_batch_and_match_says_where_scores_overflow() -> None:
    z, g = torch.randn(2, 50, 3).double(), torch.randn(2, 50, 3).double()
    g[1] *= 1e300
    loc, covariance = batch_and_match(
        torch.zeros(2, 3).double(), torch.eye(3).double().expand(2, 3, 3), z, g, 2.0
    )
    assert loc[0].isfinite().all()
    assert covariance[0].isfinite().all()
    assert covariance[1].isnan().all()


def test_batch_and_match_commutes_with_affine_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    z, g = torch.randn(2, 9, 3, generator=generator).double()
    matrix = torch.randn(3, 3, generator=generator).double() * torch.tensor([0.01, 1.0, 100.0])
    loc, covariance = batch_and_match(torch.zeros(3).double(), torch.eye(3).double(), z, g, 2.0)
    mapped = batch_and_match(
        torch.zeros(3).double(), matrix @ matrix.mT, z @ matrix.mT, g @ matrix.inverse(), 2.0
    )
    assert torch.allclose(mapped[0], matrix @ loc, rtol=1e-8)
    assert torch.allclose(mapped[1], matrix @ covariance @ matrix.mT, rtol=1e-8)


def test_low_rank_match_is_exact_for_a_gaussian_of_its_kind() -> None:
    """From a sixth of the draws that the dimension has, the second time from its own."""
    generator = torch.Generator().manual_seed(0)
    size, rank = 300, 4
    loadings = 2 * torch.randn(size, rank, generator=generator).double()
    diagonal = torch.rand(size, generator=generator).double() + 0.1
    covariance = diagonal.diag() + loadings @ loadings.T
    precision = torch.linalg.inv(covariance)
    zero, one = torch.zeros(size).double(), torch.ones(size).double()
    found = LowRankGaussian(zero, one, torch.eye(size, rank).double(), one[:rank])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(3):
            z, _ = found.draw(50)
            found = found.matched(z, -(z - 3) @ precision, rank)
        z, log_q = found.draw(50)
    target = MultivariateNormal(3 * one, covariance)
    assert ((found.loc - target.loc).abs() < 1e-3 * target.stddev).all()
    assert torch.allclose(log_q, target.log_prob(z), atol=1e-3)


def test_low_rank_match_of_a_saddle_is_finite() -> None:
    """Scores that rise along some directions have no precision there."""
    z = torch.randn(50, 20).double()
    g = torch.where(torch.arange(20) < 3, 2.0, -1.0) * z
    loc, scale, basis, variance = low_rank_match(z, g, 5)
    assert all(part.isfinite().all() for part in (loc, scale, basis, variance))
    assert (scale > 0).all()
    assert (variance > 0).all()
    with pytest.raises(ValueError, match="rank: expected less than draws and features"):
        low_rank_match(z, g, 20)


def test_low_rank_match_says_where_scores_overflow() -> None:
    z = torch.randn(50, 20).double()
    g = -z
    g[3] *= 1e300
    assert all(part.isnan().all() for part in low_rank_match(z, g, 5))
    zero, one = torch.zeros(20).double(), torch.ones(20).double()
    before = LowRankGaussian(zero, one, torch.eye(20, 5).double(), one[:5])
    assert before.matched(z, g, 5) is before


def groups_with_one_mean(y: Tensor) -> None:
    """Conjugate: every pair of latents is correlated by their common mean."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    z = pyro.sample(
        "z", dist.Normal(mean.unsqueeze(-1), 0.1).expand([*mean.shape, 300]).to_event(1)
    )
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def test_many_latents_start_with_their_correlations() -> None:
    y = 3 + torch.randn(300, generator=torch.Generator().manual_seed(0))
    marginal = dist.MultivariateNormal(torch.zeros(300), 1.01 * torch.eye(300) + 100.0)
    log_evidence = marginal.log_prob(y).item()
    guide = pf.AutoFlow(groups_with_one_mean)
    report = pf.fit_svi(guide, y, budget=0, seed=0, progress=False).psis
    assert report is not None
    assert report.elbo == pytest.approx(log_evidence, abs=0.05)
    assert report.ess > 9_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diagonal = find_gaussians(Density(guide, (y,), {}), starting_points(guide, 4))
    assert diagonal.elbo[0] < log_evidence - 1


def test_ascents_of_one_batch_arrive_each_at_its_own_maximum() -> None:
    def bumps(x: Tensor) -> tuple[Tensor, Tensor]:
        return -((x**2 - 4) ** 2).sum(-1), -4 * x * (x**2 - 4)

    starts = torch.tensor([[3.0, -1.0], [-50.0, 0.5], [1.0, 1.0], [2.0, -2.0]]).double()
    *_, last = ascend(bumps, starts, 100)
    assert torch.allclose(last, 2 * starts.sign(), atol=0.02)


def test_ascents_turn_back_from_where_there_is_no_density() -> None:
    def positive(x: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.where(x > 0, x.log() - x, -math.inf).sum(-1)
        return values, torch.where(x > 0, 1 / x - 1, 0.0)

    *_, last = ascend(positive, torch.tensor([[20.0], [1e-3], [-1.0]]).double(), 100)
    assert torch.allclose(last[:2], torch.ones(2, 1).double(), atol=0.15)  # 0.003 nats
    assert last[2] == -1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_badly_scaled_gaussian_posterior_is_matched(dtype: torch.dtype) -> None:
    target = normal(6, 1e4 if dtype == torch.float64 else 1e2)

    def model() -> None:
        loc, factor = target.loc.to(dtype), target.scale_tril.to(dtype)
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))

    guide = pf.AutoFlow(model, example_args=())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        find_start(Density(guide, (), {}), 4)
    whitening = guide.flow.transform.standardization
    root = (whitening.scale.unsqueeze(-1) * whitening.factor).double()
    relative = torch.linalg.solve_triangular(target.scale_tril, root, upper=False)
    assert torch.allclose(relative @ relative.mT, torch.eye(6).double(), atol=0.05)
    assert ((whitening.loc - target.loc).abs() < 0.02 * target.stddev).all()


def two_modes(share: float) -> Any:
    """Twenty deviations apart."""

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        log_p = [
            math.log(weight) + dist.Normal(torch.tensor([side, 0.0]), 1.0).to_event(1).log_prob(z)
            for weight, side in ((share, -10.0), (1 - share, 10.0))
        ]
        pyro.factor("density", torch.logaddexp(*log_p))

    return model


def test_a_guide_of_one_mode_is_told_of_the_other() -> None:
    guide = pf.AutoFlow(two_modes(0.3), pf.RealNVP, example_args=())
    fit = pf.fit_svi(guide, seed=0, budget=0, progress=False)
    assert fit.psis.ess > 0.9 * fit.psis.num_samples  # the weights see nothing
    assert fit.psis.missed == pytest.approx(0.3 / 0.7, rel=0.1)
    assert fit.psis.verdict == "do not trust"
    assert "30% of the posterior lies where the guide does not draw" in str(fit)


def test_the_default_guide_takes_both_modes() -> None:
    guide = pf.AutoFlow(two_modes(0.3), example_args=())
    report = pf.fit_svi(guide, seed=0, progress=False).psis
    assert report.verdict == "good"
    assert report.missed < 1e-3
    assert report.log_evidence == pytest.approx(0.0, abs=0.01)
    pyro.set_rng_seed(0)
    draws = guide.sample(20_000)["z"]
    assert (draws[:, 0] < 0).double().mean().item() == pytest.approx(0.3, abs=0.02)


def test_weights_of_a_mixture_are_found() -> None:
    guide = pf.AutoFlow(two_modes(0.2), example_args=())
    density = Density(guide, (), {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = find_gaussians(density, torch.tensor([[-9.0, 1.0], [9.0, 1.0]]).double())
        weights = mixture_weights(density, found)
    assert sorted(weights.tolist()) == pytest.approx([0.2, 0.8], abs=0.01)


def test_a_mode_without_mass_is_no_reason_for_distrust() -> None:
    guide = pf.AutoFlow(two_modes(1e-6), example_args=())
    report = pf.fit_svi(guide, seed=0, budget=0, progress=False).psis
    assert report.missed < 1e-4
    assert report.verdict == "good"


def test_what_the_guide_covers_is_not_missed() -> None:
    y = gaussian_data(dtype=torch.float64)
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    density = Density(guide, (y,), {})
    posterior = gaussian_posterior(y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        points = posterior.loc + torch.randn(8, len(posterior.loc), dtype=torch.float64)
        found = find_gaussians(density, points)
        guide.flow.transform.standardization.set_covariance_(found.loc[0], found.covariance[0, 0])
        assert len(found.loc) == 1
        assert missed_mass(density, found, found.elbo[0].item()) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_in_a_tail_is_no_mode(seed: int) -> None:
    """The Gaussian is the guide; one of its draws has up to 80 times the mean weight."""

    def model(times: Tensor) -> None:
        shape = pyro.sample("shape", dist.Gamma(1.0, 0.2))
        rate = pyro.sample("rate", dist.Gamma(1.0, 0.2))
        with pyro.plate("rows", len(times)):
            pyro.sample("time", dist.Gamma(shape, rate), obs=times)

    guide = pf.AutoFlow(model)
    times = torch.tensor([0.8, 2.1, 0.3])
    report = pf.fit_svi(guide, times, seed=seed, budget=0, progress=False).psis
    assert report.log_evidence == pytest.approx(-5.1767, abs=0.05)  # by quadrature
    assert report.missed < MISSED


def test_a_trained_guide_keeps_its_place() -> None:
    y = gaussian_data()
    guide = pf.AutoFlow(gaussian, example_args=(y,))
    pf.fit_svi(guide, y, seed=0, progress=False, psis_samples=0)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    pf.fit_svi(guide, y, seed=1, budget=0, progress=False, psis_samples=0)
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())


def test_arms_that_a_guide_has_lost_are_seen_by_chains() -> None:
    """A narrow normal on a banana: its own weights are nearly even, and the arms are missing."""

    def banana() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        pyro.sample("b", dist.Normal(0.5 * a**2, 0.5))

    guide = pf.AutoFlow(banana, example_args=())
    density = Density(guide, (), {})
    guide.flow.transform.standardization.set_(torch.tensor([0.0, 0.1]), torch.tensor([0.5, 0.5]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = find_gaussians(density, torch.zeros(1, 2, dtype=torch.float64))
        latents, log_q = density.draw_guide(2000)
        log_evidence = (density.value(latents) - log_q).exp().mean().log().item()
        assert log_evidence < -0.3  # of zero
        assert missed_mass(density, found, log_evidence) > 0.05


def test_necks_of_funnels_are_no_modes_and_valleys_are() -> None:
    def funnel() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("nine", 9):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    def two(points: Tensor, model: Any) -> list[bool]:
        guide = pf.AutoFlow(model, example_args=(), name=model.__qualname__)
        return separated(Density(guide, (), {}), Gaussians.around(points)).tolist()

    far = torch.zeros(2, 10, dtype=torch.float64)
    far[:, 0] = torch.tensor([3.0, -4.0])
    assert two(far, funnel) == [True, False]
    assert two(torch.tensor([[10.0, 0.0], [-10.0, 0.0]]).double(), two_modes(0.5)) == [True, True]


@pytest.mark.parametrize("size", [3, DENSE + 1])
def test_ends_of_walks_from_the_posterior_are_the_posterior(size: int) -> None:
    """With a dense covariance, and with deviations alone."""
    scale = torch.linspace(0.1, 10.0, size)
    guide = pf.AutoFlow(
        lambda: pyro.sample("z", dist.Normal(torch.ones(size), scale).to_event(1)),
        lambda features: pf.Flow([], features),
        example_args=(),
        name=f"walk_{size}",
    )
    guide.flow.transform.standardization.set_(torch.ones(size), scale)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        density = Density(guide, (), {})
        ends = walk(density, 256)
        starts = density.draw_guide(len(ends))[0]
    z = (ends - 1) / scale
    # Of so many chains, within five standard errors in every coordinate.
    assert (z.mean(0).abs() < 5 / len(ends) ** 0.5).all()
    assert (z.var(0) - 1).abs().max() < 5 * (2 / len(ends)) ** 0.5
    assert not torch.allclose(ends, starts)
