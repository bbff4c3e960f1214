"""The ways to an answer that are compared: ours, Pyro's guides, NUTS."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import iterated, spline_coupling
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.ops import integrator
from pyro.optim import ClippedAdam
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

import pyroflows as pf
from pyroflows.diagnostics.psis import weigh
from tests.benchmarks.vi.posterior import Draws, Posterior

#: Draws of a fitted guide that are compared with the truth.
DRAWS = 10_000
#: Of a Pyro guide: Adam's steps, vectorised particles, and CPU seconds after which it stops.
STEPS, PARTICLES, GUIDE_CAP = 5_000, 16, 300.0
#: Of Pyro's NUTS: warm-up steps and draws of one chain, and CPU seconds after which it stops.
WARM_UP, NUTS_DRAWS, NUTS_CAP = 500, 500, 600.0
#: The interpreter of an environment with NumPyro, and flags that keep JAX to one thread.
NUMPYRO = Path(os.environ.get("NUMPYRO_PYTHON", "build/numpyro/bin/python"))
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass
class Count:
    """Evaluations of the model's log density; a gradient is counted as an evaluation too."""

    densities: int = 0
    gradients: int = 0


@dataclass
class Answer:
    """What a method says of a posterior.

    Attributes
    ----------
    draws
        By site, ``{site: (S, *shape)}``; their ``weights`` ``(S,)`` sum to one, None without any.
    seconds
        CPU time of the fit and its report, imports and the loading of data left out.
    notes
        Numbers and words for the table: k-hat, evidence, steps.
    """

    draws: Draws
    seconds: float
    count: Count
    weights: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def with_report(report: pf.PSIS, seconds: float, count: Count, **notes: Any) -> Answer:
    """The answer of a guide, from the report on its draws."""
    return Answer(
        report.unpack(report.latents),
        seconds,
        count,
        report.log_weights.exp(),
        {
            "k_hat": report.k_hat,
            "ess_fraction": report.ess / report.num_samples,
            "log_evidence": report.log_evidence,
            "log_evidence_error": report.log_evidence_error,
            "elbo": report.elbo,
            "verdict": report.verdict,
            **notes,
        },
    )


# --- ours -------------------------------------------------------------------------------------


class CountedGuide(pf.AutoFlow):
    """AutoFlow that counts the draws at which the model is evaluated."""

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        self.count = Count()
        super().__init__(model, **options)

    def log_joint(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.count.densities += len(latents)
        if torch.is_grad_enabled() and latents.requires_grad:
            self.count.gradients += len(latents)
        return super().log_joint(latents, *args, **kwargs)


def ours(posterior: Posterior, args: tuple[Any, ...], seed: int) -> Answer:
    """`pf.fit_svi` as it comes."""
    guide = CountedGuide(posterior.model)
    start = time.process_time()
    fit = pf.fit_svi(guide, *args, seed=seed, progress=False)
    seconds = time.process_time() - start
    return with_report(fit.psis, seconds, guide.count, stopped=fit.stop_reason)


# --- Pyro's guides ----------------------------------------------------------------------------


class Startable(dist.ImproperUniform):
    """ImproperUniform with a draw, which Pyro's guides and kernels ask of every prior."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        to_support = biject_to(self.support)
        shape = to_support.inverse_shape(torch.Size(sample_shape) + self.shape())
        return to_support(torch.rand(shape) * 4 - 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Startable:
        return Startable(self.support, torch.Size(batch_shape), self.event_shape)


class StartFlatPriors(Messenger):
    """Where a prior is improper, start as Stan does: uniformly in (-2, 2), unconstrained."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, dist.ImproperUniform):
            msg["fn"] = Startable(fn.support, fn.batch_shape, fn.event_shape)


def latent_distribution(guide: Any) -> Any:
    """A fitted Pyro guide's distribution over the unconstrained latent vector."""
    if not isinstance(guide, AutoNormal):
        return guide.get_posterior()
    names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    pairs = [guide._get_loc_and_scale(name) for name in names]
    loc, scale = (torch.cat([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1))
    return dist.Normal(loc, scale).to_event(1)


def pyro_guide(
    make: Callable[..., Any], posterior: Posterior, args: tuple[Any, ...], seed: int
) -> Answer:
    """A guide of Pyro's by its own SVI, with the settings of its tutorials and many particles.

    ClippedAdam from a learning rate of 0.01 falling by a factor of ten, as the tutorial "SVI Part
    IV" advises.
    """
    pyro.set_rng_seed(seed)
    model = StartFlatPriors()(posterior.model)
    guide = make(model)
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.1 ** (1 / STEPS)})
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    start = time.process_time()
    done = 0
    while done < STEPS and time.process_time() - start < GUIDE_CAP:
        svi.step(*args)
        done += 1
    seconds = time.process_time() - start
    ruler = pf.AutoFlow(posterior.model, example_args=args)
    with torch.no_grad():
        latents, log_q = draws_of(latent_distribution(guide))
        log_p = torch.cat([ruler.log_joint(part, *args) for part in latents.split(2_000)])
    report = weigh(log_p, log_q, latents, ruler.unpack)
    count = Count(done * PARTICLES, done * PARTICLES)
    return with_report(report, seconds, count, steps=done)


def draws_of(q: Any) -> tuple[Tensor, Tensor]:
    """Draws and their log densities; a flow of Pyro's scores the very tensor that it drew."""
    latents = q.sample((DRAWS,))
    return latents, q.log_prob(latents)


# --- NUTS -------------------------------------------------------------------------------------


class Chain:
    """Collects a chain's draws as they come, and ends it when its time is over."""

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self.start = time.process_time()
        self.draws: list[dict[str, Tensor]] = []

    def __call__(self, kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        if stage.lower().startswith("sample"):
            self.draws.append({name: value.detach().clone() for name, value in params.items()})
        if time.process_time() - self.start > self.cap:
            raise TimeoutError(f"{self.cap:.0f} s of CPU are over in {stage}, step {i}")


def nuts(posterior: Posterior, args: tuple[Any, ...], seed: int) -> Answer:
    """Pyro's NUTS as it comes, one chain, with the just-in-time compiler."""
    pyro.set_rng_seed(seed)
    count, gradient = Count(), integrator.potential_grad

    def counted(*arguments: Any) -> Any:
        count.densities += 1
        count.gradients += 1
        return gradient(*arguments)

    integrator.potential_grad = counted
    model = StartFlatPriors()(posterior.model)
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    chain = Chain(NUTS_CAP)
    mcmc = MCMC(kernel, NUTS_DRAWS, WARM_UP, hook_fn=chain, disable_progbar=True)
    notes: dict[str, Any] = {}
    try:
        mcmc.run(*args)
    except TimeoutError as over:
        notes["stopped"] = str(over)
        if len(chain.draws) < NUTS_DRAWS // 5:
            raise
    seconds = time.process_time() - chain.start
    stacked = {name: torch.stack([d[name] for d in chain.draws]) for name in chain.draws[0]}
    draws = {name: kernel.transforms[name].inv(value) for name, value in stacked.items()}
    return Answer(draws, seconds, count, notes={**notes, **mixing(posterior.scalars(draws))})


def numpyro_nuts(posterior: Posterior, args: tuple[Any, ...], seed: int) -> Answer:
    """NumPyro's NUTS as it comes, one chain, under the interpreter that has NumPyro."""
    script = Path(__file__).with_name("numpyro_nuts.py")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.npz"
        np.savez(path, *(a.numpy() for a in args))
        numbers = map(str, (seed, WARM_UP, NUTS_DRAWS, path))
        done = subprocess.run(
            [str(NUMPYRO), str(script), posterior.name, *numbers],
            env={**os.environ, "XLA_FLAGS": ONE_THREAD},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        arrays = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    seconds, gradients = float(arrays.pop("_seconds")), int(arrays.pop("_gradients"))
    count = Count(gradients, gradients)
    return Answer(arrays, seconds, count, notes=mixing(posterior.scalars(arrays)))


def mixing(draws: Draws) -> dict[str, float]:
    """The smallest effective share of a chain's draws, over all scalars."""
    sizes = [float(arviz.ess(value.double().numpy()[None])) for value in draws.values()]
    return {"ess_fraction": min(sizes) / len(next(iter(draws.values())))}


METHODS: dict[str, Callable[[Posterior, tuple[Any, ...], int], Answer]] = {
    "pyroflows": ours,
    "AutoNormal": partial(pyro_guide, AutoNormal),
    "AutoMultivariateNormal": partial(pyro_guide, AutoMultivariateNormal),
    "NUTS": nuts,
    "NumPyro NUTS": numpyro_nuts,
    "AutoNormalizingFlow": partial(
        pyro_guide,
        partial(AutoNormalizingFlow, init_transform_fn=partial(iterated, 4, spline_coupling)),
    ),
    "AutoIAFNormal": partial(pyro_guide, partial(AutoIAFNormal, num_transforms=2)),
}
