"""The posterior in the space that a guide's flow straightened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.flows.transform import is_real
from pyroflows.guides import AutoFlow
from pyroflows.mcmc.compiled import ValueAndGrad, compiled
from pyroflows.transforms import ComposedTransform

#: Draws that are evaluated at once, so that memory does not grow with their number.
CHUNK = 2_000
#: How often draws of the guide are replaced that cannot start a chain.
ROUNDS = 20


class Target:
    r"""The posterior density over the base space of a guide's flow, parameters held constant.

    .. math:: \log\pi(z) = \log p(x, T(z)) + \log\left|\det \partial T / \partial z\right|

    A value costs one forward pass of the flow and one evaluation of the model.

    Parameters
    ----------
    guide
        The guide; its flow is :math:`T`.
    args, kwargs
        The model's arguments.
    precondition
        Whether to use the flow; without, :math:`T` is the identity and z the unconstrained latents.

    Attributes
    ----------
    base
        The flow's base distribution, from which z of a perfect guide would come.
    dim
        Number of latent dimensions.
    """

    def __init__(
        self,
        guide: AutoFlow,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        precondition: bool = True,
    ) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs
        posterior = guide.get_posterior(*args, **kwargs).detach_params()
        self.posterior = posterior
        self.base: Any = posterior.base_dist
        self.dim = int(posterior.event_shape[0])
        self.precondition = precondition
        self._transform = ComposedTransform(posterior.transforms)
        if precondition and not is_real(self.base.support):
            raise ValueError(
                f"guide: expected a flow whose base covers the whole space, got a base on "
                f"{self.base.support}. Use a guide with a normal base, or precondition=False."
            )

    def plain(self) -> Target:
        """The same posterior over the unconstrained latents."""
        return Target(self.guide, self.args, self.kwargs, precondition=False)

    # --- densities ----------------------------------------------------------------------------

    def _straight(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not self.precondition:
            return z, z.new_zeros(z.shape[:-1])
        return self._transform.call_and_ladj(z)

    def log_density(self, z: Tensor) -> Tensor:
        """The log density of ``(S, D)`` points, ``(S,)`` in nats; NaN where it is undefined."""
        latents, ladj = self._straight(z)
        with pyro.validation_enabled(False):
            return self.guide.log_joint(latents, *self.args, **self.kwargs) + ladj

    def values_and_grads(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``(S,)`` and their gradients ``(S, D)`` at ``(S, D)`` points."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            # The zero keeps a graph where the model is undefined and scores a mere NaN.
            values = self.log_density(z) + 0 * z.sum(-1)
            (grads,) = torch.autograd.grad(values.sum(), z)
        return values.detach(), grads

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density of one point ``(D,)`` and its gradient."""
        values, grads = self.values_and_grads(z.unsqueeze(0))
        return values[0], grads[0]

    def compile(self, starts: Tensor) -> ValueAndGrad:
        """`value_and_grad` without its Python, where that can be; see `compiled`."""
        # Where chains start, and farther out than they will go.
        probes = torch.cat([starts[:4], 2 * starts[:4], starts[:1].roll(1, -1)])
        return compiled(self.value_and_grad, probes)

    @torch.no_grad()
    def latents(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained latents ``(S, D)`` and log p(x, latents) ``(S,)`` of points ``(S, D)``."""
        latents = [self._straight(part)[0] for part in z.split(CHUNK)]
        scores = [self.guide.log_joint(part, *self.args, **self.kwargs) for part in latents]
        return torch.cat(latents), torch.cat(scores)

    # --- starting points ----------------------------------------------------------------------

    def starts(self, count: int) -> Tensor:
        """Draws ``(count, D)`` of the guide at which density and gradient are finite.

        Raises
        ------
        ValueError
            If there are too few, naming the sites at fault, or if the density is random.
        """
        points, values = self._usable_draws(count)
        for _ in range(ROUNDS):
            if len(points) < count:
                more = self._usable_draws(count)
                points, values = torch.cat([points, more[0]]), torch.cat([values, more[1]])
        points, values = points[:count], values[:count]
        if len(points) < count:
            raise ValueError(
                f"the chains cannot start: of {(ROUNDS + 1) * count} draws of the guide, "
                f"{len(points)} have a finite log density and gradient{self._blame()}. Check the "
                "model and its data, fit the guide first, or start elsewhere (AutoFlow's "
                "init_loc_fn)."
            )
        with torch.no_grad():
            again = self.log_density(points)
        if not torch.allclose(again, values, rtol=1e-5, atol=1e-3):
            raise ValueError(
                "the model scores the same draw differently each time (subsampled data, or sites "
                "that it draws itself), so that no chain can be exact. Use all data, and leave "
                "enumerated sites to AutoFlow, unblocked."
            )
        return points

    def _draws(self, count: int) -> Tensor:
        with torch.no_grad():
            z: Tensor = self.base.sample((count,))
            return z if self.precondition else self._transform(z)

    def _usable_draws(self, count: int) -> tuple[Tensor, Tensor]:
        z = self._draws(count)
        values, grads = self.values_and_grads(z)
        usable = values.isfinite() & grads.isfinite().all(-1)
        return z[usable], values[usable]

    def _blame(self) -> str:
        """Which sites are not finite at some draw of the guide, in words."""
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
            for z in self._draws(ROUNDS).split(1):
                values = self.guide.unpack(self._straight(z)[0])
                draw = {name: value[0] for name, value in values.items()}
                model = poutine.condition(self.guide.original_model, data=draw)
                trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
                trace.compute_log_prob()
                sites = [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample"]
                names = [name for name, site in sites if not site["log_prob"].isfinite().all()]
                if names:
                    return f"; not finite is that of {names}"
        return ""
