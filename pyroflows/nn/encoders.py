"""Encoders: from data of any length to a context of fixed size, for conditional flows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyroflows.errors import check_event
from pyroflows.nn.arguments import RecordedModule
from pyroflows.nn.mlp import Activation, widths


def _perceptron(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def _one_batch(x: Tensor, event_dim: int = 2) -> Tensor:
    """Events with one batch dimension, as torch's layers want them."""
    return x.reshape(x.shape[:-event_dim].numel(), *x.shape[-event_dim:])


def _check_elements(x: Tensor, features: int) -> None:
    check_event("x", x, (x.shape[-2] if x.dim() > 1 else 1, features))


def _check_set(x: Tensor, features: int) -> None:
    _check_elements(x, features)
    if not x.shape[-2]:
        raise ValueError(f"x: expected sets of at least one element, got {tuple(x.shape)}")


def _with_count(pooled: Tensor, x: Tensor) -> Tensor:
    """What was read of sets, and the logarithm of their number of elements."""
    return torch.cat([pooled, torch.full_like(pooled[..., :1], x.shape[-2]).log()], -1)


def _convolutions(
    convolution: type[nn.Conv1d] | type[nn.Conv2d],
    channels: int,
    hidden_features: Sequence[int],
    kernel: int,
    activation: Activation,
) -> nn.Sequential:
    """Convolutions of stride 2 with activations."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd positive width, got {kernel}")
    hidden = widths(hidden_features)
    layers: list[nn.Module] = []
    for before, after in pairwise([channels, *hidden]):
        layers += [convolution(before, after, kernel, 2, kernel // 2), activation()]
    return nn.Sequential(*layers)


class DeepSet(RecordedModule):
    r"""Encoder of sets: the same for every order of the elements.

    .. math:: h = \rho\left(\frac1n \sum_{i=1}^n \phi(x_i),\; \log n\right) + W m,
              \qquad m = \frac1n \sum_{i=1}^n x_i

    The number of elements enters beside the mean of their networks, because a posterior narrows
    with it; it may differ from call to call. Networks alone would bend where few sets were; the
    linear map of the mean element goes on as it does among them.

    Where sets differ in scale by orders of magnitude, no network resolves the small ones. With
    ``standardize`` each is first brought to mean 0 and deviation 1, :math:`x_i \to (x_i - m) / s`;
    its :math:`m` and :math:`\log s` enter :math:`\rho` and :math:`W`.

    Parameters
    ----------
    features
        Size of an element.
    out_features
        Size of the context.
    hidden_features
        Widths of the hidden layers of :math:`\phi` and of :math:`\rho`.
    activation
        A module class without arguments.
    standardize
        Whether each set is standardised by itself.

    References
    ----------
    Zaheer et al., "Deep sets", NeurIPS 2017.

    Examples
    --------
    >>> DeepSet(2, 8)(torch.randn(5, 100, 2)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        hidden = widths(hidden_features)
        self.features = features
        self.standardize = standardize
        moments = 2 * features if standardize else features
        self.element = _perceptron([features, *hidden], activation)
        # Elements as they are show their mean; once more, it would bend far out.
        read = hidden[-1] + 1 + (moments if standardize else 0)
        self.whole = _perceptron([read, *hidden, out_features], activation)
        self.moments = nn.Linear(moments, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Sets ``(*batch, elements, features)`` to contexts ``(*batch, out_features)``."""
        _check_set(x, self.features)
        loc = x.mean(-2, keepdim=True)
        if not self.standardize:
            return self.whole(self._pooled(x)) + self.moments(loc.squeeze(-2))
        variance = (x - loc).square().mean(-2, keepdim=True)
        # A set of equal elements has a logarithm too: that of the least scale told from 0.
        scale = variance.clamp(min=torch.finfo(x.dtype).eps ** 2).sqrt()
        moments = torch.cat([loc, scale.log()], -1).squeeze(-2)
        read = torch.cat([self._pooled((x - loc) / scale), moments], -1)
        return self.whole(read) + self.moments(moments)

    def _pooled(self, x: Tensor) -> Tensor:
        """The mean over the elements' networks, and the logarithm of their number."""
        return _with_count(self.element(x).mean(-2), x)


class AttentionPooling(RecordedModule):
    r"""Encoder of sets by attention: learned queries choose what to read of the elements.

    .. math:: h = \rho\left(A(q_1), \dots, A(q_k),\; \log n\right), \qquad
              A(q) = \sum_i \mathrm{softmax}_i\left(q^\top K \phi(x_i)\right) V \phi(x_i)

    Where few elements matter, a `DeepSet`'s mean dilutes them; a query finds them. The same for
    every order of the elements, whose number may differ from call to call. Costs the elements'
    networks and one product with the queries for each.

    Parameters
    ----------
    features
        Size of an element.
    out_features
        Size of the context.
    hidden_features
        Widths of the hidden layers of :math:`\phi` and of :math:`\rho`; the last is that of the
        attention.
    queries
        Number of queries :math:`k`.
    heads
        Heads of the attention, which divide its width.
    activation
        A module class without arguments.

    References
    ----------
    Lee, Lee, Kim, Kosiorek, Choi and Teh, "Set transformer", ICML 2019.

    Examples
    --------
    >>> AttentionPooling(2, 8)(torch.randn(5, 100, 2)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        hidden_features: Sequence[int] = (64, 64),
        queries: int = 4,
        heads: int = 4,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden = widths(hidden_features)
        if queries < 1 or heads < 1 or hidden[-1] % heads:
            raise ValueError(
                f"queries, heads: expected positive numbers and heads that divide the width "
                f"{hidden[-1]}, got {queries} and {heads}"
            )
        self.features = features
        self.element = _perceptron([features, *hidden], activation)
        self.queries = nn.Parameter(torch.randn(queries, hidden[-1]))
        self.attention = nn.MultiheadAttention(hidden[-1], heads, batch_first=True)
        whole = [queries * hidden[-1] + 1, *hidden, out_features]
        self.whole = _perceptron(whole, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Sets ``(*batch, elements, features)`` to contexts ``(*batch, out_features)``."""
        _check_set(x, self.features)
        elements = self.element(_one_batch(x))
        queries = self.queries.expand(len(elements), *self.queries.shape)
        read, _ = self.attention(queries, elements, elements, need_weights=False)
        out = self.whole(_with_count(read.flatten(1), x))
        return out.reshape(*x.shape[:-2], out.shape[-1])


class GRUEncoder(RecordedModule):
    """Encoder of sequences by a gated recurrent unit: its last state, mapped linearly.

    Parameters
    ----------
    features
        Size of an element of the sequence.
    out_features
        Size of the context.
    state_features
        Size of the state.
    layers
        Number of recurrent layers.

    References
    ----------
    Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.

    Examples
    --------
    >>> GRUEncoder(2, 8)(torch.randn(5, 100, 2)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self, features: int, out_features: int, *, state_features: int = 64, layers: int = 1
    ) -> None:
        super().__init__()
        self.features = features
        self.gru = nn.GRU(features, state_features, layers, batch_first=True)
        self.out = nn.Linear(state_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences ``(*batch, time, features)`` to contexts ``(*batch, out_features)``."""
        _check_elements(x, self.features)
        _, state = self.gru(_one_batch(x))
        return self.out(state[-1]).reshape(*x.shape[:-2], self.out.out_features)


class ConvEncoder(RecordedModule):
    """Encoder of sequences by one-dimensional convolutions, averaged over time.

    Each layer halves the time axis, so that the receptive field doubles.

    Parameters
    ----------
    features
        Size of an element of the sequence.
    out_features
        Size of the context.
    hidden_features
        Channels of the layers.
    kernel
        Odd width of the kernels.
    activation
        A module class without arguments.

    Examples
    --------
    >>> ConvEncoder(2, 8)(torch.randn(5, 100, 2)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        hidden_features: Sequence[int] = (32, 32, 32),
        kernel: int = 5,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.features = features
        self.layers = _convolutions(nn.Conv1d, features, hidden_features, kernel, activation)
        self.out = nn.Linear(hidden_features[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences ``(*batch, time, features)`` to contexts ``(*batch, out_features)``."""
        _check_elements(x, self.features)
        out = self.out(self.layers(_one_batch(x).transpose(-1, -2)).mean(-1))
        return out.reshape(*x.shape[:-2], self.out.out_features)


class ImageEncoder(RecordedModule):
    """Encoder of images by two-dimensional convolutions, averaged over the fields of a grid.

    Each layer halves height and width. What it finds is averaged over each field of a grid of
    fixed size, so that images of any size give a context that still knows where things are.

    Parameters
    ----------
    channels
        Channels of an image. Images without a dimension for them need one, ``x.unsqueeze(-3)``.
    out_features
        Size of the context.
    hidden_features
        Channels of the layers.
    kernel
        Odd width of the kernels.
    grid
        Rows and columns of the grid.
    activation
        A module class without arguments.

    Examples
    --------
    >>> ImageEncoder(3, 8)(torch.randn(5, 3, 32, 32)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        channels: int,
        out_features: int,
        *,
        hidden_features: Sequence[int] = (16, 32),
        kernel: int = 3,
        grid: int = 4,
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        if grid < 1:
            raise ValueError(f"grid: expected at least one field, got {grid}")
        self.channels = channels
        self.layers = _convolutions(nn.Conv2d, channels, hidden_features, kernel, activation)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.out = nn.Linear(hidden_features[-1] * grid**2, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(*batch, channels, height, width)`` to contexts ``(*batch, out_features)``."""
        check_event("x", x, (self.channels, *(x.shape[-2:] if x.dim() > 2 else (1, 1))))
        pooled = self.pool(self.layers(_one_batch(x, 3))).flatten(1)
        return self.out(pooled).reshape(*x.shape[:-3], self.out.out_features)
