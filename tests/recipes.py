"""Every recipe of the catalogue, small enough to try everything on each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pyroflows as pf

# What keeps a recipe small beside `transforms` and `hidden_features`, and its numerics cheap and
# without noise.
OPTIONS: dict[str, dict[str, Any]] = {
    "NSF": {"bins": 4},
    "NCSF": {"bins": 4},
    "NAF": {"units": 4},
    "UNAF": {"units": 3},
    "BNAF": {"hidden_features": (4,)},
    "SOSPF": {"degree": 3},
    "BPF": {"degree": 8},
    "FlowPP": {"components": 4},
    "GF": {"components": 4},
    "ResidualFlow": {"hidden_features": (8, 8), "log_det": "exact"},
    "CNF": {"hidden_features": (8,), "trace": "exact", "solver": "rk4", "steps": 8},
    "TransformerAR": {"width": 8, "heads": 2, "blocks": 1},
}
NAMES = pf.list_flows()


def takes(name: str, option: str) -> bool:
    """Whether a recipe's constructor has that option."""
    return option in inspect.signature(pf.get_flow(name)).parameters


def small(name: str, features: int, context: int = 0, **options: Any) -> pf.Flow:
    """The recipe of that name: two layers, narrow networks; options replace these."""
    size = {"transforms": 2, "hidden_features": (16, 16)}
    shared = {option: value for option, value in size.items() if takes(name, option)}
    chosen: Mapping[str, Any] = {**shared, **OPTIONS.get(name, {}), **options}
    return pf.get_flow(name)(features, context, **chosen)
