"""What stands between the layers of a flow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from pyroflows.layers import ActNorm, Layer, LULinear

Mixing: TypeAlias = Literal["lu"] | None


def mixed(layers: Iterable[Layer], features: int, mixing: Mixing, act_norm: bool) -> list[Layer]:
    """Each layer followed, towards the data, by its mixing and its normalisation."""
    if mixing not in ("lu", None):
        raise ValueError(f"mixing: expected 'lu' or None, got {mixing!r}")
    stack: list[Layer] = []
    for layer in layers:
        stack.append(layer)
        if mixing == "lu":
            stack.append(LULinear(features))
        if act_norm:
            stack.append(ActNorm(features))
    return stack
