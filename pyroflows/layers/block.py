"""Block neural autoregressive layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.layers.planar import OnePass, check_one_pass
from pyroflows.nn import BlockNetwork, Conditioner
from pyroflows.transforms import BlockTransform, InverseTransform, Transform
from pyroflows.transforms.block import IncreasingNetwork


class BlockLayer(Layer):
    r"""Block autoregression: a network that increases in each feature, given those before it.

    One direction costs one network pass. The other goes feature by feature and finds each as a root
    of a scalar function, by some twenty evaluations of the hidden units of that feature alone.
    Starts near the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    one_pass
        The direction that takes one pass: ``"inverse"`` for densities of data, ``"forward"`` for
        guides.
    order
        The features in the order of their dependence; by default ``0, 1, ...``.
    hidden_features
        Hidden units of each feature, one number for each layer, see `pyroflows.nn.BlockNetwork`.

    Raises
    ------
    ValueError
        For sizes that are not positive, another direction, or no permutation.

    References
    ----------
    De Cao, Titov and Aziz, "Block neural autoregressive flow", UAI 2019.

    Examples
    --------
    >>> BlockLayer(3)().inv(torch.zeros(5, 3)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        one_pass: OnePass = "inverse",
        order: Sequence[int] | None = None,
        hidden_features: Sequence[int] = (16, 16),
    ) -> None:
        super().__init__()
        check_sizes(features, context)
        check_one_pass(one_pass)
        self.one_pass = one_pass
        self.network = BlockNetwork(features, context, hidden_features, order)

    def forward(self, context: Tensor | None = None) -> Transform:
        # Unrolled, it yields functions, and not the parameters that other networks yield.
        network = cast("IncreasingNetwork", Conditioner(self.network, 2, context))
        transform = BlockTransform(network)
        return transform if self.one_pass == "forward" else InverseTransform(transform)
