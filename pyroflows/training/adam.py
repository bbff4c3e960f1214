"""Adam by torch's own update, at a rate that the caller sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Adam:
    """The update of `torch.optim.Adam`, without what surrounds it.

    The first optimizer of a process imports torch's compiler, a second of its time, as much as many
    a fit takes.

    Parameters
    ----------
    parameters
        What is trained; those without a gradient stay as they are.

    References
    ----------
    Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        # Small flows have many small tensors: one fused update is several times cheaper.
        self.fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float, unless: Tensor) -> None:
        """Move the parameters by their gradients, unless a scalar says not to.

        Where that is on a device, it stays there: nothing waits for it.
        """
        if not self.fused and unless:
            return
        moved = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        update: Any = adam  # its annotations lose the order of its arguments
        update(
            [self.parameters[i] for i in moved],
            [self.parameters[i].grad for i in moved],
            [self.means[i] for i in moved],
            [self.squares[i] for i in moved],
            [],
            [self.steps[i] for i in moved],
            fused=self.fused,
            # What a gradient scaler says, too: the fused update then leaves everything as it is.
            found_inf=unless.float() if self.fused else None,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, list[Tensor]]:
        """All that the next update depends on, besides parameters and gradients."""
        return {"steps": self.steps, "means": self.means, "squares": self.squares}

    @torch.no_grad()
    def restore(self, state: dict[str, list[Tensor]]) -> None:
        """Go back to a state."""
        for name, mine in self.state().items():
            for tensor, stored in zip(mine, state[name], strict=True):
                tensor.copy_(stored)
