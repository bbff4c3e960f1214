"""Contractions: networks whose Lipschitz constant is bounded at every parameter value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyroflows.nn.mlp import widths

#: Squarings of the Gram matrix: its root exceeds the norm by a factor of ``n ** (1 / 64)`` at most.
SQUARINGS = 5
#: Lipschitz constant of ``x -> (silu(x), silu(-x))``, rounded up.
PAIR_LIPSCHITZ = 1.1044
#: Scale of the activation's argument: many units of a bounded norm together are small each.
SHARPNESS = 16.0
#: Spectral norm of the weights at the start, of which the bound leaves 0.95.
GAIN = 3.0


class LipschitzMLP(nn.Module):
    r"""Multilayer perceptron whose Lipschitz constant in its input is below a bound.

    .. math::

        h_1 = \bar W_0 x + C c + b_0, \qquad h_{l+1} = \bar W_l\,\sigma(h_l) + b_l

    Each weight is divided by a bound of its spectral norm, see `contracted`, computed in the pass:
    the constant holds for all parameters, smoothly, and there is no power iteration whose state
    could lag behind. The activation is the smooth pair :math:`\sigma(h) =
    (\operatorname{silu}(s h), \operatorname{silu}(-s h)) / (1.1044\, s)` with :math:`s = 16`, which
    is 1-Lipschitz and keeps the length of gradients better than either half; far out it is
    straight. The dependence on the context is not bounded. The output starts at zero.

    Parameters
    ----------
    features, context
        Sizes of the input, which is that of the output, and of the context (0: none).
    hidden_features
        Widths of the hidden layers.
    lipschitz
        The bound.

    References
    ----------
    Perugachi-Diaz, Tomczak and Bhulai, "Invertible DenseNets with concatenated LipSwish", NeurIPS
    2021 (the activation).

    Examples
    --------
    >>> LipschitzMLP(2, 3)(torch.randn(6, 1, 2), torch.randn(5, 3)).shape
    torch.Size([6, 5, 2])
    """

    def __init__(
        self,
        features: int,
        context: int,
        hidden_features: Sequence[int] = (64, 64),
        lipschitz: float = 0.97,
    ) -> None:
        super().__init__()
        hidden = widths(hidden_features)
        inputs = [features, *(2 * width for width in hidden)]
        outputs = [*hidden, features]
        layers = [nn.Linear(*sizes) for sizes in zip(inputs, outputs, strict=True)]
        for layer in layers:
            # All directions pass, and not the few that are longest in a random matrix.
            nn.init.orthogonal_(layer.weight, GAIN)
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.ModuleList(layers)
        self.context = nn.Linear(context, outputs[0], bias=False) if context else None
        self.lipschitz = lipschitz
        if self.context is not None and not hidden:
            nn.init.zeros_(self.context.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Input ``(*batch, features)``, context ``(*batch, context)``; output as the input."""
        share = self.lipschitz ** (1 / len(self.layers))
        for i, layer in enumerate(cast("list[nn.Linear]", list(self.layers))):
            if i:
                x = torch.cat([functional.silu(SHARPNESS * x), functional.silu(-SHARPNESS * x)], -1)
                x = x / (PAIR_LIPSCHITZ * SHARPNESS)
            x = functional.linear(x, contracted(layer.weight, share), layer.bias)
            if not i and self.context is not None:
                x = x + self.context(context)
        return x


def contracted(weight: Tensor, lipschitz: float) -> Tensor:
    r"""The matrix scaled so that its spectral norm is below a bound, whatever its entries.

    .. math::

        \bar W = \frac{L\, W}{\sqrt{\rho}}, \qquad
        \rho = \bigl(\operatorname{tr}(I + W W^\top)^p\bigr)^{1/p} \ge 1 + \|W\|_2^2, \qquad p = 32

    It is smooth, also at zero, and takes six products of matrices of the smaller dimension.

    References
    ----------
    Delattre, Barthélemy, Araujo and Allauzen, "Efficient bound of Lipschitz constant for
    convolutional layers by Gram iteration", ICML 2023.

    Examples
    --------
    >>> contracted(torch.diag(torch.tensor([0.0, 1e3])), 0.9)
    tensor([[0.0000, 0.0000],
            [0.0000, 0.9000]])
    """
    small = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    power = small @ small.mT + torch.ones_like(small[:, 0]).diag()
    rho = trace = power.trace()
    for squaring in range(1, SQUARINGS + 1):
        # Of trace one, so that no power overflows.
        power = power / trace
        power = power @ power
        trace = power.trace()
        rho = rho * trace**0.5**squaring
    return weight * (lipschitz * rho.rsqrt())
