"""Causal transformer over features, evaluated at once or feature by feature."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyroflows.nn.mlp import Activation
from pyroflows.numerics import soft_clamp

Cache = tuple[Tensor, Tensor]
Block = Callable[[Tensor, "Cache | None"], tuple[Tensor, Cache]]

#: Values enter smoothly bounded, so that one far out does not drown what else its token says.
_BOUND = 10.0


class TransformerBlock(nn.Module):
    """Causal self-attention and a perceptron, each normalised at its input and added.

    Parameters
    ----------
    width
        Size of a token.
    heads
        Number of attention heads; divides the width.
    activation
        Of the perceptron, whose hidden layer is four tokens wide.
    """

    def __init__(self, width: int, heads: int, activation: Activation = nn.SiLU) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.activation = activation()

    def bound(self) -> Block:
        """The block as a function of the parameters that it has now.

        The function takes tokens ``(*batch, n, width)`` and the keys and values of those before
        them; it returns the tokens mapped and the keys and values of all so far.
        """
        norms = [(m.weight, m.bias) for m in (self.attention_norm, self.norm)]
        linears = (self.attention_in, self.attention_out, self.expand, self.contract)
        project, merge, expand, contract = [(m.weight, m.bias) for m in linears]

        def block(h: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
            normal = functional.layer_norm(h, (self.width,), *norms[0])
            parts = functional.linear(normal, *project).unflatten(-1, (3 * self.heads, -1))
            query, key, value = parts.transpose(-2, -3).chunk(3, -3)
            if past is not None:
                key, value = torch.cat([past[0], key], -2), torch.cat([past[1], value], -2)
            mixed = _attention(query, key, value).transpose(-2, -3).flatten(-2)
            h = h + functional.linear(mixed, *merge)
            normal = functional.layer_norm(h, (self.width,), *norms[1])
            hidden = self.activation(functional.linear(normal, *expand))
            return h + functional.linear(hidden, *contract), (key, value)

        return block


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of the last tokens to all up to themselves; twice differentiable."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    future = future.triu(keys - queries + 1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ value


class CausalTransformer(nn.Module):
    r"""Transformer whose outputs for feature ``i`` depend on the features before it alone.

    The first token carries the context, each of the others the value and the identity of a feature:
    the token of one feature gives the outputs of the next. Unlike in a masked perceptron the number
    of parameters does not grow with the square of the features.

    The network is evaluated at once by ``forward`` and feature by feature by ``unroll``, which
    keeps the keys and values of the tokens so far and so costs the arithmetic of one pass.

    Parameters
    ----------
    features, context
        Sizes of the input and of the context (0: none).
    count
        Outputs per feature.
    width, heads
        Size of a token, and the number of attention heads, which divides it.
    blocks
        Number of `TransformerBlock` layers.
    activation
        A module class without arguments.
    order
        The features in the order of their dependence; by default ``0, 1, ...``.

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017; Xiong et al., "On layer normalization
    in the transformer architecture", ICML 2020 (normalised inputs).

    Examples
    --------
    >>> CausalTransformer(3, 0, count=2, width=8, heads=2)(torch.randn(5, 3)).shape
    torch.Size([5, 6])
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        context: int,
        count: int,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        activation: Activation = nn.SiLU,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if min(width, heads, blocks) < 1 or width % heads:
            raise ValueError(
                "expected positive width, heads and blocks, and heads that divide the width; got "
                f"width={width}, heads={heads}, blocks={blocks}"
            )
        self.features, self.count = features, count
        self.register_buffer("order", torch.tensor(order or range(features)))
        if sorted(self.order.tolist()) != list(range(features)):
            raise ValueError(f"order: expected a permutation of {features} features, got {order}")
        self.start = nn.Parameter(0.1 * torch.randn(width))
        self.context = nn.Linear(context, width, bias=False) if context else None
        # One row for each feature but the last in the order, whose value nothing depends on.
        self.scales = nn.Parameter(0.1 * torch.randn(features - 1, width))
        self.shifts = nn.Parameter(0.1 * torch.randn(features - 1, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, activation) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, count)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _first(self, context: Tensor | None) -> Tensor:
        return self.start if self.context is None else self.start + self.context(context)

    def _bound(self) -> list[Block]:
        return [cast("TransformerBlock", block).bound() for block in self.blocks]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Input ``(*batch, features)``, output ``(*batch, count * features)``."""
        first = self._first(context)
        batch = torch.broadcast_shapes(first.shape[:-1], x.shape[:-1])
        given = x.index_select(-1, self.order)[..., :-1, None]
        others = soft_clamp(given, _BOUND) * self.scales + self.shifts
        width = first.shape[-1]
        h = torch.cat(
            [
                first.unsqueeze(-2).expand(*batch, 1, width),
                others.expand(*batch, self.features - 1, width),
            ],
            -2,
        )
        for block in self._bound():
            h, _ = block(h, None)
        out = self.out(self.norm(h))
        return out.index_select(-2, self.order.argsort()).mT.flatten(-2)

    def unroll(
        self, value: Tensor, context: Tensor | None = None
    ) -> tuple[torch.Size, Tensor, Generator[Tensor, Tensor, None]]:
        """Start an evaluation feature by feature; as `MaskedResidualMLP.unroll`."""
        first = self._first(context)
        batch = torch.broadcast_shapes(first.shape[:-1], value.shape[:-1])
        token = first.expand(*batch, first.shape[-1]).reshape(-1, 1, first.shape[-1])
        # The tensors are read here and not in the generator's body, which runs later: by then a
        # functional call may have put the module's own parameters back.
        blocks = self._bound()
        embedding = (self.scales, self.shifts)
        norm, out = [(m.weight, m.bias) for m in (self.norm, self.out)]

        def read(h: Tensor) -> Tensor:
            normal = functional.layer_norm(h[:, 0], h.shape[-1:], *norm)
            return functional.linear(normal, *out).mT

        return batch, self.order, self._steps(token, embedding, blocks, read)

    def _steps(
        self,
        token: Tensor,
        embedding: tuple[Tensor, Tensor],
        blocks: Sequence[Block],
        read: Callable[[Tensor], Tensor],
    ) -> Generator[Tensor, Tensor, None]:
        """One token per feature: each is computed once and leaves its keys and values behind."""
        caches: list[Cache | None] = [None] * len(blocks)
        for scale, shift in zip(*(rows.unbind() for rows in embedding), strict=True):
            h = token
            for i, block in enumerate(blocks):
                h, caches[i] = block(h, caches[i])
            x = yield read(h)
            token = soft_clamp(x, _BOUND)[:, None, None] * scale + shift
        for i, block in enumerate(blocks):
            token, _ = block(token, caches[i])
        yield read(token)
