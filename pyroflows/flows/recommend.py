"""The instant choice of a flow, by the size of the problem alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyroflows.flows.catalogue import get_flow
from pyroflows.flows.flow import Flow

#: Fewer rows than this call for small networks.
FEW = 1000
#: More features than this call for few parameters each; than this, for no dense matrices.
MANY, WIDE = 64, 500


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
        recipe: Any = get_flow(self.name)
        return recipe(features, context, **{**self.options, **options})

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
    if features > WIDE:
        return Candidate(
            "RealNVP",
            {"transforms": 6, "max_log_scale": 1.0, "mixing": None, "act_norm": True},
            "affine couplings stay stable in many dimensions, where dense mixing would be costly",
        )
    return Candidate(
        "RealNVP",
        {"transforms": 6, "hidden_features": (32, 32), "max_log_scale": 1.0},
        "cheap and stable in both directions, as the path gradient needs",
    )


def _density(features: int, rows: int) -> Candidate:
    return shortlist(features, rows)[0]


def shortlist(features: int, rows: int) -> list[Candidate]:
    """Candidates for a density of this size, the likeliest first."""
    if rows < FEW:
        few = "few rows: small networks overfit less"
        # Their parameters grow with the square of the features.
        smooth = [
            Candidate("BPF", {}, "few rows: smooth polynomials learn nothing by heart at once"),
            Candidate("Sylvester", {}, "few rows: close to a Gaussian with all correlations"),
        ]
        return [
            *(smooth if features <= MANY else []),
            Candidate("MAF", {"transforms": 2, "hidden_features": (16,)}, few),
            Candidate("MAF", {"transforms": 1, "hidden_features": ()}, few),
            Candidate("NSF", {"transforms": 2, "hidden_features": (16,), "bins": 4}, few),
        ]
    if features > WIDE:
        wide = "its cost grows with the features, not with their square"
        plain = {"mixing": None, "act_norm": True}
        return [Candidate(name, plain, wide) for name in ("RealNVP", "NSF", "MAF")]
    if features > MANY:
        many = "one pass for each layer, and few parameters for each feature"
        return [Candidate(name, {}, many) for name in ("MAF", "NSF", "RealNVP")]
    fine = "splines given all earlier features: the most structure for each layer"
    return [
        Candidate("NSF", {"autoregressive": True}, fine),
        Candidate("NSF", {}, "both directions in one pass"),
        Candidate("NAF", {}, "several modes in each conditional, with straight tails"),
        Candidate("FlowPP", {}, "several modes, from couplings"),
        Candidate("MAF", {}, "smooth dependence, few parameters"),
    ]
