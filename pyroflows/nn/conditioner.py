"""A network with its context in hand, as transforms expect it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.nn.masked import Unrolled
from pyroflows.nn.swap import swapped
from pyroflows.numerics.precision import reduced_evaluations


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
    reducible
        Whether rounding in the network does no harm; see
        `pyroflows.numerics.precision`. Not where what it gives is iterated, or its derivatives are
        a part of the density.
    """

    def __init__(
        self,
        network: nn.Module,
        count: int,
        context: Tensor | None = None,
        reducible: bool = False,
    ) -> None:
        self.network = network
        self.count = count
        self.context = context
        self.reducible = reducible
        self._held: Sequence[Tensor] | None = None

    def bound(self) -> Conditioner:
        """The same function with the parameters that the network has now, also later on.

        A functional call puts the network's own back when it ends; a backward pass that evaluates
        the network comes after that.
        """
        return self.replaced(self.tensors())

    def detach_params(self, keep_context: bool = False) -> Conditioner:
        """The same function with the network's parameters and the context as constants."""
        detached = self.replaced([tensor.detach() for tensor in self.tensors()])
        if keep_context:
            detached.context = self.context
        return detached

    def tensors(self) -> list[Tensor]:
        """What the function depends on beside its argument: the parameters and the context."""
        parameters = self._parameters()
        return [*parameters, *([] if self.context is None else [self.context])]

    def replaced(self, tensors: Sequence[Tensor]) -> Conditioner:
        """The same function of other tensors than `tensors`, in their order."""
        count = len(self._parameters())
        context = None if self.context is None else tensors[count]
        other = Conditioner(self.network, self.count, context, self.reducible)
        other._held = tensors[:count]
        return other

    def _parameters(self) -> Sequence[Tensor]:
        return list(self.network.parameters()) if self._held is None else self._held

    def _evaluate(self, method: str, x: Tensor) -> Any:
        if self._held is None:
            return getattr(self.network, method)(x, self.context)
        with swapped(self.network, list(self.network.parameters()), self._held):
            return getattr(self.network, method)(x, self.context)

    def __call__(self, x: Tensor) -> Tensor:
        evaluations = reduced_evaluations() if self.reducible else None
        if evaluations is None:
            params = self._evaluate("__call__", x)
        else:
            with torch.autocast(x.device.type, torch.bfloat16):
                params = self._evaluate("__call__", x)
            params = params.to(x.dtype)
            evaluations.append(params)
        return params.unflatten(-1, (self.count, -1)).movedim(-2, 0)

    def unroll(self, value: Tensor) -> tuple[torch.Size, Tensor, Unrolled]:
        """Feature by feature; see `pyroflows.nn.MaskedResidualMLP.unroll`."""
        return self._evaluate("unroll", value)
