"""`run_mcmc` beside Pyro's NUTS: gradients, effective draws, errors of means, seconds.

``python -m tests.benchmarks.mcmc`` runs what has no result yet, one file each under
build/benchmarks/mcmc, and writes docs/benchmarks/mcmc.md from all of them.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyroflows as pf
from tests.models import SCHOOL_ERRORS, SCHOOLS, eight_schools

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "benchmarks" / "mcmc"
PAGE = ROOT / "docs" / "benchmarks" / "mcmc.md"
CHAINS, WARMUP, DRAWS = 4, 300, 500
#: Share of effective draws at which a guide's fit ends, more than its own draws need.
ENOUGH = 0.95

# --- models and the truth about them ----------------------------------------------------------

Truth = dict[str, np.ndarray]


def centred_schools(errors: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(errors)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, errors), obs=y)


def schools_truth() -> Truth:
    """Posterior means by quadrature over mu and tau; theta is normal given these."""
    y, s = SCHOOLS.double().numpy(), SCHOOL_ERRORS.double().numpy()
    mu = np.linspace(-25, 25, 801)[:, None, None]
    tau = np.exp(np.linspace(-12, 6, 1801))[None, :, None]
    variance = s**2 + tau**2
    log_density = -((y - mu) ** 2) / variance / 2 - np.log(variance) / 2
    log_prior = -(mu**2) / 50 - np.log1p((tau / 5) ** 2) + np.log(tau)  # over log(tau)
    log_weight = log_density.sum(-1) + log_prior[..., 0]
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    theta = (y * tau**2 + mu * s**2) / variance
    return {
        "mu": np.asarray((weight * mu[..., 0]).sum()),
        "tau": np.asarray((weight * tau[..., 0]).sum()),
        "theta": (weight[..., None] * theta).sum((0, 1)),
    }


def regression_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 5, generator=generator)
    x[:, 1] = 0.95 * x[:, 0] + 0.3 * x[:, 1]  # nearly collinear
    noise = torch.randn(100, generator=generator)
    return x, x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0]) + noise


def regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[-1]), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(weights @ x.mT, 1.0), obs=y)


def regression_truth() -> Truth:
    x, y = (part.double().numpy() for part in regression_data())
    precision = x.T @ x + np.eye(x.shape[1]) / 9
    return {"weights": np.linalg.solve(precision, x.T @ y)}


def funnel(spread: float) -> None:
    log_sigma = pyro.sample("log_sigma", dist.Normal(0.0, spread))
    with pyro.plate("dims", 100):
        pyro.sample("x", dist.Normal(0.0, (log_sigma / 2).exp()))


@dataclass(frozen=True)
class Problem:
    title: str
    model: Callable[..., None]
    args: tuple[Any, ...]
    truth: Callable[[], Truth]


PROBLEMS = {
    "funnel": Problem(
        "Funnel, 101 dimensions, log scale N(0, 1)",
        funnel,
        (1.0,),
        lambda: {"log_sigma": np.zeros(())},
    ),
    "neal": Problem(
        "Neal's funnel, 101 dimensions, log scale N(0, 3²)",
        funnel,
        (3.0,),
        lambda: {"log_sigma": np.zeros(())},
    ),
    "noncentred": Problem(
        "Eight schools, non-centred", eight_schools, (SCHOOL_ERRORS, SCHOOLS), schools_truth
    ),
    "centred": Problem(
        "Eight schools, centred", centred_schools, (SCHOOL_ERRORS, SCHOOLS), schools_truth
    ),
    "regression": Problem(
        "Linear regression, nearly collinear", regression, regression_data(), regression_truth
    ),
}

# --- methods ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Evaluations are counted draw by draw; seconds are of CPU time."""

    fit_evaluations: int
    gradients: int
    densities: int
    draws: int
    divergences: int
    effective: float
    r_hat: float
    error: float
    fit_seconds: float
    seconds: float


def pyro_nuts(problem: Problem, seed: int) -> Result:
    """Four chains, one after another, compiled just in time."""
    start = time.process_time()
    draws: list[dict[str, Tensor]] = []
    divergences = 0
    for chain in range(CHAINS):
        pyro.set_rng_seed(seed * CHAINS + chain)
        kernel = NUTS(problem.model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, num_samples=DRAWS, warmup_steps=WARMUP, disable_progbar=True)
        mcmc.run(*problem.args)
        draws.append(mcmc.get_samples())
        divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    seconds = time.process_time() - start
    posterior = {name: torch.stack([d[name] for d in draws]).numpy() for name in draws[0]}
    if "eta" in posterior:
        mu, tau = posterior["mu"][..., None], posterior["tau"][..., None]
        posterior["theta"] = mu + tau * posterior["eta"]
    return result(
        az.from_dict(posterior), problem, divergences=divergences, gradients=-1, seconds=seconds
    )


def ours(problem: Problem, seed: int, fitted: bool, **options: Any) -> Result:
    """`run_mcmc`, with the guide that it would fit itself fitted and counted first."""
    pyro.clear_param_store()
    guide, evaluations, fit_seconds = None, 0, 0.0
    if fitted:
        start = time.process_time()
        guide = pf.AutoFlow(problem.model)
        count = Counter(guide)
        pf.fit_svi(guide, *problem.args, enough=ENOUGH, seed=seed, progress=False)
        evaluations, fit_seconds = count.draws, time.process_time() - start
        count.stop()
    start = time.process_time()
    idata = pf.run_mcmc(
        problem.model,
        *problem.args,
        guide=guide,
        precondition=fitted,
        posterior_predictive=False,
        log_likelihood=False,
        seed=seed,
        progress=False,
        **options,
    )
    stats = idata.sample_stats
    return result(
        idata,
        problem,
        divergences=int(stats["diverging"].sum()) if "diverging" in stats else 0,
        gradients=int(stats.attrs.get("gradient_evaluations", 0)),
        densities=int(stats.attrs.get("density_evaluations", 0)),
        fit_evaluations=evaluations,
        fit_seconds=fit_seconds,
        seconds=time.process_time() - start,
    )


class Counter:
    """Counts the draws at which a guide evaluates its model."""

    def __init__(self, guide: pf.AutoFlow) -> None:
        self.guide, self.draws = guide, 0
        self._log_joint = guide.log_joint
        object.__setattr__(guide, "log_joint", self)

    def __call__(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.draws += len(latents)
        return self._log_joint(latents, *args, **kwargs)

    def stop(self) -> None:
        object.__delattr__(self.guide, "log_joint")


def result(
    idata: Any,
    problem: Problem,
    *,
    divergences: int,
    gradients: int,
    seconds: float,
    densities: int = 0,
    fit_evaluations: int = 0,
    fit_seconds: float = 0.0,
) -> Result:
    effective, r_hat, mcse = az.ess(idata), az.rhat(idata), az.mcse(idata)
    posterior = idata.posterior
    errors = [
        np.abs(posterior[name].mean(("chain", "draw")).values - truth) / mcse[name].values
        for name, truth in problem.truth().items()
    ]
    return Result(
        fit_evaluations=fit_evaluations,
        gradients=gradients,
        densities=densities,
        draws=posterior.sizes["chain"] * posterior.sizes["draw"],
        divergences=divergences,
        effective=min(float(effective[name].min()) for name in effective),
        r_hat=max(float(r_hat[name].max()) for name in r_hat),
        error=max(float(error.max()) for error in errors),
        fit_seconds=fit_seconds,
        seconds=seconds,
    )


LENGTH = {"chains": CHAINS, "draws": DRAWS, "warmup": WARMUP}
FUNNEL = {"chains": 2, "draws": 1500}

METHODS: dict[str, Callable[[Problem, int], Result]] = {
    "Pyro's NUTS": pyro_nuts,
    "nutpie": partial(ours, fitted=False, kernel="nutpie", **LENGTH),
    "nuts, guide": partial(ours, fitted=True, kernel="nuts", **LENGTH),
    "nutpie, guide": partial(ours, fitted=True, kernel="nutpie", **LENGTH),
    "imh, guide": partial(ours, fitted=True, kernel="imh", chains=100, draws=100),
    "nutpie, learned": partial(ours, fitted=False, kernel=pf.mcmc.Nutpie(adapt=True), **FUNNEL),
    "nutpie, guide and learned": partial(
        ours, fitted=True, kernel=pf.mcmc.Nutpie(adapt=True), **FUNNEL
    ),
}
FUNNELS = ("nutpie", "nutpie, guide", "nutpie, learned")
SMALL = ("Pyro's NUTS", "nutpie", "nuts, guide", "nutpie, guide", "imh, guide")
JOBS = [
    *product(("funnel",), FUNNELS, (0, 1, 2)),
    *product(("neal",), FUNNELS, (0,)),
    *product(("noncentred", "centred", "regression"), SMALL, (0,)),
]

# --- the page ---------------------------------------------------------------------------------


def path(problem: str, method: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "_" for c in method)
    return RESULTS / f"{problem}-{slug}-{seed}.json"


def row(method: str, results: list[Result]) -> str:
    def spread(values: list[float], digits: int = 0) -> str:
        low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    cells = [
        method,
        spread([r.fit_evaluations for r in results]) if results[0].fit_evaluations else "",
        spread([r.gradients + r.densities for r in results]) if results[0].gradients >= 0 else "",
        spread([r.draws for r in results]),
        spread([r.divergences for r in results]),
        spread([r.effective for r in results]),
        spread([r.r_hat for r in results], 3),
        spread([r.error for r in results], 1),
        spread([r.fit_seconds for r in results], 1) if results[0].fit_seconds else "",
        spread([r.seconds for r in results], 1),
    ]
    return "| " + " | ".join(cells) + " |"


TEXT = """# Exact sampling

`make bench-mcmc` runs what has no result yet and writes this page from the results. The figures
come from one thread of a busy two-core CPU, in float32, torch {torch}; seconds are of CPU time.
Where there were several seeds, cells say from where to where.

*nuts*, *nutpie* and *imh* are `pf.run_mcmc` with these kernels. *guide*: in the space of an
`AutoFlow` fitted by `fit_svi` with `enough={enough}`, trained for longer than its own draws would
need. *learned*: `pf.mcmc.Nutpie(adapt=True)` with `precondition=False`, whose flow is learned in
the warm-up. Neither: in the space of the latents. There are {chains} chains of {warmup} warm-up
and {draws} kept draws; 2 of 600 and 1,500 where a flow is learned; 100 of 20 and 100 for imh.

*Evaluations* are those of the model's log density, draw by draw, for all but imh with a
gradient: first those of the guide's fit and its report, then those of warm-up and sampling
together. *Effective* is the smallest bulk ESS over all scalars, *R-hat* the largest, both by
ArviZ. *Error* is the largest distance of a mean from the truth in Monte Carlo standard errors,
over the scalars whose truth is known: of the funnels the log scale, of the schools all by
quadrature.
"""

NUTPIE_SAYS = """
nutpie's documentation gives for this funnel, with its own flows in JAX, 42,527 gradients for a
smallest ESS of 1,836 without divergences; without flows, 124,219 gradients for 31.
"""

COLUMNS = (
    "",
    "fit's evaluations",
    "evaluations",
    "draws",
    "divergences",
    "effective",
    "R-hat",
    "error",
    "fit's CPU s",
    "CPU s",
)
HEAD = f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


def write() -> None:
    page = TEXT.format(
        torch=torch.__version__, chains=CHAINS, warmup=WARMUP, draws=DRAWS, enough=ENOUGH
    )
    for name, problem in PROBLEMS.items():
        page += f"\n## {problem.title}\n" + (NUTPIE_SAYS if name == "funnel" else "") + HEAD
        for method in METHODS:
            paths = [path(*job) for job in JOBS if job[:2] == (name, method)]
            results = [Result(**json.loads(p.read_text())) for p in paths if p.exists()]
            page += row(method, results) + "\n" if results else ""
    PAGE.write_text(page)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for job in JOBS:
        if not path(*job).exists():
            found = METHODS[job[1]](PROBLEMS[job[0]], job[2])
            path(*job).write_text(json.dumps(asdict(found), indent=1) + "\n")
            print(*job, found, flush=True)
    write()


if __name__ == "__main__":
    main()
