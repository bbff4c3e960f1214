"""Elementwise maps of a vector event."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributions import constraints

from pyroflows.transforms.base import Transform
from pyroflows.transforms.univariate import Univariate


class ElementwiseTransform(Transform):
    r"""Map every feature by its own scalar map, :math:`y_i = u(x_i; \theta_i)`.

    Parameters
    ----------
    univariate
        Recipe of the scalar map.
    params
        Raw parameters ``(count, *batch, features)``, or a conditioner that gives them: it is called
        with a vector of no features, ``(*batch, 0)``, and so depends on its context alone.

    Examples
    --------
    >>> from pyroflows.transforms import Affine
    >>> ElementwiseTransform(Affine(), torch.zeros(2, 3))(torch.ones(3))
    tensor([1., 1., 1.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, univariate: Univariate, params: Tensor | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.univariate = univariate
        self.params = params

    def _scalar(self, value: Tensor) -> Transform:
        params = self.params
        return self.univariate(params if isinstance(params, Tensor) else params(value[..., :0]))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._scalar(x).call_and_ladj(x)
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._scalar(y).inverse_and_ladj(y)
        return x, ladj.sum(-1)
