"""Tables with integers and categories: a density of real vectors, rounded; its mass as a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.distributions.flow_distribution import FlowDistribution
from pyroflows.errors import check_dtype, check_event
from pyroflows.layers import ToSupport
from pyroflows.transforms import inverse_and_ladj


@dataclass(frozen=True)
class Categories:
    """A column of unordered categories ``0, ..., count - 1``.

    Examples
    --------
    >>> Categories(3).support
    IntegerInterval(lower_bound=0, upper_bound=2)
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"Categories: expected at least two, got {self.count}")

    @property
    def support(self) -> Any:
        """The column's values as a constraint."""
        return constraints.integer_interval(0, self.count - 1)


class Quantization(nn.Module):
    r"""From real vectors to rows of a table, and from rows and noise to the vectors behind them.

    An integer is the floor of one coordinate, a category the largest of as many coordinates as
    there are categories, a continuous column is one coordinate. The coordinates stand in this
    order: continuous columns, integers, categories. Behind a value lie all vectors that

    .. math:: v = x + \Phi(n), \qquad v_x = n_x,\; v_i = n_x + \log \Phi(n_i)

    give for integers and categories, where the noise :math:`n` is any real vector. Normal noise is
    uniform within an integer's cell, and exponential in how far other categories stay behind.

    Parameters
    ----------
    columns
        What each column holds: a scalar constraint, discrete for integers, or `Categories`.
    """

    order: Tensor
    restore: Tensor

    def __init__(self, columns: Sequence[Any]) -> None:
        super().__init__()
        kinds = [_kind(column) for column in columns]
        order = sorted(range(len(columns)), key=kinds.__getitem__)
        self.sizes = [kinds.count(kind) for kind in range(3)]
        self.counts = [columns[i].count for i in order if kinds[i] == CATEGORIES]
        if self.sizes[0] == len(columns):
            raise ValueError("columns: expected at least one integer or Categories among them")
        #: Coordinates of a vector, and those of the noise.
        self.width = self.sizes[0] + self.sizes[1] + sum(self.counts)
        self.noise_features = self.width - self.sizes[0]
        self.support = constraints.stack([getattr(c, "support", c) for c in columns], -1)
        numbers = [_behind(columns[i]) for i in order if kinds[i] != CATEGORIES]
        self.to_support = ToSupport([*numbers, *[constraints.real] * sum(self.counts)])
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("restore", torch.tensor(order).argsort())

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Continuous columns, integers, and each category as one-hot rows."""
        continuous, integers, categories = x.index_select(-1, self.order).split(self.sizes, -1)
        one_hot = [
            (column.unsqueeze(-1) == torch.arange(count, device=x.device)).to(x.dtype)
            for column, count in zip(categories.unbind(-1), self.counts, strict=True)
        ]
        return continuous, integers, one_hot

    def quantize(self, w: Tensor) -> Tensor:
        """Vectors ``(*batch, width)`` to rows ``(*batch, columns)``."""
        v = self.to_support()(w)
        continuous, integers, rest = v.split([*self.sizes[:2], sum(self.counts)], -1)
        largest = [part.argmax(-1, keepdim=True).to(v) for part in rest.split(self.counts, -1)]
        return torch.cat([continuous, integers.floor(), *largest], -1).index_select(
            -1, self.restore
        )

    def dequantize(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and noise ``(*batch, noise_features)`` to vectors, and ``log|det|`` of that map.

        The determinant is the one with respect to the continuous columns and the noise.
        """
        continuous, integers, one_hot = self._split(x)
        of_integers, rest = noise.split([self.sizes[1], sum(self.counts)], -1)
        share = torch.special.ndtr(of_integers).clamp_max(1 - torch.finfo(x.dtype).eps)
        parts = [continuous.expand(*noise.shape[:-1], -1), integers + share]
        ladj = _log_normal(of_integers).sum(-1)
        for chosen, n in zip(one_hot, rest.split(self.counts, -1), strict=True):
            top, below = (chosen * n).sum(-1, keepdim=True), torch.special.log_ndtr(n)
            parts.append(torch.where(chosen > 0, n, top + below))
            ladj = ladj + ((1 - chosen) * (_log_normal(n) - below)).sum(-1)
        w, to_real = inverse_and_ladj(self.to_support(), torch.cat(parts, -1))
        return w, ladj + to_real

    def encode(self, x: Tensor) -> Tensor:
        """Rows as real vectors without noise: integers at the centre of their cell, and one-hot."""
        continuous, integers, one_hot = self._split(x)
        v = torch.cat([continuous, integers + 0.5, *one_hot], -1)
        return inverse_and_ladj(self.to_support(), v)[0]


CONTINUOUS, INTEGER, CATEGORIES = range(3)


def _log_normal(n: Tensor) -> Tensor:
    """Logarithm of the derivative of the normal distribution function."""
    return -n.square() / 2 - math.log(2 * math.pi) / 2


def _kind(column: Any) -> int:
    if isinstance(column, Categories):
        return CATEGORIES
    if not isinstance(column, constraints.Constraint) or column.event_dim:
        raise TypeError(f"columns: expected a scalar constraint or Categories, got {column!r}")
    return INTEGER if column.is_discrete else CONTINUOUS


def _behind(column: Any) -> Any:
    """The constraint on the real number whose floor an integer is."""
    if not column.is_discrete:
        return column
    if isinstance(column, type(constraints.boolean)):
        return constraints.interval(0.0, 2.0)
    lower = getattr(column, "lower_bound", None)
    upper = getattr(column, "upper_bound", None)
    if lower is not None and upper is not None:
        return constraints.interval(float(lower), float(upper) + 1)
    if lower is not None:
        return constraints.greater_than_eq(float(lower))
    return constraints.real if upper is None else constraints.less_than(float(upper) + 1)


class DequantizedDistribution(TorchDistribution):
    r"""Distribution of table rows with integers and categories; its log mass is known as a bound.

    .. math::
        \log P(x) = \log \int_{\{v \,:\, Q(v) = x\}} p(v)\, dv
        \;\ge\; \mathbb{E}_{v \sim q(v \mid x)} \left[\log p(v) - \log q(v \mid x)\right]

    Draws are exact: a vector of the density, rounded. Made by `pyroflows.Dequantized`.

    Parameters
    ----------
    density
        Of the real vectors.
    quantization
        From vectors to rows.
    noise
        From rows to the distribution of their noise.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (torch's own declaration)
    has_rsample = False

    def __init__(
        self,
        density: FlowDistribution,
        quantization: Quantization,
        noise: Callable[[Tensor], Any],
    ) -> None:
        self.density = density
        self.quantization = quantization
        self.noise = noise
        columns = len(quantization.restore)
        super().__init__(density.batch_shape, torch.Size([columns]), validate_args=False)

    @property
    def support(self) -> Any:
        """A scalar constraint for each column."""
        return self.quantization.support

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Rows ``(*sample_shape, *batch, columns)``, in the dtype of the flow."""
        with torch.no_grad():
            return self.quantization.quantize(self.density.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Not known: an integral without closed form."""
        raise NotImplementedError(
            "the log probability of a dequantized flow is an integral without closed form. "
            "log_prob_bound(value) is a lower bound, and log_prob_bound(value, draws=100) a "
            "tighter one."
        )

    def log_prob_bound(self, value: Tensor, draws: int = 1) -> Tensor:
        r"""A random lower bound of the log probability, in nats: its mean is below the truth.

        .. math:: \log \frac1K \sum_{k=1}^K \frac{p(v_k)}{q(v_k \mid x)}, \qquad v_k \sim q

        The mean rises with :math:`K` and reaches the truth in the limit. Each draw costs a forward
        pass of the noise and an inverse pass of the density. For continuous columns it is a log
        density, for all others a log mass. Rows outside the support have ``-inf``, NaN gives NaN.

        Parameters
        ----------
        value
            Rows ``(*batch, columns)``, floating or integer.
        draws
            How many draws of noise :math:`K`.

        References
        ----------
        Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
        """
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        check_event("value", value, self.event_shape)
        if not value.is_floating_point():
            value = value.to(self.density.module.dtype)
        check_dtype("value", value, self.density.module.dtype)
        noise, log_q = self.noise(value).rsample_and_log_prob((draws,))
        w, ladj = self.quantization.dequantize(value, noise)
        log_weight = self.density.log_prob(w) + ladj - log_q
        bound = log_weight.logsumexp(0) - math.log(draws)
        columns = zip(self.support.cseq, value.unbind(-1), strict=True)
        wrong = torch.stack([~(c.check(x) | x.isnan()) for c, x in columns], -1).any(-1)
        return bound.masked_fill(wrong & ~value.isnan().any(-1), -math.inf) + 0 * value.sum(-1)

    def expand(
        self, batch_shape: Sequence[int], _instance: DequantizedDistribution | None = None
    ) -> DequantizedDistribution:
        """The same distribution with a larger batch shape."""
        return DequantizedDistribution(
            self.density.expand(batch_shape), self.quantization, self.noise
        )
