"""What stands between the layers of a flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

from pyroflows.layers import (
    ActNorm,
    Householder,
    Layer,
    LULinear,
    OrthogonalLinear,
    Permutation,
)

#: A learned dense affine map, a learned rotation (by its Cayley transform, or by reflections), a
#: fixed random permutation, or nothing.
Mixing: TypeAlias = Literal["lu", "orthogonal", "householder", "permutation"] | None

MIXINGS: dict[str | None, Callable[[int], Layer]] = {
    "lu": LULinear,
    "orthogonal": OrthogonalLinear,
    "householder": Householder,
    "permutation": Permutation.random,
}


def mixed(layers: Iterable[Layer], features: int, mixing: Mixing, act_norm: bool) -> list[Layer]:
    """Each layer followed, towards the data, by its mixing and its normalisation."""
    if mixing is not None and mixing not in MIXINGS:
        names = ", ".join(map(repr, MIXINGS))
        raise ValueError(f"mixing: expected {names} or None, got {mixing!r}")
    stack: list[Layer] = []
    for layer in layers:
        stack.append(layer)
        if mixing is not None:
            stack.append(MIXINGS[mixing](features))
        if act_norm:
            stack.append(ActNorm(features))
    return stack
