"""Modules that remember how they were made, so that a file can describe them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import nn
from torch.nn.modules import activation as activations

from pyroflows.nn.mlp import widths

# Least values of the sizes that many constructors share.
SIZES = {"features": 1, "context": 0, "transforms": 1}


class RecordedModule(nn.Module):
    """A module whose constructor's arguments stay readable in `arguments`.

    The words that constructors share mean the same everywhere, and are checked before the
    constructor runs: ``features``, ``context``, ``transforms``, ``hidden_features``, ``activation``
    and ``univariate``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _check_words({**dict(zip(_positions(cls), args, strict=False)), **kwargs})
        new = super().__new__(cls)
        new.__dict__["_recorded"] = (args, kwargs)
        return new

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name, without the defaults that were left alone."""
        args, kwargs = self.__dict__["_recorded"]
        bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        return {name: value for name, value in bound.arguments.items() if name != "self"}


def _positions(cls: type) -> list[str]:
    """Names of the constructor's positional parameters."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _check_words(words: Mapping[str, Any]) -> None:
    for name, least in SIZES.items():
        size = words.get(name, least)
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise ValueError(f"expected {name} to be an integer, got {size!r}")
        if size < least:
            raise ValueError(f"expected {name} >= {least}, got {name}={size}")
    if "hidden_features" in words:
        widths(words["hidden_features"])
    if "activation" in words:
        _check_activation(words["activation"])
    if "univariate" in words:
        _check_univariate(words["univariate"])


def _check_univariate(univariate: Any) -> None:
    if not isinstance(getattr(univariate, "count", None), Integral):
        raise TypeError(
            "univariate: expected a recipe of scalar maps, for instance "
            f"pyroflows.transforms.Affine(), got {univariate!r}"
        )


def _check_activation(activation: Any) -> None:
    """Raise `TypeError` unless it can make a module; for a string the message names the near."""
    if callable(activation) and not isinstance(activation, nn.Module):
        return
    names = {name.lower(): name for name in activations.__all__}
    near = difflib.get_close_matches(str(activation).lower(), names, n=3)
    hint = " or ".join(f"torch.nn.{names[name]}" for name in near)
    raise TypeError(
        "activation: expected a module class without arguments, for instance torch.nn.SiLU, got "
        f"{activation!r}." + (f" Did you mean {hint}?" if near else "")
    )
