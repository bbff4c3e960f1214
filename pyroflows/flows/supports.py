"""Constrained data: what lies behind them, which rows violate them, and their names in files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroflows.errors import DataError
from pyroflows.layers import ToSupport
from pyroflows.transforms.supports import INTERVALS


def inner_features(features: int, support: Any) -> int:
    """How many features the layers map, where the data have ``features`` on this support.

    The simplex has one degree of freedom less than entries; most supports have as many.

    Examples
    --------
    >>> inner_features(3, constraints.simplex), inner_features(3, constraints.positive)
    (2, 3)
    """
    if support is None:
        return features
    to_support = ToSupport(support)
    if to_support.columns and len(to_support.support.cseq) != features:
        raise ValueError(
            f"support: expected a constraint for each of {features} features, got "
            f"{len(to_support.support.cseq)}"
        )
    event = (features,) * max(1, to_support.support.event_dim)
    shape = torch.Size(to_support().inverse_shape(event))
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(
            f"support: there are no real vectors behind {features} features of {support}"
        )
    return shape[0]


# --- data -----------------------------------------------------------------------------------------

WORDS = {
    constraints.greater_than: "greater than {lower_bound}",
    constraints.greater_than_eq: "at least {lower_bound}",
    constraints.less_than: "less than {upper_bound}",
    constraints.interval: "in [{lower_bound}, {upper_bound}]",
    constraints.half_open_interval: "in [{lower_bound}, {upper_bound})",
}


def check_support(name: str, rows: Tensor, support: Any) -> None:
    """Raise `DataError` unless all rows ``(N, *event)`` lie in the support.

    The message names the first row outside, its column, and how many there are.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    parts = support.cseq if isinstance(support, constraints.stack) else [support]
    if len(parts) > 1:
        checks = [part.check(x) for part, x in zip(parts, rows.unbind(-1), strict=True)]
        valid = torch.stack(checks, -1)
    else:
        valid = support.check(rows)
    if valid.all():
        return
    row, *column = (~valid).nonzero()[0].tolist()
    part = parts[column[-1]] if len(parts) > 1 else parts[0]
    must = WORDS.get(type(part), f"in the support {part}").format(**vars(part))
    where = f"column {', '.join(map(str, column))} " if column else ""
    count = int((~valid).flatten(1).any(1).sum()) if valid.dim() > 1 else int((~valid).sum())
    value = rows[row][tuple(column)].tolist()
    shown = f"{value:.6g}" if isinstance(value, float) else f"{value!s:.80}"
    raise DataError(
        f"{name}: {where}must be {must}, but row {row} has {shown}; {count} of {len(rows)} rows "
        "are outside the support. Correct or remove them, or give the flow the support they have."
    )


def rows_at_ends(rows: Tensor, support: Any) -> int:
    """How many rows have a value at an end that belongs to their support."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    columns = rows.unbind(-1) if isinstance(support, constraints.stack) else [rows]
    parts = support.cseq if isinstance(support, constraints.stack) else [support]
    count = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for part, column in zip(parts, columns, strict=True):
        ends = [getattr(part, name) for name in INTERVALS.get(type(part), ())]
        ends += [0.0] * isinstance(part, type(constraints.simplex))
        for end in ends:
            count |= (column == end).reshape(len(rows), -1).any(-1)
    return int(count.sum())


# --- files ----------------------------------------------------------------------------------------

#: Constraints with arguments, and the attributes that hold these.
PARAMETERS: dict[Any, tuple[str, ...]] = {
    **INTERVALS,
    constraints.independent: ("base_constraint", "reinterpreted_batch_ndims"),
    constraints.stack: ("cseq", "dim"),
    constraints.integer_interval: ("lower_bound", "upper_bound"),
}


def name_of_constraint(constraint: Any) -> tuple[str, list[Any]] | None:
    """The public name of a constraint and its arguments; None where it has no name."""
    kind = type(constraint)
    for name in constraints.__all__:
        public = getattr(constraints, name)
        if public is kind and kind in PARAMETERS:
            return name, [getattr(constraint, argument) for argument in PARAMETERS[kind]]
        if type(public) is kind and kind not in PARAMETERS and vars(public) == vars(constraint):
            return name, []
    return None


def constraint_by_name(name: str) -> Callable[..., Any] | None:
    """What makes the constraint of this name from its arguments; None for a name unknown."""
    public = getattr(constraints, name) if name in constraints.__all__ else None
    if isinstance(public, constraints.Constraint):
        return lambda: public
    return public if public in PARAMETERS else None
