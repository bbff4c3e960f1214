"""Block autoregressive network: increasing in each feature, free in those before it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyroflows.nn.masked import MaskedLinear
from pyroflows.nn.mlp import widths
from pyroflows.numerics import autoregressive_mask, bounded_exp

#: Slope of the activation far out; the rest of it is a hyperbolic tangent.
LEAK = 0.05
#: Bound of the logarithm of a positive weight.
MAX_LOG_WEIGHT = 5.0
#: Log weights are this multiple of their parameters, which so learn at the speed of the others.
LOG_RATE = 4.0
#: Steepness of the first units at the start: their steps are told apart by their places.
STEEPNESS = 3.0

Scalar = Callable[[Tensor], tuple[Tensor, Tensor]]
#: What the units of a layer receive from outside of their own feature, given the layer before.
Offsets = Callable[[int, Tensor], Tensor]


class BlockLinear(nn.Module):
    r"""Linear layer of units in groups, one for each feature.

    Weights within a group are positive, those from earlier groups free, those from later ones zero.

    Parameters
    ----------
    features
        Number of groups.
    inputs, outputs
        Units of each group, on either side.
    context
        Size of the context (0: none), which is added linearly.
    scale
        Of the positive weights and of the biases at the start.
    """

    def __init__(
        self, features: int, inputs: int, outputs: int, context: int, scale: float = 1.0
    ) -> None:
        super().__init__()
        group = torch.arange(features)
        out_degrees, in_degrees = group.repeat_interleave(outputs), group.repeat_interleave(inputs)
        self.earlier = MaskedLinear(autoregressive_mask(out_degrees, in_degrees + 1))
        self.context = nn.Linear(context, features * outputs, bias=False) if context else None
        nn.init.normal_(self.earlier.bias, std=scale)
        # A mean of the group, with some noise that tells its units apart.
        self.log_blocks = nn.Parameter(0.1 * torch.randn(features, outputs, inputs))
        self.mean_weight = scale / inputs

    def blocks(self) -> Tensor:
        """The positive weights, ``(features, outputs, inputs)``."""
        return bounded_exp(LOG_RATE * self.log_blocks, MAX_LOG_WEIGHT) * self.mean_weight

    def constant(self, context: Tensor | None) -> Tensor:
        """What does not depend on the input, ``(*batch, features * outputs)``."""
        bias = self.earlier.bias
        return bias if self.context is None else bias + self.context(context)


class BlockNetwork(nn.Module):
    r"""Network whose output for a feature increases with it, and depends on those before it.

    .. math::

        y = (1 - a)\, x + a\, f(x), \qquad
        f = W_L \circ \sigma \circ \cdots \circ \sigma \circ W_0, \qquad
        \sigma(h) = 0.05\, h + 0.95 \tanh h

    The weights are block triangular with positive blocks on the diagonal. The activation is onto
    the reals, and so is the output in each feature: a bounded one would cut the tails off. The gate
    :math:`a \in (0, 1)`, one for each feature, starts at a half.

    ``forward`` gives values and logarithms of slopes in one pass. ``unroll`` goes feature by
    feature, and computes each hidden unit once but for those of the feature at hand.

    Parameters
    ----------
    features, context
        Sizes of the input, which is that of the output, and of the context (0: none).
    hidden_features
        Hidden units of each feature, one number for each layer.
    order
        The features in the order of their dependence; by default ``0, 1, ...``.

    References
    ----------
    De Cao, Titov and Aziz, "Block neural autoregressive flow", UAI 2019.

    Examples
    --------
    >>> value, log_slope = BlockNetwork(3, 0)(torch.randn(5, 3)).chunk(2, -1)
    >>> value.shape, log_slope.shape
    (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        context: int,
        hidden_features: Sequence[int] = (16, 16),
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order or range(features)))
        if sorted(self.order.tolist()) != list(range(features)):
            raise ValueError(f"order: expected a permutation of {features} features, got {order}")
        hidden = widths(hidden_features)
        scales = [STEEPNESS if hidden else 1.0, *(1.0 for _ in hidden)]
        layers = [
            BlockLinear(features, *sizes, context, scale)
            for sizes, scale in zip(pairwise((1, *hidden, 1)), scales, strict=True)
        ]
        self.gate = nn.Parameter(torch.zeros(features))
        # Near the identity: no feature is moved by others at first.
        for parameter in layers[-1].earlier.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Input ``(*batch, features)``, output ``(*batch, 2 * features)``: values, log slopes."""
        layers, blocks, constants = self._read(context)

        def offsets(layer: int, inputs: Tensor) -> Tensor:
            weight = layers[layer].earlier.masked_weight()
            received = functional.linear(inputs.flatten(-2), weight) + constants[layer]
            return received.unflatten(-1, (len(self.order), -1))

        columns = x.index_select(-1, self.order)
        restore = self.order.argsort()
        outputs = _evaluate(columns, blocks, offsets, self.gate)
        return torch.cat([output.index_select(-1, restore) for output in outputs], -1)

    def _read(self, context: Tensor | None) -> tuple[list[BlockLinear], list[Tensor], list[Tensor]]:
        layers = [layer for layer in self.layers if isinstance(layer, BlockLinear)]
        return layers, [layer.blocks() for layer in layers], [c.constant(context) for c in layers]

    def unroll(
        self, value: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Generator[Scalar, Tensor, None]]:
        """Start an evaluation feature by feature.

        Parameters
        ----------
        value
            Not read: the batch is that of the values which the generator is sent.
        context
            Shape ``(*batch, context)``.

        Returns
        -------
        tuple
            The features in their order, and a generator that for each of them yields an increasing
            function, from its values to outputs and logarithms of slopes, and is sent its value.
        """
        # The tensors are read here and not in the generator's body, which runs later: by then a
        # functional call may have put the module's own parameters back.
        layers, blocks, constants = self._read(context)
        weights = [layer.earlier.masked_weight() for layer in layers]
        return self.order, self._steps(blocks, weights, constants, self.gate)

    def _steps(
        self, blocks: list[Tensor], weights: list[Tensor], constants: list[Tensor], gate: Tensor
    ) -> Generator[Scalar, Tensor, None]:
        # What the units of each layer were sent by the features so far.
        received = [c.unflatten(-1, (len(gate), -1)) for c in constants]
        for i, share in enumerate(gate):
            own = [block[i] for block in blocks]
            given = [r[..., i, :] for r in received]
            x = yield partial(_evaluate, blocks=own, offsets=_Given(given), gate=share)
            inputs: list[Tensor] = []
            _evaluate(x, own, _Given(given, inputs), share)
            for layer, (units, weight) in enumerate(zip(inputs, weights, strict=True)):
                size = units.shape[-1]
                sent = units @ weight[:, i * size : (i + 1) * size].mT
                received[layer] = received[layer] + sent.unflatten(-1, (len(gate), -1))


class _Given:
    """Offsets that are known; what each layer is sent may be kept."""

    def __init__(self, offsets: list[Tensor], inputs: list[Tensor] | None = None) -> None:
        self.offsets = offsets
        self.inputs = inputs

    def __call__(self, layer: int, inputs: Tensor) -> Tensor:
        if self.inputs is not None:
            self.inputs.append(inputs)
        return self.offsets[layer]


def _evaluate(
    x: Tensor, blocks: Sequence[Tensor], offsets: Offsets, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and logarithms of slopes, of all features ``(*batch, features)`` or of one alone."""
    units = x.unsqueeze(-1)
    slopes = torch.ones_like(units)
    for layer, block in enumerate(blocks):
        if layer:
            tanh = units.tanh()
            slopes = slopes * (LEAK + (1 - LEAK) * (1 - tanh.square()))
            units = LEAK * units + (1 - LEAK) * tanh
        received = offsets(layer, units)
        units = (block * units.unsqueeze(-2)).sum(-1) + received
        slopes = (block * slopes.unsqueeze(-2)).sum(-1)
    share = gate.sigmoid()
    value = (1 - share) * x + share * units.squeeze(-1)
    return value, ((1 - share) + share * slopes.squeeze(-1)).log()
