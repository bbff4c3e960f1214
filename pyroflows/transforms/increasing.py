"""Elementwise increasing maps whose inverse has no closed form."""

from __future__ import annotations

from torch import Tensor

from pyroflows.numerics import increasing_root
from pyroflows.transforms.base import Transform


class IncreasingTransform(Transform):
    """Elementwise increasing map of the real line onto itself, inverted as a root.

    A subclass implements ``call_and_ladj``; the inverse is found by `increasing_root` to the
    rounding of the dtype, with gradients of the implicit function.

    Raises
    ------
    InversionError
        Where the root is not found to the tolerance.

    Examples
    --------
    >>> class Cubic(IncreasingTransform):
    ...     def call_and_ladj(self, x):
    ...         return x**3 + x, (3 * x**2 + 1).log()
    >>> Cubic().inv(torch.tensor(10.0))
    tensor(2.)
    """

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return increasing_root(self.call_and_ladj, y)
