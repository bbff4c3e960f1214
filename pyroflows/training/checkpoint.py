"""A file that keeps the state of a fit, written whole or not at all."""

from __future__ import annotations

import os
from typing import Any

import torch

from pyroflows.training.processes import agreed, world


class Checkpoint:
    """Nested dictionaries of tensors and numbers in one file, without pickled classes.

    Parameters
    ----------
    path
        The file.
    problem
        What the fit is about, as text; a file about something else is refused.
    """

    def __init__(self, path: str | os.PathLike[str], problem: Any) -> None:
        self.path = os.fspath(path)
        self.problem = repr(problem)

    def load(self) -> dict[str, Any] | None:
        """The state that was written last, or None; the first process reads it for all."""
        return agreed(None if world()[0] else self._read())

    def _read(self) -> dict[str, Any] | None:
        if not os.path.exists(self.path):
            return None
        try:
            stored: Any = torch.load(self.path, weights_only=True, map_location="cpu")
            problem = stored["problem"]
        except Exception as error:
            raise ValueError(
                f"checkpoint: {self.path} is not a checkpoint that can be read ({error}). Delete "
                "the file to start anew."
            ) from error
        if problem != self.problem:
            raise ValueError(
                f"checkpoint: {self.path} belongs to another fit: expected {self.problem}, got "
                f"{problem}. Give this fit a file of its own, or delete that one."
            )
        state: dict[str, Any] = stored["state"]
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write a state over the one before; only the first process does."""
        if world()[0]:
            return
        temporary = f"{self.path}.tmp"
        torch.save({"problem": self.problem, "state": state}, temporary)
        os.replace(temporary, self.path)
