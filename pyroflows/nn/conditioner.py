"""A network with its context in hand, as transforms expect it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyroflows.nn.masked import Unrolled


class _Method(nn.Module):
    """Calls any method of a network, so that ``functional_call`` reaches it."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        self.name = name

    def forward(self, *args: Any) -> Any:
        return getattr(self.network, self.name)(*args)


class Conditioner:
    """From conditioning features to raw parameters, ``(count, *batch, features)``.

    Parameters
    ----------
    network
        A module ``(x, context) -> (*batch, count * features)``, parameters slowest.
    count
        Raw parameters per feature.
    context
        The context, or None.
    """

    def __init__(self, network: nn.Module, count: int, context: Tensor | None = None) -> None:
        self.network = network
        self.count = count
        self.context = context
        self.is_constant = False

    def detach_params(self, keep_context: bool = False) -> Conditioner:
        """The same function with the network's parameters and the context as constants."""
        context = self.context
        if context is not None and not keep_context:
            context = context.detach()
        detached = Conditioner(self.network, self.count, context)
        detached.is_constant = True
        return detached

    def _evaluate(self, method: str, x: Tensor) -> Any:
        if not self.is_constant:
            return getattr(self.network, method)(x, self.context)
        constants = {
            f"network.{name}": parameter.detach()
            for name, parameter in self.network.named_parameters()
        }
        return functional_call(_Method(self.network, method), constants, (x, self.context))

    def __call__(self, x: Tensor) -> Tensor:
        params = self._evaluate("__call__", x)
        return params.unflatten(-1, (self.count, -1)).movedim(-2, 0)

    def unroll(self, value: Tensor) -> tuple[torch.Size, Tensor, Unrolled]:
        """Feature by feature; see `pyroflows.nn.MaskedResidualMLP.unroll`."""
        return self._evaluate("unroll", value)
