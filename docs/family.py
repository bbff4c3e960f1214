"""The page of the family: ``python docs/family.py`` writes docs/explanation/flows.md anew.

What stands between its two comments is made from the catalogue, the rest is written by hand.
``--pictures`` fits the flows first and draws them; names after it choose some.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.flows.catalogue import CATALOGUE, FlowInfo
from pyroflows.testing import two_dimensional

DOCS = Path(__file__).parent
PAGE = DOCS / "explanation" / "flows.md"
PICTURES = DOCS / "images" / "flows"
NATS = PICTURES / "nats.json"
BEGIN, END = "<!-- Written by docs/family.py: -->", "<!-- By hand again. -->"

STEPS = 1000
SIZE = 120
DENSITY = "pinwheel"
#: Where the recipes' defaults are larger than a picture needs.
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        name: {"hidden_features": (32, 32)}
        for name in (
            *("NICE", "RealNVP", "MAF", "IAF", "NSF", "NCSF", "FlowPP"),
            *("NAF", "UNAF", "SOSPF", "BPF", "ResidualFlow"),
        )
    },
    "TransformerAR": {"width": 32, "blocks": 1},
}

HEAD = """\
| flow | density | sampling | parameters | what it can represent | when to take it |
| --- | --- | --- | ---: | --- | --- |"""

SECTION = """\
(flow-{anchor})=
### {name}: {title}

$$ {formula} $$

| | |
| --- | --- |
| Density | {density} |
| Sampling | {sampling} |
| Represents | {expressive} |
| Take it for | {use} |
| Paper | {paper} |
| Options | {{py:class}}`pyroflows.flows.{name}` |

![Data and the density that {name} was fitted to](../images/flows/{name}.png)

{caption}"""


def generated() -> str:
    """The table and the sections."""
    nats = json.loads(NATS.read_text())
    rows = [HEAD, *map(_row, CATALOGUE)]
    sections = [_section(info, nats[info.name]) for info in CATALOGUE]
    return "\n\n".join(["\n".join(rows), "## One by one", *sections])


def page() -> str:
    """The whole page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{generated()}\n\n{END}{after}"


def _row(info: FlowInfo) -> str:
    parameters = sum(p.numel() for p in info.recipe(6).parameters())
    link = f"[{info.name}](#flow-{info.name.lower()})"
    texts = (info.density, info.sampling, f"{parameters:,}", info.expressive, info.use)
    return f"| {link} | {' | '.join(texts)} |"


def _section(info: FlowInfo, nats: float) -> str:
    what = "two angles" if info.name == "NCSF" else f"the {DENSITY}"
    way = "flow matching" if info.name == "CNF" else "maximum likelihood"
    return SECTION.format(
        **{key: value for key, value in vars(info).items() if key != "recipe"},
        name=info.name,
        anchor=info.name.lower(),
        caption=f"*Left {what}, right the flow after a short fit by {way}: {nats:.2f} test nats.*",
    )


def angles(count: int, seed: int) -> Tensor:
    """Two angles: the second turns twice as fast as the first, with noise."""
    generator = torch.Generator().manual_seed(seed)
    first = 2 * math.pi * torch.rand(count, generator=generator)
    second = 2 * first + (0.3 + 0.2 * first.cos()) * torch.randn(count, generator=generator)
    x = torch.stack([first, second], -1)
    return (x + math.pi).remainder(2 * math.pi) - math.pi


def data(name: str, count: int, seed: int) -> Tensor:
    """Rows that the flow of this name is shown on."""
    return angles(count, seed) if name == "NCSF" else two_dimensional(DENSITY, count, seed)


def fitted(name: str) -> pf.Flow:
    """A small flow after a short fit."""
    torch.manual_seed(0)
    flow = pf.get_flow(name)(2, **OPTIONS.get(name, {}))
    x = data(name, 10_000, seed=0)
    if name == "CNF":
        # Its steps are cheap; pairs matched by distance give it straight ways.
        pf.fit_flow_matching(flow, x, coupling="optimal", steps=4 * STEPS, seed=0)
    else:
        pf.fit_mle(flow, x, steps=STEPS, lr=3e-3, seed=0)
    return flow


@torch.no_grad()
def draw(name: str, flow: pf.Flow) -> float:
    """Save the picture; returns the mean log density of unseen rows."""
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm
    from PIL import Image

    half = math.pi if name == "NCSF" else 4.6
    draws = data(name, 2_000_000, seed=1)
    truth = torch.histogramdd(draws, SIZE, range=[-half, half] * 2, density=True).hist.T
    # Means of four points in a cell, as the histogram's are means over cells.
    side = half * ((torch.arange(2 * SIZE) + 0.5) / SIZE - 1)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    density = flow().log_prob(grid).exp().view(SIZE, 2, SIZE, 2).mean((1, 3))
    # One scale of colours in all pictures of the same density.
    colours = PowerNorm(0.5, 0, truth.quantile(0.998).item())
    figure, panels = pyplot.subplots(1, 2, figsize=(5, 2.5), dpi=100, layout="constrained")
    for panel, image in zip(panels, (truth, density), strict=True):
        panel.imshow(image, cmap="Blues", norm=colours, origin="lower", extent=[-half, half] * 2)
        panel.set(xticks=[], yticks=[])
    buffer = io.BytesIO()
    figure.savefig(buffer)
    pyplot.close(figure)
    # A palette halves the file.
    Image.open(buffer).convert("RGB").quantize(96).save(PICTURES / f"{name}.png", optimize=True)
    return flow().log_prob(data(name, 10_000, seed=2)).mean().item()


def picture(names: Sequence[str]) -> None:
    """Fit and draw."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = draw(name, fitted(name))
        nats = json.loads(NATS.read_text()) if NATS.exists() else {}
        nats[name] = round(found, 3)
        NATS.write_text(json.dumps(dict(sorted(nats.items())), indent=2) + "\n")


def main() -> None:
    """Draw what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", nargs="*", metavar="NAME", choices=pf.list_flows())
    chosen = parser.parse_args().pictures
    if chosen is not None:
        picture(chosen or pf.list_flows())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
