"""Constrained data: how many features lie behind them, and constraints in files."""

from __future__ import annotations

from typing import Any

import torch

from pyroflows.layers import ToSupport


def inner_features(features: int, support: Any) -> int:
    """How many features the layers map, where the data have ``features`` on this support.

    The simplex has one degree of freedom less than entries; most supports have as many.

    Examples
    --------
    >>> from torch.distributions import constraints
    >>> inner_features(3, constraints.simplex), inner_features(3, constraints.positive)
    (2, 3)
    """
    if support is None:
        return features
    to_support = ToSupport(support)
    event = (features,) * max(1, to_support.support.event_dim)
    shape = torch.Size(to_support().inverse_shape(event))
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(
            f"support: there are no real vectors behind {features} features of {support}"
        )
    return shape[0]
