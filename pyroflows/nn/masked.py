"""Masked autoregressive network, evaluated at once or feature by feature."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from pyroflows.nn.mlp import Activation, ZeroStart, is_residual, widths
from pyroflows.numerics import autoregressive_mask, hidden_degrees
from pyroflows.numerics.concrete import has_values
from pyroflows.numerics.products import linear

Unrolled = Generator[Tensor, Tensor, None]


class MaskedLinear(nn.Linear):
    """Linear layer with some of its connections cut.

    Parameters
    ----------
    mask
        True where a connection stays, shape ``(out_features, in_features)``.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, bias: bool = True) -> None:
        super().__init__(mask.shape[1], mask.shape[0], bias=bias)
        # In the weights' dtype: a product with booleans takes six times as long.
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def masked_weight(self) -> Tensor:
        """The weights that count, ``(out_features, in_features)``."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.masked_weight(), self.bias)


class NearbyLinear(nn.Module):
    """Linear map to the outputs of every feature from some features just before it.

    Outputs that see features from the same one on make a block. A product for each block costs as
    much as there are features in it, where a masked matrix over all would have their square.

    Parameters
    ----------
    order
        The features in the order of their dependence.
    starts
        For each of them the place in this order from which on its outputs see; does not fall.
    count
        Outputs per feature.
    """

    seen: Tensor
    own: Tensor
    mask: Tensor

    def __init__(self, order: Tensor, starts: Tensor, count: int) -> None:
        super().__init__()
        self.starts: list[int] = starts.tolist()
        features = len(order)
        places = torch.arange(features) - starts
        size = int(places.max()) + 1
        first, blocks = starts.unique_consecutive(return_inverse=True)
        # Blocks are filled up with what no output sees.
        ranks = first.unsqueeze(1) + torch.arange(size)
        self.register_buffer("seen", order[ranks.clamp(max=features - 1)].flatten())
        of_kinds = (blocks * count + torch.arange(count).unsqueeze(1)) * size + places
        self.register_buffer("own", of_kinds[:, order.argsort()].flatten())
        self.register_buffer("mask", torch.ones(size, size).tril(-1))
        self.weight = nn.Parameter(torch.zeros(len(first), count, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Input ``(*batch, features)``, output ``(*batch, count * features)``."""
        # Pyro's tensors with a provenance have a plain tuple for a shape.
        batch = torch.Size(x.shape[:-1])
        blocks, _, size, _ = self.weight.shape
        columns = x.reshape(-1, x.shape[-1]).mT.index_select(0, self.seen)
        weight = (self.weight * self.mask).flatten(1, 2)
        out = (weight @ columns.unflatten(0, (blocks, size))).flatten(0, 1)
        return out.index_select(0, self.own).mT.reshape(*batch, len(self.own))

    def rows(self) -> Tensor:
        """Of every output the weights of the features from its start on, ``(outputs, size)``."""
        return (self.weight * self.mask).flatten(0, 2).index_select(0, self.own)

    def matrix(self, rows: Tensor) -> Tensor:
        """`rows` of outputs in the order of dependence as a matrix, features in this order too."""
        features, (outputs, size) = len(self.starts), rows.shape
        starts = torch.tensor(self.starts, device=rows.device).unsqueeze(1)
        columns = starts + torch.arange(size, device=rows.device)
        columns = columns.repeat_interleave(outputs // features, 0)
        wide = rows.new_zeros(outputs, features + size)
        return wide.scatter(1, columns, rows)[:, :features]


class MaskedResidualMLP(ZeroStart):
    r"""Residual MADE: parameters of feature ``i`` depend on the features before it alone.

    Hidden layers of equal width are residual, as in `ResidualMLP`. Hidden units are sorted by
    degree (see `pyroflows.numerics.hidden_degrees`). Where a hidden layer is narrower than the
    features, an output does not see all of those before it by hidden units: direct connections to
    the nearest keep every dependence possible.

    The network is evaluated at once by ``forward`` and feature by feature by ``unroll``, which
    computes each hidden unit once and so costs the arithmetic of one pass.

    Parameters
    ----------
    features, context
        Sizes of the input and of the context (0: none).
    count
        Outputs per feature.
    hidden_features, activation
        As in `ResidualMLP`.
    order
        The features in the order of their dependence; by default ``0, 1, ...``.

    References
    ----------
    Germain, Gregor, Murray and Larochelle, "MADE", ICML 2015; Durkan et al., "Neural spline flows",
    NeurIPS 2019 (residual blocks).

    Examples
    --------
    >>> MaskedResidualMLP(3, 0, count=2)(torch.randn(5, 3)).shape
    torch.Size([5, 6])
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        context: int,
        count: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.features, self.count = features, count
        self.hidden_features = hidden = widths(hidden_features)
        self.activation = activation()
        self.register_buffer("order", torch.tensor(order or range(features)))
        if sorted(self.order.tolist()) != list(range(features)):
            raise ValueError(f"order: expected a permutation of {features} features, got {order}")

        rank = self.order.argsort()
        lowest = 0 if context else 1
        degrees = [hidden_degrees(width, features, lowest) for width in hidden]
        # An output of rank r sees degrees up to r; count outputs per feature, features innermost.
        out = rank.repeat(count)
        seen = [rank + 1, *degrees]
        masks = [autoregressive_mask(a, b) for a, b in zip([*degrees, out], seen, strict=True)]
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks)
        self.context = nn.Linear(context, masks[0].shape[0], bias=False) if context else None
        starts = _reached(degrees, features)
        complete = torch.equal(starts, torch.arange(features))
        self.direct = None if complete else NearbyLinear(self.order, starts, count)
        # Where the units of each degree start, layer by layer: unroll takes them in turn.
        bounds = torch.arange(features + 1)
        self._units = [torch.searchsorted(d, bounds).tolist() for d in degrees]
        self._zero_output()

    def _first(self) -> list[nn.Module | None]:
        return [self.layers[0], self.context]

    def _last(self) -> list[nn.Module | None]:
        return [self.layers[-1], self.direct, None if self.hidden_features else self.context]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Input ``(*batch, features)``, output ``(*batch, count * features)``."""
        first, *layers = cast("list[MaskedLinear]", list(self.layers))
        h = first(x)
        if self.context is not None:
            h = h + self.context(context)
        if not layers:
            return h
        *layers, last = layers
        for i, layer in enumerate(layers, start=1):
            out = layer(self.activation(h))
            h = h + out if self._is_residual(i) else out
        out = last(self.activation(h))
        return out if self.direct is None else out + self.direct(x)

    def _is_residual(self, layer: int) -> bool:
        return layer < len(self.hidden_features) and is_residual(self.hidden_features, layer)

    def unroll(
        self, value: Tensor, context: Tensor | None = None
    ) -> tuple[torch.Size, Tensor, Unrolled]:
        """Start an evaluation feature by feature.

        Parameters
        ----------
        value
            Gives the batch shape, ``(*batch, features)``.
        context
            Shape ``(*batch, context)``.

        Returns
        -------
        tuple
            The broadcast batch shape, the features in their order, and a generator that for each of
            them yields its outputs, ``(count, N)`` for the flattened batch, and is sent its values,
            ``(N,)``.
        """
        # The tensors are read here and not in the generator's body, which runs later: by then a
        # functional call may have put the module's own parameters back.
        layers = cast("list[MaskedLinear]", list(self.layers))
        start = layers[0].bias
        if self.context is not None:
            start = start + self.context(context)
        biases: list[Tensor] = [start, *(layer.bias for layer in layers[1:])]
        biases[-1] = self._in_order(biases[-1])
        weights = [layer.masked_weight() for layer in layers]
        weights[0] = weights[0].index_select(1, self.order)
        weights[-1] = self._in_order(weights[-1].mT).mT.contiguous()
        near = None if self.direct is None else self._in_order(self.direct.rows().mT).mT
        # All that is pending has the batch of value and context, also where vmap hides it.
        batch = torch.zeros_like(start[..., :1]) + torch.zeros_like(value[..., :1])
        if torch.is_grad_enabled() or not has_values(batch):
            pending = [(bias + batch).reshape(-1, bias.shape[-1]) for bias in biases]
            steps = self._push(pending, weights, near)
        else:
            rows = [
                (bias if bias.dim() == 1 else bias + batch).reshape(-1, bias.shape[-1]).mT
                for bias in biases
            ]
            steps = self._pull(batch.numel(), rows, weights, near)
        return batch.shape[:-1], self.order, steps

    def _in_order(self, outputs: Tensor) -> Tensor:
        """Outputs in blocks, one a feature, in the order of dependence: ``(..., outputs)``."""
        blocks = outputs.unflatten(-1, (self.count, self.features)).index_select(-1, self.order)
        return blocks.transpose(-1, -2).flatten(-2)

    def _push(self, pending: list[Tensor], weights: list[Tensor], near: Tensor | None) -> Unrolled:
        """One step per feature: the units that have all they see send their activation onward.

        ``pending[l]``, ``(N, units)``, is what the units of layer ``l`` have received so far, those
        that still wait alone; ``weights[l]``, ``(units, seen)``, leads into that layer. Nothing is
        overwritten, as gradients need.
        """
        out = len(self.hidden_features)
        direct = None
        if self.direct is not None and near is not None:
            direct = self.direct.matrix(near)

        def push(source: Tensor, weight: Tensor, layer: int) -> None:
            waiting = pending[layer]
            weight = weight[weight.shape[0] - waiting.shape[1] :]
            pending[layer] = waiting.addmm(source, weight.mT)

        for rank in range(self.features):
            known: Tensor | None = None
            for layer, units in enumerate(self._units):
                start, stop = units[rank : rank + 2]
                if start == stop:
                    known = None
                    continue
                new, pending[layer] = _split(pending[layer], stop - start)
                known = new if known is None or not self._is_residual(layer) else new + known
                push(self.activation(known), weights[layer + 1][:, start:stop], layer + 1)
            outputs, pending[out] = _split(pending[out], self.count)
            x = (yield outputs.mT).unsqueeze(1)
            push(x, weights[0][:, rank : rank + 1], 0)
            if direct is not None:
                push(x, direct[:, rank : rank + 1], out)

    def _pull(
        self, batch: int, biases: list[Tensor], weights: list[Tensor], near: Tensor | None
    ) -> Unrolled:
        """As `_push` without gradients: each unit gathers what it sees, once all of that is known.

        Every number is written once, where adding to all that waits would read and write it at
        every step. ``biases[l]`` has the shape ``(units, 1)`` or ``(units, N)``.
        """
        sizes = [[b - a for a, b in pairwise(units)] for units in self._units]
        sizes.append([self.count] * self.features)
        bias, weight = (
            [part.split(size) for part, size in zip(parts, sizes, strict=True)]
            for parts in (biases, weights)
        )
        around = None if near is None else near.split(self.count)
        values = weights[0].new_empty(self.features, batch)
        known = [values.new_empty(sum(size), batch) for size in sizes[:-1]]
        places = [part.split(size) for part, size in zip(known, sizes[:-1], strict=True)]
        residual = [self._is_residual(layer) for layer in range(len(known))]

        def pull(layer: int, rank: int, source: Tensor, seen: int) -> Tensor:
            if not seen:
                return bias[layer][rank].expand(-1, batch)
            seen_by = weight[layer][rank].narrow(1, 0, seen)
            return torch.addmm(bias[layer][rank], seen_by, source.narrow(0, 0, seen))

        for rank, place in enumerate(values.unbind()):
            source, seen, before = values, rank, None
            for layer, units in enumerate(self._units):
                new = None
                if sizes[layer][rank]:
                    new = pull(layer, rank, source, seen)
                    if before is not None and residual[layer]:
                        new = new + before
                    places[layer][rank].copy_(self.activation(new))
                source, seen, before = known[layer], units[rank + 1], new
            outputs = pull(len(known), rank, source, seen)
            if self.direct is not None and around is not None:
                start = self.direct.starts[rank]
                outputs = outputs.addmm(around[rank][:, : rank - start], values[start:rank])
            place.copy_((yield outputs))


def _reached(degrees: list[Tensor], features: int) -> Tensor:
    """How many leading features every output sees by chains of hidden units.

    ``degrees`` are those of the hidden layers, each sorted.
    """
    reached = torch.arange(features)
    for layer in reversed(degrees):
        # The highest degree that is seen from there; none is as one that sees no feature.
        units = torch.searchsorted(layer, reached, right=True)
        reached = torch.cat([layer.new_zeros(1), layer])[units]
    return reached


def _split(tensor: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return tensor[:, :columns], tensor[:, columns:]
