"""Which flows there are, what each costs, and when to take it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pyroflows.flows.autoregressive import IAF, MAF
from pyroflows.flows.coupling import NICE, NSF, RealNVP
from pyroflows.flows.flow import Flow


@dataclass(frozen=True)
class FlowInfo:
    """What a user needs to choose a flow.

    Attributes
    ----------
    recipe
        The class.
    title
        Its name in full.
    density, sampling
        Cost of scoring a value, and of a draw, for one layer.
    expressive
        What it can represent.
    use
        When to take it.
    paper
        Authors and year.
    """

    recipe: type[Flow]
    title: str
    density: str
    sampling: str
    expressive: str
    use: str
    paper: str

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.__name__


_STEPS = "a pass in as many steps as features"

CATALOGUE: tuple[FlowInfo, ...] = (
    FlowInfo(
        NICE,
        "Non-linear independent components estimation",
        "1 pass",
        "1 pass",
        "volume preserving: one density at the modes",
        "where volume must be kept; as a baseline",
        "Dinh et al. 2015",
    ),
    FlowInfo(
        RealNVP,
        "Real-valued non-volume preserving flow",
        "1 pass",
        "1 pass",
        "affine given half of the features; many layers needed",
        "guides; many features; both directions fast",
        "Dinh et al. 2017",
    ),
    FlowInfo(
        NSF,
        "Neural spline flow",
        "1 pass",
        "1 pass (autoregressive: " + _STEPS + ")",
        "any smooth density with few layers; sharp edges and gaps",
        "densities of up to some dozens of features: the first to try",
        "Durkan et al. 2019",
    ),
    FlowInfo(
        MAF,
        "Masked autoregressive flow",
        "1 pass",
        _STEPS,
        "affine given all earlier features",
        "densities with many rows or features that are scored more than drawn",
        "Papamakarios et al. 2017",
    ),
    FlowInfo(
        IAF,
        "Inverse autoregressive flow",
        _STEPS,
        "1 pass",
        "affine given all earlier features",
        "guides whose draws alone are scored",
        "Kingma et al. 2016",
    ),
)


def list_flows() -> tuple[str, ...]:
    """Names of all flows, for `get_flow`.

    Examples
    --------
    >>> "NSF" in pf.list_flows()
    True
    """
    return tuple(info.name for info in CATALOGUE)


def get_flow(name: str) -> type[Flow]:
    """The recipe of that name, whatever its case.

    Raises
    ------
    ValueError
        For an unknown name; the message lists the near ones.

    Examples
    --------
    >>> pf.get_flow("realnvp")(features=2).event_shape
    torch.Size([2])
    """
    recipes = {info.name.lower(): info.recipe for info in CATALOGUE}
    if name.lower() in recipes:
        return recipes[name.lower()]
    near = difflib.get_close_matches(name.lower(), recipes, n=3, cutoff=0.4)
    names = [recipes[match].__name__ for match in near]
    hint = (
        f"Did you mean {' or '.join(names)}?" if names else f"There are {', '.join(list_flows())}."
    )
    raise ValueError(f"name: expected the name of a flow, got {name!r}. {hint}")
