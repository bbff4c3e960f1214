"""From unconstrained values to a support, with log-determinants that keep their digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as torch_transforms
from torch.nn.functional import logsigmoid

from pyroflows.transforms.base import Transform, call_and_ladj, constant, inverse_and_ladj

#: The constraints of torch that are an interval, with the names of its bounds.
INTERVALS: dict[type, tuple[str, ...]] = {
    constraints.greater_than: ("lower_bound",),
    constraints.greater_than_eq: ("lower_bound",),
    constraints.less_than: ("upper_bound",),
    constraints.interval: ("lower_bound", "upper_bound"),
    constraints.half_open_interval: ("lower_bound", "upper_bound"),
}


class IntervalTransform(Transform):
    r"""The real line onto an interval, elementwise and increasing.

    .. math:: a + e^x, \qquad b - e^{-x}, \qquad a + (b - a)\,\sigma(x)

    Values are kept finite and off the ends by one unit in the last place, so that every draw can be
    scored.
    Log-determinants are computed from the distances to both ends and do not saturate. A value
    outside the interval has ``log|det| = -inf`` and so the density zero; NaN stays NaN.

    Parameters
    ----------
    support
        One of torch's scalar constraints ``greater_than``, ``greater_than_eq``, ``less_than``,
        ``interval`` and ``half_open_interval`` with numbers as bounds; ``positive``,
        ``nonnegative`` and ``unit_interval`` are such. Where an end belongs to the support, it is
        scored as the nearest number inside.

    Examples
    --------
    >>> IntervalTransform(constraints.unit_interval).call_and_ladj(torch.tensor(-50.0))
    (tensor(1.9287e-22), tensor(-50.))
    """

    def __init__(self, support: Any) -> None:
        super().__init__()
        if type(support) not in INTERVALS:
            raise ValueError(f"support: expected an interval of numbers, got {support}")
        self.codomain = support
        lower: Any = getattr(support, "lower_bound", None)
        upper: Any = getattr(support, "upper_bound", None)
        if None not in (lower, upper) and not lower < upper:
            raise ValueError(f"support: expected lower < upper, got {support}")
        self.lower = lower
        self.upper = upper

    def _kept_inside(self, y: Tensor) -> Tensor:
        finfo = torch.finfo(y.dtype)
        low, high = (
            -sign * finfo.max if end is None else end + sign * max(abs(end) * finfo.eps, finfo.tiny)
            for end, sign in ((self.lower, +1), (self.upper, -1))
        )
        return y.clamp(low, high)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.upper is None:
            y, ladj = self.lower + x.exp(), x
        elif self.lower is None:
            y, ladj = self.upper - (-x).exp(), -x
        else:
            width = self.upper - self.lower
            # Measured from the nearer end, where the digits are.
            distance = width * (-x.abs()).sigmoid()
            y = torch.where(x < 0, self.lower + distance, self.upper - distance)
            ladj = logsigmoid(x) + logsigmoid(-x) + math.log(width)
        return self._kept_inside(y), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = self.codomain.check(y) | y.isnan()
        y = self._kept_inside(y)
        if self.upper is None:
            x = (y - self.lower).log()
            ladj = -x
        elif self.lower is None:
            x = -(self.upper - y).log()
            ladj = x
        else:
            from_lower, from_upper = (y - self.lower).log(), (self.upper - y).log()
            x = from_lower - from_upper
            ladj = math.log(self.upper - self.lower) - from_lower - from_upper
        return x, ladj.masked_fill(~inside, -math.inf)


class StickBreakingTransform(Transform):
    r"""Vectors of ``n - 1`` real numbers onto the simplex of ``n`` shares.

    .. math::
        y_k = \sigma(x_k - \log(n - k)) \prod_{j<k} \left(1 - \sigma(x_j - \log(n - j))\right)

    Zero gives equal shares. All is computed in logarithms: ``log|det dy/dx|``, where the last share
    is one minus the others, is the sum of the log shares. Shares are kept positive; negative ones
    have the density zero. That the shares of a value sum to one is not checked.

    References
    ----------
    Carpenter et al., "Stan: a probabilistic programming language", Journal of Statistical Software
    2017.

    Examples
    --------
    >>> StickBreakingTransform()(torch.zeros(3))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    domain = constraints.real_vector
    codomain = constraints.simplex

    @staticmethod
    def _log_offset(x: Tensor) -> Tensor:
        return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x - self._log_offset(x)
        none = torch.zeros_like(x[..., :1])
        taken = torch.cat([logsigmoid(x), none], -1)
        left = torch.cat([none, logsigmoid(-x).cumsum(-1)], -1)
        log_y = taken + left
        return log_y.exp().clamp_min(torch.finfo(x.dtype).tiny), log_y.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = ((y >= 0) | y.isnan()).all(-1)
        y = y.clamp_min(torch.finfo(y.dtype).tiny)
        log_y = y.log()
        left = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        x = log_y[..., :-1] - left.log()
        return x + self._log_offset(x), (-log_y.sum(-1)).masked_fill(~inside, -math.inf)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))


class ColumnsTransform(Transform):
    """Groups of columns, each group through an elementwise map of its own.

    Parameters
    ----------
    parts
        Elementwise transforms.
    sizes
        How many columns each of them maps.
    order
        The columns, those of the first part first: indices of shape ``(features,)``.
    restore
        The inverse permutation of ``order``.
    codomain
        The constraint on a whole row.
    """

    domain = constraints.real_vector

    def __init__(
        self,
        parts: Sequence[torch_transforms.Transform],
        sizes: Sequence[int],
        order: Tensor,
        restore: Tensor,
        codomain: Any = constraints.real_vector,
    ) -> None:
        super().__init__()
        self.parts = list(parts)
        self.sizes = list(sizes)
        self.order = order
        self.restore = restore
        self.codomain = codomain

    def _map(self, function: Callable[..., tuple[Tensor, Tensor]], value: Tensor) -> Any:
        columns = value.index_select(-1, self.order).split(self.sizes, -1)
        pairs = [function(part, c) for part, c in zip(self.parts, columns, strict=True)]
        values, ladjs = zip(*pairs, strict=True)
        mapped = torch.cat(values, -1).index_select(-1, self.restore)
        return mapped, torch.cat(ladjs, -1).sum(-1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mapped: tuple[Tensor, Tensor] = self._map(call_and_ladj, x)
        return mapped

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mapped: tuple[Tensor, Tensor] = self._map(inverse_and_ladj, y)
        return mapped

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        if shape[-1] != len(self.order):
            raise ValueError(f"expected {len(self.order)} columns, got {shape[-1]}")
        return torch.Size(shape)

    inverse_shape = forward_shape

    def detach_params(self, keep_context: bool = False) -> ColumnsTransform:
        parts = [constant(part, keep_context) for part in self.parts]
        return ColumnsTransform(parts, self.sizes, self.order, self.restore, self.codomain)


def to_support(support: Any) -> torch_transforms.Transform:
    """The map from unconstrained values to a support: ours where we have one, or ``biject_to``.

    Parameters
    ----------
    support
        A torch or Pyro constraint.

    Raises
    ------
    ValueError
        If there is no smooth bijection to it from all real values.

    Examples
    --------
    >>> to_support(constraints.positive)(torch.zeros(2))
    tensor([1., 1.])
    """
    if type(support) in INTERVALS:
        return IntervalTransform(support)
    if isinstance(support, type(constraints.simplex)):
        return StickBreakingTransform()
    try:
        transform: torch_transforms.Transform = biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"support: expected a constraint that torch.distributions.biject_to knows, got "
            f"{support}. Discrete data need pyroflows.Dequantized."
        ) from error
    if not transform.bijective:
        raise ValueError(f"support: there is no bijection from real vectors to {support}")
    return transform
