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
        self._held: dict[str, Tensor] | None = None

    def bound(self) -> Conditioner:
        """The same function with the parameters that the network has now, also later on.

        A functional call puts the network's own back when it ends; a backward pass that evaluates
        the network comes after that.
        """
        bound = Conditioner(self.network, self.count, self.context)
        bound._held = self._parameters()
        return bound

    def detach_params(self, keep_context: bool = False) -> Conditioner:
        """The same function with the network's parameters and the context as constants."""
        detached = self.bound()
        detached._held = {name: tensor.detach() for name, tensor in self._parameters().items()}
        if self.context is not None and not keep_context:
            detached.context = self.context.detach()
        return detached

    def tensors(self) -> list[Tensor]:
        """What the function depends on beside its argument: the parameters and the context."""
        return [*self._parameters().values(), *([] if self.context is None else [self.context])]

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.network.named_parameters()) if self._held is None else self._held

    def _evaluate(self, method: str, x: Tensor) -> Any:
        if self._held is None:
            return getattr(self.network, method)(x, self.context)
        held = {f"network.{name}": tensor for name, tensor in self._held.items()}
        return functional_call(_Method(self.network, method), held, (x, self.context))

    def __call__(self, x: Tensor) -> Tensor:
        params = self._evaluate("__call__", x)
        return params.unflatten(-1, (self.count, -1)).movedim(-2, 0)

    def unroll(self, value: Tensor) -> tuple[torch.Size, Tensor, Unrolled]:
        """Feature by feature; see `pyroflows.nn.MaskedResidualMLP.unroll`."""
        return self._evaluate("unroll", value)
