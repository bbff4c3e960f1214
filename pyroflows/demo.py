"""What ``pyroflows demo`` runs: a density model and a guide, on real data."""

from __future__ import annotations

import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyroflows as pf

COLUMNS = [
    "mean radius",
    "mean area",
    "mean compactness",
    "mean fractal dimension",
    "radius error",
    "area error",
]
TEST_ROWS = 171
MLE_STEPS = 3000
NUTS_DRAWS = 2000
WARMUP = 500
GUIDE_DRAWS = 4000

SCHOOLS = list("ABCDEFGH")
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

Array = np.ndarray[Any, Any]
Limits = tuple[float, float]


def run(out: Path, seed: int) -> None:
    """Print both parts and write plots and draws into ``out``."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Announces ArviZ's 1.x line on every import of 0.2x.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import_module("arviz")
    out.mkdir(parents=True, exist_ok=True)
    density = fit_density(seed)
    plot_density(density, out / "density.png")
    print()
    posterior = fit_schools(seed)
    plot_posterior(posterior, out / "posterior.png")
    plot_training(density.fit, posterior.fit, out / "training.png")
    posterior.guide.to_netcdf(str(out / "posterior.nc"))
    written = {
        "density.png": "data, draws of the flow and draws of the Gaussian",
        "posterior.png": "the guide's posterior on NUTS's",
        "training.png": "the losses of both fits",
        "posterior.nc": "the guide's draws; read them with arviz.from_netcdf",
    }
    print(f"\nWritten to {out}{'' if str(out).endswith('/') else '/'}:")
    for name, content in written.items():
        print(f"  {name:14}  {content}")
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


# --- a density model --------------------------------------------------------------------------


class Density(NamedTuple):
    """A fitted flow, its lead over a Gaussian on held-out rows in nats, rows and draws."""

    fit: pf.training.MLEFit
    lead: Array
    rows: Array
    flow_draws: Array
    gaussian_draws: Array


def fit_density(seed: int) -> Density:
    """Fit a spline flow to a table and score it on rows that no fit has seen."""
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    names = list(table.feature_names)
    rows = table.data[:, [names.index(name) for name in COLUMNS]]
    shuffled = np.random.default_rng(seed).permutation(rows)
    test, train = shuffled[:TEST_ROWS], shuffled[TEST_ROWS:]
    print(
        "1. A density model: cell nuclei, the breast cancer table of scikit-learn\n\n"
        f"  columns  {', '.join(COLUMNS[:3])},\n           {', '.join(COLUMNS[3:])};\n"
        "           those with exact zeros, where a density does not exist, are left out\n"
        f"  rows     {len(train)} to fit, a fifth of which stop the flow early; "
        f"{len(test)} that no fit sees\n"
    )
    torch.manual_seed(seed)
    flow = pf.NSF(
        len(COLUMNS),
        transforms=2,
        hidden_features=(32,),
        bins=4,
        autoregressive=True,
        base=pf.distributions.StudentT(len(COLUMNS)),
    )
    fit = pf.fit_mle(flow, train, validation=0.2, steps=MLE_STEPS, batch_size=128, seed=seed)
    print(f"NSF: {fit}\n")
    with torch.no_grad():
        by_flow = flow().log_prob(torch.as_tensor(test, dtype=flow.dtype)).double().numpy()
    gaussian = _gaussian(train)
    by_gaussian = gaussian.log_prob(torch.as_tensor(test)).numpy()
    # The density of x where log x is Gaussian: a factor 1/x for every column.
    logs = np.log(test)
    of_logs = _gaussian(np.log(train)).log_prob(torch.as_tensor(logs)).numpy() - logs.sum(1)
    print("Held-out log likelihood, nats per row (mean ± standard error):\n")
    print(f"  {'':28} {'log likelihood':>16} {'NSF minus it':>16}")
    for label, scores in (
        ("NSF", by_flow),
        ("Gaussian, full covariance", by_gaussian),
        ("Gaussian of the logarithms", of_logs),
    ):
        lead = "" if scores is by_flow else _mean_and_error(by_flow - scores)
        print(f"  {label:28} {_mean_and_error(scores):>16} {lead:>16}")
    print(
        "\nBoth Gaussians are fitted to the same rows. Logarithms are what one would try after a\n"
        "look at the histograms; the flow is not told of them."
    )
    draws = flow().sample((len(rows),)).double().numpy()
    return Density(fit, by_flow - by_gaussian, rows, draws, gaussian.sample((len(rows),)).numpy())


def _gaussian(rows: Array) -> dist.MultivariateNormal:
    covariance = np.cov(rows, rowvar=False, bias=True)
    return dist.MultivariateNormal(torch.as_tensor(rows.mean(0)), torch.as_tensor(covariance))


def _mean_and_error(scores: Array) -> str:
    return f"{scores.mean():.2f} ± {scores.std(ddof=1) / np.sqrt(len(scores)):.2f}"


def plot_density(density: Density, path: Path) -> None:
    """Three pairs of columns: data, draws of the flow, draws of the Gaussian."""
    from matplotlib import pyplot

    pairs = [[0, 1], [2, 3], [4, 5]]
    sources = {
        f"data, {len(density.rows)} rows": (density.rows, "0.25"),
        "NSF, as many draws": (density.flow_draws, "C0"),
        "Gaussian, as many draws": (density.gaussian_draws, "C1"),
    }
    figure, axes = pyplot.subplots(len(pairs), 3, figsize=(8.5, 7.5), layout="constrained")
    for ax, title in zip(axes[0], sources, strict=True):
        ax.set_title(title, fontsize=11)
    for row, pair in zip(axes, pairs, strict=True):
        limits = np.array([_limits(density, column) for column in pair])
        row[0].set_ylabel(COLUMNS[pair[1]])
        for ax, (rows, color) in zip(row, sources.values(), strict=True):
            x, y = rows[:, pair].T
            ax.plot(x, y, ".", color=color, ms=4, alpha=0.6, mew=0)
            ax.set(xlim=limits[0], ylim=limits[1], xlabel=COLUMNS[pair[0]])
            # Sizes are positive: a draw beyond these lines is impossible.
            ax.axhline(0, color="0.8", lw=0.8, zorder=0)
            ax.axvline(0, color="0.8", lw=0.8, zorder=0)
            shown = (rows[:, pair] >= limits[:, 0]) & (rows[:, pair] <= limits[:, 1])
            if outside := (~shown.all(1)).sum():
                note = f"{outside} outside"
                ax.text(
                    0.97, 0.04, note, transform=ax.transAxes, ha="right", fontsize=8, color="0.4"
                )
            if ax is not row[0]:
                ax.set_yticklabels([])
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _limits(density: Density, column: int) -> Limits:
    """Nearly all data and draws; the few points beyond are counted in the panels."""
    shown = (density.rows, density.flow_draws, density.gaussian_draws)
    low = min(np.quantile(rows[:, column], 0.002) for rows in shown)
    high = max(np.quantile(rows[:, column], 0.995) for rows in shown)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


# --- a guide ----------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """A fitted guide's draws and NUTS's, as ArviZ holds them."""

    fit: pf.training.SVIFit
    guide: Any
    nuts: Any


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> None:
    """Effects of coaching in eight schools, in the non-centred parametrisation."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fit_schools(seed: int) -> Posterior:
    """Fit a flow guide, say what it is worth, and compare it with NUTS."""
    import arviz

    print(
        "2. A guide: eight schools, non-centred (Rubin 1981)\n\n"
        "Ten latents: mu, tau and z for each school; theta = mu + tau z is the school's effect.\n"
    )
    pyro.set_rng_seed(seed)
    coords = {"school": SCHOOLS}
    guide = pf.AutoFlow(eight_schools, name="demo")
    fit = pf.fit_svi(guide, ERRORS, EFFECTS, seed=seed)
    print(f"AutoFlow: {fit}\n")
    by_guide = pf.to_arviz(
        guide, ERRORS, EFFECTS, num_samples=GUIDE_DRAWS, coords=coords, seed=seed
    )
    print(f"ArviZ's summary of {GUIDE_DRAWS} independent draws:\n")
    print(arviz.summary(by_guide, kind="stats", round_to=2).to_string(), "\n")

    start = time.perf_counter()
    mcmc = _nuts()
    seconds = time.perf_counter() - start
    by_nuts = pf.to_arviz(
        mcmc, coords=coords, log_likelihood=False, posterior_predictive=False, prior=False
    )
    checks = [v for site, v in mcmc.diagnostics().items() if site in mcmc.get_samples()]
    draws = min(float(check["n_eff"].min()) for check in checks)
    r_hat = max(float(check["r_hat"].max()) for check in checks)
    print(
        f"Pyro's NUTS: one chain of {WARMUP} warm-up steps and {NUTS_DRAWS} draws (JIT) in "
        f"{seconds:.1f} s;\nat least {draws:.0f} effective draws, split r-hat at most {r_hat:.3f}. "
        f"The guide took {fit.seconds:.1f} s.\n"
    )
    apart = _compare(scalars(by_guide), scalars(by_nuts))
    print(
        f"\nThe means are at most {apart:.2f} posterior standard deviations apart. That many "
        f"effective\ndraws leave NUTS's own means uncertain by {1 / np.sqrt(draws):.2f}."
    )
    return Posterior(fit, by_guide, by_nuts)


def _nuts() -> Any:
    mcmc = MCMC(
        NUTS(eight_schools, target_accept_prob=0.9, jit_compile=True, ignore_jit_warnings=True),
        num_samples=NUTS_DRAWS,
        warmup_steps=WARMUP,
        disable_progbar=not sys.stderr.isatty(),
    )
    with warnings.catch_warnings():
        # Of torch.jit, which is the fastest that Pyro's NUTS has.
        warnings.simplefilter("ignore", DeprecationWarning)
        mcmc.run(ERRORS, EFFECTS)
    return mcmc


def _compare(guide: dict[str, Array], nuts: dict[str, Array]) -> float:
    """Print means and standard deviations; returns how far apart the means are at most."""
    print(f"  {'':10} {'mean':^25} {'standard dev.':^15}")
    print(f"  {'':10} {'guide':>7} {'NUTS':>7} {'apart':>9} {'guide':>7} {'NUTS':>7}")
    largest = 0.0
    for name, one in guide.items():
        other = nuts[name]
        apart = float((one.mean() - other.mean()) / other.std())
        largest = max(largest, abs(apart))
        print(
            f"  {name:10} {one.mean():7.2f} {other.mean():7.2f} {apart:+6.2f} sd "
            f"{one.std():7.2f} {other.std():7.2f}"
        )
    return largest


def scalars(draws: Any) -> dict[str, Array]:
    """Draws of mu, tau and each school's effect, by name."""
    posterior = draws.posterior
    theta = posterior["theta"].values.reshape(-1, len(SCHOOLS))
    return {
        "mu": posterior["mu"].values.reshape(-1),
        "tau": posterior["tau"].values.reshape(-1),
        **{f"theta[{school}]": theta[:, i] for i, school in enumerate(SCHOOLS)},
    }


def plot_posterior(posterior: Posterior, path: Path) -> None:
    """Marginals, and pairs as NUTS's draws under the guide's contours."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    guide, nuts = (_shown(draws) for draws in (posterior.guide, posterior.nuts))
    names = list(guide)
    figure, axes = pyplot.subplots(3, 3, figsize=(8, 7.5), layout="constrained")
    limits = {name: _quantiles(nuts[name], 0.002, 0.998) for name in names}
    for i, y in enumerate(names):
        for j, x in enumerate(names):
            ax = axes[i, j]
            if j > i:
                ax.axis("off")
                continue
            if i == j:
                bins = np.linspace(*limits[x], 30)
                ax.hist(nuts[x], bins, density=True, color="0.8")
                ax.hist(guide[x], bins, density=True, histtype="step", color="C0", lw=1.5)
                ax.set_yticks([])
            else:
                ax.plot(nuts[x], nuts[y], ".", color="0.7", ms=2.5, mew=0, rasterized=True)
                _contours(ax, guide[x], guide[y], limits[x], limits[y])
                ax.set_ylim(*limits[y])
            ax.set_xlim(*limits[x])
            if i == len(names) - 1:
                ax.set_xlabel(x)
            if j == 0 and i:
                ax.set_ylabel(y)
    handles = [
        Line2D([], [], color="0.7", marker="o", ls="", ms=4, label=f"NUTS, {NUTS_DRAWS} draws"),
        Line2D([], [], color="C0", label=f"AutoFlow, {GUIDE_DRAWS} draws:\n50% and 90% regions"),
    ]
    figure.legend(handles=handles, loc="upper right", frameon=False, bbox_to_anchor=(0.97, 0.97))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _shown(draws: Any) -> dict[str, Array]:
    found = scalars(draws)
    return {
        "mu": found["mu"],
        "log tau": np.log(found["tau"]),
        "theta[A]": found["theta[A]"],
    }


def _quantiles(draws: Array, low: float, high: float) -> Limits:
    return float(np.quantile(draws, low)), float(np.quantile(draws, high))


def _contours(ax: Any, x: Array, y: Array, x_limits: Limits, y_limits: Limits) -> None:
    """Highest-density regions that hold 50% and 90% of the draws, by a kernel estimate."""
    from scipy.stats import gaussian_kde

    estimate = gaussian_kde([x, y])
    grid = np.meshgrid(np.linspace(*x_limits, 60), np.linspace(*y_limits, 60))
    heights = estimate(np.stack([side.ravel() for side in grid])).reshape(grid[0].shape)
    levels = np.quantile(estimate(np.stack([x, y])[:, ::4]), [0.1, 0.5])
    ax.contour(*grid, heights, levels=levels, colors="C0", linewidths=1.5)


def plot_training(by_likelihood: Any, by_svi: Any, path: Path) -> None:
    """The losses of both fits."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for ax, fit, title in (
        (axes[0], by_likelihood, "NSF on the table"),
        (axes[1], by_svi, "AutoFlow on eight schools"),
    ):
        fit.plot(ax)
        ax.set_title(title, fontsize=11)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
