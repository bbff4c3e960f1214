"""Modules that remember how they were made, so that a file can describe them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


class RecordedModule(nn.Module):
    """A module whose constructor's arguments stay readable in `arguments`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        new = super().__new__(cls)
        new.__dict__["_recorded"] = (args, kwargs)
        return new

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name, without the defaults that were left alone."""
        args, kwargs = self.__dict__["_recorded"]
        bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        return {name: value for name, value in bound.arguments.items() if name != "self"}
