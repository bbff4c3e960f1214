"""docs/benchmarks/densities.md from stored results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.models import MODELS, PAIRS
from tests.benchmarks.runs import FITS, path_of, size_of
from tests.benchmarks.sets import SETS

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "densities.md"
#: `select` is to come within this of the best recipe, in nats.
CLOSE = 0.05

HEAD = """# Densities

Held-out log densities in nats, higher is better. `make benchmark-density` installs the peers, fits
what has no result yet and writes this page from the results; POWER needs the data set, under the
folder that `PYROFLOWS_DATA` names. The figures come from two cores of a CPU, torch {torch}, one
thread for each fit.

All flows are fitted alike: Adam at 1e-3 with a cosine schedule, gradients clipped at a norm of
5, standardised data, the best state of all checks on the validation rows. POWER is a
slice of 2007, {power_steps:,} steps of 512, hidden layers (128, 128); its split is fixed, so
that seeds differ in the fits alone. The others have {steps:,} steps of 256 and hidden layers
(64, 64). A density in the plane has 5,000 rows to fit and 10,000 to test on. A table of
scikit-learn has three fifths of its few rows to fit (wine 108, breast cancer 343, diabetes
266) and a fifth to test on; it has noise of 0.05 deviations added, because its values repeat,
and every seed splits it anew.

"""


def stored(set_name: str, model: str, seed: int) -> dict[str, Any] | None:
    path = path_of(set_name, model, seed)
    return torch.load(path) if path.exists() else None


def scores(set_name: str, model: str) -> list[Tensor]:
    """One tensor of test scores for each seed with a result, in the order of the seeds."""
    results = [stored(set_name, model, seed) for seed in range(size_of(set_name).seeds)]
    return [r["scores"] for r in results if r is not None and "scores" in r]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """Mean paired difference, and its standard error: over rows or over seeds, the larger."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = torch.stack([gap.mean() for gap in gaps])
    over_rows = math.sqrt(sum((g.var() / len(g)).item() for g in gaps)) / len(gaps)
    over_seeds = means.std().item() / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return means.mean().item(), max(over_rows, over_seeds)


def line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def comparison() -> list[str]:
    """Each of ours beside the peer of its kind."""
    lines = [
        "## Beside zuko and nflows",
        "",
        "Flows of the same kind with five layers and the same number of parameters. The difference",
        "is ours minus theirs, with the standard error of paired differences, over rows or over",
        "seeds, whichever is larger. With one seed, what another start would give is not in it.",
        "POWER has three seeds, the small sets six: of three short fits the errors themselves are",
        "too uncertain.",
        "",
        line("set", "ours", "nats", "peer", "nats", "difference", "seeds", "CPU time, ours / peer"),
        line(*["---"] * 8),
    ]
    missing = []
    for name in SETS:
        for ours, peer in PAIRS.items():
            a, b = scores(name, ours), scores(name, peer)
            a, b = a[: len(b)], b[: len(a)]
            if not a:
                missing.append(f"{ours} on {name}")
                continue
            gap, error = difference(a, b)
            mean = [sum(s.mean().item() for s in part) / len(part) for part in (a, b)]
            seconds = [
                sum(stored(name, model, seed)["seconds"] for seed in range(len(a)))  # type: ignore[index]
                for model in (ours, peer)
            ]
            lines.append(
                line(
                    name,
                    ours,
                    f"{mean[0]:.3f}",
                    peer,
                    f"{mean[1]:.3f}",
                    f"{gap:+.3f} ± {error:.3f}",
                    len(a),
                    f"{seconds[0] / seconds[1]:.2f}",
                )
            )
    return [*lines, "", f"Not run: {', '.join(missing)}."] if missing else lines


def selection() -> list[str]:
    """All recipes with their defaults, and what `select` picks."""
    lines = [
        "## All recipes, and `select`",
        "",
        f"One seed, documented defaults. `pf.select`, with a budget of {FITS} fits, sees training",
        "and validation rows alone; its winner has had about as many steps as each recipe. The",
        "last line is how far it stays behind the best of all recipes on the test rows. NCSF is",
        "for angles; CNF and ResidualFlow, of which one fit takes minutes, are left out. An empty",
        "cell was not run. What `select` shortlists for few rows was chosen with the three tables",
        "in view.",
        "",
    ]
    ours = [m for m in MODELS if not m.startswith(("zuko", "nflows"))]
    sets = [name for name in SETS if stored(name, "select", 0) is not None]
    lines += [line("flow", *sets), line(*["---"] * (len(sets) + 1))]
    tables = {
        name: {m: s[0].mean().item() for m in ours if (s := scores(name, m))} for name in sets
    }
    for model in ours:
        cells = []
        for name in sets:
            value, best = tables[name].get(model), max(tables[name].values())
            text = "" if value is None else f"{value:.3f}"
            cells.append(f"**{text}**" if value == best else text)
        lines.append(line(model, *cells))
    picks, close = [], 0
    for name in sets:
        result = stored(name, "select", 0) or {}
        nats = result["scores"].mean().item()
        close += nats >= max(tables[name].values()) - CLOSE
        picks.append(
            (
                re.sub(r"\): .*", ")", result["chosen"].replace("features, ", "")),
                nats,
                max(tables[name].values()) - nats,
            )
        )
    lines.append(line("`select`: its pick", *(p[0] for p in picks)))
    lines.append(line("`select`: nats", *(f"{p[1]:.3f}" for p in picks)))
    lines.append(line("behind the best", *(f"{p[2]:+.3f}" for p in picks)))
    lines += [
        "",
        f"Within {CLOSE} nats of the best, or ahead of it: {close} of {len(sets)} sets.",
        "",
    ]
    return lines


def problems() -> list[str]:
    found = []
    for name in SETS:
        for model in (*MODELS, "select"):
            for seed in range(size_of(name).seeds):
                result = stored(name, model, seed) or {}
                if "problem" in result:
                    found.append(f"- {name}, {model}, seed {seed}: {result['problem']}")
    return ["Fits that failed:", "", *found, ""] if found else []


def write() -> None:
    head = HEAD.format(
        torch=torch.__version__, power_steps=size_of("POWER").steps, steps=size_of("moons").steps
    )
    PAGE.write_text(head + "\n".join([*comparison(), "", *selection(), *problems()]))
