"""Residual multilayer perceptron with context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from pyroflows.numerics.products import linear

Activation = Callable[[], nn.Module]
#: Fewer numbers than this are read as fast from any layout, and written in fewer operations by row.
FEW = 2**14


def is_residual(hidden: Sequence[int], layer: int) -> bool:
    """Whether hidden layer ``layer`` is added to the one before it: where their widths agree."""
    return layer > 0 and hidden[layer] == hidden[layer - 1]


def widths(hidden_features: Sequence[int]) -> tuple[int, ...]:
    """The hidden widths, checked."""
    hidden = tuple(hidden_features) if isinstance(hidden_features, Iterable) else (None,)
    if any(not isinstance(h, int) or h < 1 for h in hidden):
        raise ValueError(
            "hidden_features: expected positive integers, one per hidden layer, got "
            f"{hidden_features!r}"
        )
    return hidden


class Linear(nn.Linear):
    """Linear layer by `pyroflows.numerics.products.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear_by_output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map whose result lies in memory output by output, not row by row.

    Flows read raw parameters kind by kind, for all rows at once. ``(*batch, inputs)`` to
    ``(*batch, outputs)``.
    """
    # Pyro's tensors with a provenance have a plain tuple for a shape.
    batch = torch.Size(x.shape[:-1])
    if batch.numel() * len(weight) < FEW:
        return linear(x, weight, bias)
    rows = x.reshape(batch.numel(), x.shape[-1])
    out = (linear(weight, rows) + bias.unsqueeze(-1)).mT
    return out.unflatten(0, batch) if batch else out.squeeze(0)


class ZeroStart(nn.Module):
    """A network whose output starts at zero: the flow that reads it starts as the identity.

    A subclass names the linear maps that read its inputs, and those that give its outputs.
    """

    def _first(self) -> list[nn.Module | None]:
        raise NotImplementedError

    def _last(self) -> list[nn.Module | None]:
        raise NotImplementedError

    def _zero_output(self) -> None:
        for parameter in _parameters(self._last()):
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def widen_(self, rows: int) -> None:
        r"""Let hidden units bend as finely as so many rows tell apart, before any training.

        The initial weights of the :math:`d` inputs, which are standardised, grow by
        :math:`n^{1 / (d + 4)}`, the inverse of a kernel estimate's bandwidth. What was trained, or
        is frozen, stays as it is.

        References
        ----------
        Scott, "Multivariate density estimation", Wiley 1992 (the bandwidth).
        """
        first, last = _parameters(self._first()), _parameters(self._last())
        if any(parameter.any() for parameter in last):
            return
        if not all(parameter.requires_grad for parameter in first):
            return
        inputs = sum(weight.shape[1] for weight in first if weight.dim() == 2)
        for parameter in first:
            parameter.mul_(rows ** (1 / (inputs + 4)))


def _parameters(linears: list[nn.Module | None]) -> list[nn.Parameter]:
    return [p for linear in linears if linear is not None for p in linear.parameters()]


class ResidualMLP(ZeroStart):
    r"""Multilayer perceptron whose equal-width hidden layers are residual.

    .. math::

        h_0 = W_0 x + C c + b_0, \qquad
        h_l = [h_{l-1}] + W_l\,\sigma(h_{l-1}) + b_l, \qquad
        \text{out} = W \sigma(h_L) + b

    The output weights start at zero, so that the flow that reads them starts as the identity. The
    default activation is infinitely differentiable, as gradients of densities need.

    Parameters
    ----------
    features, context
        Sizes of the input and of the context; either may be 0.
    out_features
        Size of the output.
    hidden_features
        Widths of the hidden layers.
    activation
        A module class without arguments, for instance ``torch.nn.SiLU``.

    Examples
    --------
    >>> net = ResidualMLP(2, 3, out_features=4)
    >>> net(torch.randn(6, 1, 2), torch.randn(5, 3)).shape
    torch.Size([6, 5, 4])
    """

    def __init__(
        self,
        features: int,
        context: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.hidden_features = hidden = widths(hidden_features)
        self.activation = activation()
        sizes = [*hidden, out_features]
        # A linear map with no inputs is its bias; the context enters by a map of its own, so that
        # one context serves many points without being repeated.
        self.input = Linear(features, sizes[0]) if features else None
        self.context = nn.Linear(context, sizes[0], bias=not features) if context else None
        if not features and not context:
            self.constant = nn.Parameter(torch.zeros(sizes[0]))
        self.layers = nn.ModuleList(Linear(before, after) for before, after in pairwise(sizes))
        self._zero_output()

    def _first(self) -> list[nn.Module | None]:
        return [self.input, self.context]

    def _last(self) -> list[nn.Module | None]:
        return [self.layers[-1]] if len(self.layers) else self._first()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Input ``(*batch, features)``, context ``(*batch, context)``; output ``(*batch, out)``."""
        if self.input is not None:
            h = self.input(x)
            if self.context is not None:
                h = h + self.context(context)
        elif self.context is not None:
            h = self.context(context)
        else:
            h = self.constant
        if h.shape[:-1] != x.shape[:-1]:
            # Without features the batch of x still counts.
            h = h.expand(*torch.broadcast_shapes(h.shape[:-1], x.shape[:-1]), h.shape[-1])
        if not len(self.layers):
            return h
        *layers, last = cast("list[nn.Linear]", list(self.layers))
        for i, layer in enumerate(layers, start=1):
            out = layer(self.activation(h))
            h = h + out if is_residual(self.hidden_features, i) else out
        return linear_by_output(self.activation(h), last.weight, last.bias)
