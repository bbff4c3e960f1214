"""The contract of a learnable layer."""

from __future__ import annotations

from torch import Tensor

from pyroflows.nn import RecordedModule
from pyroflows.transforms import Transform


class Layer(RecordedModule):
    """A module that builds an invertible transform, given a context.

    A subclass implements ``forward(context) -> Transform``; ``context`` is a tensor of shape
    ``(*batch, context)`` or None, and the transform is made afresh at every call.
    """

    def forward(self, context: Tensor | None = None) -> Transform:
        """The layer's transform under this context."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(context)")

    def initialize_(self, y: Tensor) -> None:
        """Initialise what depends on data; the fit functions call it once, on the data's side.

        Most layers have nothing to initialise.
        """


def check_sizes(features: int, context: int) -> None:
    """Raise `ValueError` unless there is a feature, and no negative context."""
    if features < 1 or context < 0:
        raise ValueError(
            f"expected features >= 1 and context >= 0, got features={features}, context={context}"
        )
