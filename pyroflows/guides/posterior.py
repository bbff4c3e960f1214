"""The posterior of one observation under an amortised guide, as a guide of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyroflows.flows import Flow
from pyroflows.guides.autoflow import AutoFlow

# A name is never used twice: stored parameters of a posterior that is gone are another's.
_numbers = itertools.count()


class AmortizedPosterior(AutoFlow):
    """An `AutoFlow` of the conditioned model, with a copy of an amortised flow at one context.

    All that takes an `AutoFlow` takes it: `pyroflows.psis` weighs its draws by the likelihood,
    `pyroflows.fit_svi` trains it further, `pyroflows.to_arviz` exports it. It is made by
    `AutoAmortizedFlow.posterior`.

    Parameters
    ----------
    model
        The model, conditioned on the observation.
    flow
        The amortised flow; copied.
    context
        The encoded observation, shape ``(context,)``.
    args, kwargs
        The model's arguments.
    without_likelihood
        Observed sites that have no likelihood, as those of a simulator.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Flow,
        context: Tensor,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        without_likelihood: Sequence[str] = (),
    ) -> None:
        name = f"AmortizedPosterior{next(_numbers)}"
        super().__init__(model, copy.deepcopy(flow), name=name)
        self.register_buffer("context", context.detach().clone())
        self.without_likelihood = tuple(without_likelihood)
        self._setup_prototype(*args, **(kwargs or {}))

    def get_context(self, *args: Any, **kwargs: Any) -> Tensor:
        """The encoded observation."""
        return self.get_buffer("context")

    def log_joint(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `AutoFlow.log_joint`; `NotImplementedError` where there is no likelihood."""
        if self.without_likelihood:
            raise NotImplementedError(
                f"site {self.without_likelihood[0]!r} is a simulation without a density: the "
                "posterior cannot be weighed or refined by its likelihood. Use its draws as they "
                "are, and check them with pyroflows.sbc."
            )
        return super().log_joint(latents, *args, **kwargs)
