"""docs/benchmarks/guides.md and its picture from stored results."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.benchmarks.vi.dims import DIMS, measure
from tests.benchmarks.vi.methods import GUIDE_CAP, METHODS, NUTS_CAP, PARTICLES, STEPS
from tests.benchmarks.vi.posterior import Truth
from tests.benchmarks.vi.runs import ROOT, Result, in_process, path_of, stored
from tests.benchmarks.vi.table import GROUPS, POSTERIORS

PAGE = ROOT / "docs" / "benchmarks" / "guides.md"
PICTURE = ROOT / "docs" / "images" / "guides.png"
SEEDS = range(5)
#: A centre that is off by more than this, in spreads, is wrong.
WRONG = 0.25

HEAD = """# Guides

`make bench-vi` runs what has no result yet, each run in a process of its own, and writes this
page from the results. Those of posteriordb need its data and reference draws, under the folder
that `PYROFLOWS_DATA` names. The figures come from one thread of a two-core CPU, in float64, torch
{torch}; seconds are of CPU time, for the fit and its report alone. Results are kept: a row may come
from an earlier commit than the latest.

A *centre error* is the distance between a mean and the true one in true standard deviations, the
worst over all scalars of the posterior; a *spread error* is the worst absolute logarithm of a
standard deviation over the true one. For the funnel and Student's t, whose moments hardly exist,
medians and quantiles stand for them. 10,000 draws of a guide alone err by about 0.03, NUTS's 500
draws by 0.1. *Weighted* figures are those of the draws with the smoothed importance weights of
`fit.psis`.

- **posteriordb**: twelve of its posteriors, whose truth is 10,000 reference draws. The tests hold
  our translations of the models to these draws by the two identities of the score.
- **asides**: seven models on which nothing was tuned; the truth is a long run of many chains
  (`python -m tests.benchmarks.vi.truths`).
- **nasty**: targets on which guides fail and conjugate models; the truth is a closed form or a
  quadrature.

pyroflows is `pf.fit_svi(pf.AutoFlow(model), *args, seed=s)` as it comes. Pyro's guides have
{steps:,} steps of ClippedAdam with {particles} vectorised particles, from a learning rate of 0.01
falling tenfold, and end after {guide_cap:.0f} s; AutoNormalizingFlow has four spline couplings,
AutoIAFNormal two transforms. Improper priors start as in Stan, since Pyro asks every prior for a
draw. NUTS is Pyro's, one chain of 500 warm-up steps and 500 draws, compiled just in time, and
ends after {nuts_cap:.0f} s; NumPyro's makes as many in an environment of its own, with the models
of posteriordb alone, and its time includes compilation.

"""


def results(name: str, method: str) -> list[Result]:
    found = [stored(name, method, seed) for seed in SEEDS]
    return [result for result in found if result is not None]


def usable(name: str, method: str) -> list[Result]:
    return [result for result in results(name, method) if "problem" not in result]


def line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells: str) -> list[str]:
    return [line(*cells), line(*["---"] * len(cells))]


def middle(runs: list[Result], key: str) -> float:
    """The median over seeds; NaN if any is not a number."""
    values = [run.get(key, math.nan) for run in runs]
    return math.nan if any(map(math.isnan, values)) else median(values)


def number(value: float, digits: int = 2) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0e}"


def time_of(runs: list[Result]) -> str:
    """The median of CPU seconds, with a digit after the point where it tells."""
    seconds = middle(runs, "seconds")
    return number(seconds, 1 if seconds < 10 else 0)


def is_wrong(result: Result, key: str) -> bool:
    """Also where the error is not a number."""
    return not result[key] <= WRONG


def silent(result: Result) -> bool:
    """Called good, and wrong."""
    return result.get("verdict") == "good" and is_wrong(result, "centre_error")


# --- tables -----------------------------------------------------------------------------------


def summary() -> list[str]:
    lines = [
        "## In short",
        "",
        f"Runs over all seeds. *Right*: every centre within {WRONG} spreads of the truth, by the",
        "draws themselves; for pyroflows, whose verdict says which to take, by the weighted ones",
        'where it says "use with weights". *Silent failures*: called "good" with a centre further',
        'off. *Refused*: "do not trust". The verdicts on Pyro\'s guides are those of our report on',
        "their draws; Pyro gives none. A run that failed counts as one.",
        "",
        *head("group", "method", "runs", "right", "silent failures", "refused", "median CPU s"),
    ]
    for group, names in GROUPS.items():
        for method in METHODS:
            runs = [result for name in names for result in results(name, method)]
            if not runs:
                continue
            fine = [run for run in runs if "problem" not in run]
            right = sum(not is_wrong(run, answer_key(method, run)) for run in fine)
            refused = sum(run.get("verdict") == "do not trust" for run in fine)
            has_verdict = not method.endswith("NUTS")
            seconds = time_of(fine) if fine else "-"
            silently = sum(map(silent, fine)) if has_verdict else "-"
            lines.append(
                line(
                    group,
                    method,
                    len(runs),
                    right,
                    silently,
                    refused if has_verdict else "-",
                    seconds,
                )
            )
    return [*lines, ""]


def answer_key(method: str, result: Result) -> str:
    """Which draws a user of the method would take."""
    if method == "pyroflows" and result.get("verdict") == "use with weights":
        return "weighted_centre_error"
    return "centre_error"


def ours() -> list[str]:
    lines = [
        "## pyroflows",
        "",
        "Medians over the seeds, of centre and spread errors also the worst. Evidence and ELBO are",
        "given less the true log evidence, in nats: in closed form, or by bridge sampling from the",
        "reference, with its standard error. Evaluations of the model's density are counted draw",
        "by draw, in thousands.",
        "",
        *head(
            "posterior",
            "seeds",
            "centre",
            "spread",
            "centre, weighted",
            "spread, weighted",
            "effective",
            "k-hat",
            "verdicts",
            "evidence",
            "ELBO",
            "CPU s",
            "evaluations",
        ),
    ]
    for name in (name for names in GROUPS.values() for name in names):
        runs = usable(name, "pyroflows")
        if runs:
            lines.append(line(name, len(runs), *our_cells(name, runs)))
    return [*lines, ""]


def our_cells(name: str, runs: list[Result]) -> list[str]:
    def with_worst(key: str) -> str:
        worst = max(run[key] for run in runs)
        return f"{number(middle(runs, key))} ({number(worst)})"

    verdicts = [run["verdict"] for run in runs]
    counts = {v: verdicts.count(v) for v in ("good", "use with weights", "do not trust")}
    short = {"good": "good", "use with weights": "weights", "do not trust": "no"}
    errors = ("centre_error", "spread_error", "weighted_centre_error", "weighted_spread_error")
    return [
        *(with_worst(key) for key in errors),
        f"{100 * middle(runs, 'ess_fraction'):.0f}%",
        number(middle(runs, "k_hat")),
        ", ".join(f"{count} {short[v]}" for v, count in counts.items() if count),
        *evidence_cells(truth_of(name), runs),
        time_of(runs),
        f"{middle(runs, 'densities') / 1000:,.0f}",
    ]


def evidence_cells(truth: Truth | None, runs: list[Result]) -> list[str]:
    if truth is None or truth.log_evidence is None:
        return ["-", "-"]
    error = f" ± {truth.log_evidence_error:.3f}" if truth.log_evidence_error else ""
    gap = middle(runs, "log_evidence") - truth.log_evidence
    return [f"{gap:+.3f}{error}", f"{middle(runs, 'elbo') - truth.log_evidence:+.3f}"]


def truth_of(name: str) -> Truth | None:
    """None where the data are not there."""
    try:
        return POSTERIORS[name].truth()
    except KeyError:
        return None


def comparison() -> list[str]:
    methods = [m for m in METHODS if any(results(n, m) for n in POSTERIORS)]
    lines = [
        "## Beside Pyro's guides and NUTS",
        "",
        "Worst centre error of the draws, CPU seconds, and gradients of the log density at single",
        "draws; medians over the seeds. An asterisk marks a run that met its time limit. An empty",
        "cell was not run.",
        "",
        *head("posterior", *methods),
    ]
    for name in POSTERIORS:
        cells = [comparison_cell(name, method) for method in methods]
        if any(cells):
            lines.append(line(name, *cells))
    return [*lines, "", time_beside_nuts(), "", "![Errors and times](../images/guides.png)", ""]


def comparison_cell(name: str, method: str) -> str:
    runs = usable(name, method)
    if not runs:
        return "failed" if results(name, method) else ""
    capped = any("over" in r.get("stopped", "") or r.get("steps", STEPS) < STEPS for r in runs)
    error = median(run[answer_key(method, run)] for run in runs)
    thousands = middle(runs, "gradients") / 1000
    return f"{number(error)}, {time_of(runs)} s, {thousands:.0f}k{' *' if capped else ''}"


def time_beside_nuts() -> str:
    """Our CPU time over that of NUTS: the geometric mean over the posteriors on which it ended."""
    logs = [
        math.log(middle(ours, "seconds") / nuts[0]["seconds"])
        for name in GROUPS["posteriordb"]
        if (ours := usable(name, "pyroflows")) and (nuts := usable(name, "NUTS"))
        if "over" not in nuts[0].get("stopped", "")
    ]
    if not logs:
        return ""
    return (
        f"CPU time of pyroflows over that of Pyro's NUTS, geometric mean of the {len(logs)} of\n"
        f"posteriordb on which NUTS ended: {math.exp(sum(logs) / len(logs)):.3f}."
    )


def dimensions() -> list[str]:
    found = {dim: stored_dim(dim) for dim in DIMS}
    if not any(found.values()):
        return []
    lines = [
        "## Dimension",
        "",
        "A correlated normal posterior in float32, `python -m tests.benchmarks.vi --dims`: a step",
        "of `fit_svi`, start and report besides, and what the process grew by.",
        "",
        *head("latents", "parameters", "CPU s a step", "CPU s besides", "MB", "finite"),
    ]
    for dim, result in found.items():
        if result is None:
            continue
        if "problem" in result:
            lines.append(line(dim, result["problem"], *[""] * 4))
            continue
        cells = (
            f"{result['parameters']:,}",
            f"{result['seconds_per_step']:.3f}",
            f"{result['seconds_besides']:.1f}",
            f"{result['megabytes']:.0f}",
            "yes" if result["finite"] else "no",
        )
        lines.append(line(f"{dim:,}", *cells))
    return [*lines, ""]


def stored_dim(dim: int) -> Result | None:
    return stored("dims", "pyroflows", dim)


def measure_dims() -> None:
    for dim in DIMS:
        in_process(measure, (dim,), path_of("dims", "pyroflows", dim))


def problems() -> list[str]:
    found = [
        f"- {name}, {method}, seed {seed}: {result['problem']}"
        for name in POSTERIORS
        for method in METHODS
        for seed in SEEDS
        if "problem" in (result := stored(name, method, seed) or {})
    ]
    return ["Runs that failed:", "", *found, ""] if found else []


def silences() -> list[str]:
    """Every silent failure of ours by name."""
    found = [
        f"- {name}, seed {seed}: a centre is off by {number(result['centre_error'])} spreads"
        for name in POSTERIORS
        for seed in SEEDS
        if silent(result := stored(name, "pyroflows", seed) or {})
    ]
    return ['Called "good" by pyroflows, and wrong:', "", *found, ""] if found else []


# --- picture ----------------------------------------------------------------------------------


def draw() -> None:
    """Per posterior and method the worst centre error, and the CPU time."""
    from matplotlib import pyplot

    methods = [m for m in METHODS if any(usable(n, m) for n in POSTERIORS)]
    names = [n for n in POSTERIORS if any(usable(n, m) for m in methods)]
    height = 1.5 + 0.24 * len(names)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, height), sharey=True)
    markers = dict(zip(METHODS, "osDv^<>", strict=False))
    for method in methods:
        rows = [(i, usable(name, method)) for i, name in enumerate(names) if usable(name, method)]
        errors = [median(run[answer_key(method, run)] for run in runs) for _, runs in rows]
        seconds = [middle(runs, "seconds") for _, runs in rows]
        places = [i for i, _ in rows]
        style = {
            "marker": markers[method],
            "linestyle": "",
            "markersize": 8 if method == "pyroflows" else 5,
            "alpha": 0.8,
            "zorder": 3 if method == "pyroflows" else 2,
        }
        left.plot([min(max(e, 5e-3), 1e2) for e in errors], places, label=method, **style)
        right.plot(seconds, places, **style)
    left.axvline(WRONG, color="0.5", linewidth=1, linestyle="--")
    left.set(xscale="log", xlabel="worst error of a centre, in spreads (cut at 0.005 and 100)")
    right.set(xscale="log", xlabel="CPU seconds")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.6 / height, 1, 1))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    pyplot.close(figure)


def text() -> str:
    start = HEAD.format(
        torch=torch.__version__,
        steps=STEPS,
        particles=PARTICLES,
        guide_cap=GUIDE_CAP,
        nuts_cap=NUTS_CAP,
    )
    parts = [*summary(), *silences(), *ours(), *comparison(), *dimensions(), *problems()]
    return (start + "\n".join(parts)).rstrip() + "\n"


def write() -> None:
    draw()
    Path(PAGE).write_text(text())
