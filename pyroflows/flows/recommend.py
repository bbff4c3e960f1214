"""The instant choice of a flow, by the size of the problem alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyroflows.flows.catalogue import get_flow
from pyroflows.flows.flow import Flow


@dataclass(frozen=True)
class Candidate:
    """A flow that is not built yet.

    Attributes
    ----------
    name
        Of the recipe, see `list_flows`.
    options
        Keyword arguments of the recipe.
    reason
        Why it was chosen, in words.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def build(self, features: int, context: int = 0, **options: Any) -> Flow:
        """The flow; further options replace the candidate's."""
        return get_flow(self.name)(features, context, **{**self.options, **options})

    def __str__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.name}(features{options}){reason}"


def recommend(
    features: int, rows: int | None = None, purpose: Literal["density", "guide"] = "density"
) -> Candidate:
    """A flow for a problem of this size, without looking at data.

    `pyroflows.select` compares flows on the data themselves.

    Parameters
    ----------
    features
        Size of the event.
    rows
        Rows to fit a density to; not needed for a guide.
    purpose
        ``"density"`` for maximum likelihood, ``"guide"`` for variational inference.

    Raises
    ------
    ValueError
        For sizes below one, an unknown purpose, or a density without the number of rows.

    Examples
    --------
    >>> candidate = pf.recommend(features=6, rows=100_000)
    >>> candidate.name
    'NSF'
    >>> flow = candidate.build(6)
    """
    if purpose not in ("density", "guide"):
        raise ValueError(f"purpose: expected 'density' or 'guide', got {purpose!r}")
    if features < 1:
        raise ValueError(f"features: expected at least 1, got {features}")
    if purpose == "guide":
        return _guide(features)
    if rows is None or rows < 1:
        raise ValueError(f"rows: expected at least 1 row to fit a density to, got {rows}")
    return _density(features, rows)


def _guide(features: int) -> Candidate:
    if features > 500:
        return Candidate(
            "RealNVP",
            {"transforms": 6, "mixing": None, "act_norm": True, "max_log_scale": 1.0},
            "affine couplings stay stable in many dimensions; dense mixing would be quadratic",
        )
    return Candidate(
        "RealNVP",
        {"transforms": 6, "hidden_features": (32, 32), "max_log_scale": 1.0},
        "one pass in either direction, as the path gradient needs",
    )


def _density(features: int, rows: int) -> Candidate:
    return shortlist(features, rows)[0]


def shortlist(features: int, rows: int) -> list[Candidate]:
    """Candidates for a density of this size, the likeliest first."""
    return [Candidate(n) for n in ("NSF", "MAF", "RealNVP")]
