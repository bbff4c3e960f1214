"""A flow learned while a chain warms up, from its draws and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.errors import FitError
from pyroflows.flows import Flow, RealNVP
from pyroflows.flows.stack import Mixing
from pyroflows.guides import default_flow
from pyroflows.mcmc.compiled import ValueAndGrad, compiled
from pyroflows.mcmc.target import Target
from pyroflows.numerics import forked_rng
from pyroflows.training.loop import Loop
from pyroflows.transforms import DiagonalAffineTransform
from pyroflows.transforms.base import Transform

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Latest draws of a chain that a fit looks at, and the fewest that it starts with.
WINDOW, FEWEST = 600, 100
#: Share of draws that are held out.
HELD_OUT = 0.15
#: Of each fit; the learning rate of the first one, and of those that go on with its flow.
STEPS, BATCH, FIRST_LR, LR = 300, 128, 1e-2, 3e-3
#: Fisher divergence per dimension below which a flow is left as it is.
GOOD = 0.003


def adaptation_flow(features: int) -> Flow:
    """The flow that is learned where none is given: couplings without dense maps.

    A few hundred draws in a hundred dimensions would overfit matrices.
    """
    if features == 1:
        return default_flow(1)
    couplings = max(4, (features - 1).bit_length())
    mixing: Mixing = "lu" if features <= 16 else None
    return RealNVP(features, transforms=couplings, hidden_features=(32, 32), mixing=mixing)


def pulled_back(
    transform: Transform, u: Tensor, grad: Tensor, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Points, log-determinants and gradients in the space that a transform straightens.

    From :math:`u` and :math:`\nabla \log p(u)`, shape ``(S, D)``, to :math:`z = T^{-1}(u)`,
    :math:`\log|\det J_T(z)|` and :math:`J_T^\top \nabla \log p(u) + \nabla_z \log|\det J_T(z)|`.
    """
    with torch.enable_grad():
        z, _ = transform.inverse_and_ladj(u)
        if not z.requires_grad:
            z.requires_grad_()
        again, ladj = transform.call_and_ladj(z)
        total = (again * grad).sum() + ladj.sum()
        (pulled,) = torch.autograd.grad(total, z, create_graph=create_graph)
    return z, ladj, pulled


def fisher_divergence(transform: Transform, u: Tensor, grad: Tensor) -> Tensor:
    r"""Squared distance of the pulled-back score from that of a standard normal, shape ``(S,)``.

    .. math:: \left\lVert z + J_T^\top \nabla \log p(u)
        + \nabla_z \log\left|\det J_T(z)\right| \right\rVert^2, \qquad z = T^{-1}(u)

    Differentiable in the transform's parameters; one inverse and one forward pass.
    """
    z, _, pulled = pulled_back(transform, u, grad, create_graph=True)
    return (z + pulled).square().sum(-1)


class Learner:
    """The flow of a run: each chain goes on where the last one left it.

    Parameters
    ----------
    target
        The posterior over unconstrained latents.
    flow
        A flow to start with, copied; None for a new one, preceded by a diagonal map.
    probes
        Latents ``(P, D)`` of the guide, to compare recorded functions at.
    seed
        Of the batches.

    Attributes
    ----------
    density
        The log density of latents ``(D,)`` and its gradient, recorded.
    gradients
        How often the chains asked for one.
    """

    def __init__(self, target: Target, flow: Flow | None, probes: Tensor, seed: int) -> None:
        self.target = target
        self.probes = probes
        self.density = target.compile(probes)
        self.trained = flow is not None
        new = adaptation_flow(target.dim) if flow is None else copy.deepcopy(flow)
        self.flow = new.to(probes.device, probes.dtype).requires_grad_(True)
        self.seed = seed
        self.gradients = 0
        self.windows: dict[int, tuple[Tensor, Tensor]] = {}

    def new_adapter(self, seed: int, position: Array, grad: Array, chain: int) -> Adapter:
        """What nutpie asks for at the start of each chain."""
        return Adapter(self, chain, self.tensor(position), self.tensor(grad))

    def learn(self, chain: int, u: Tensor, grad: Tensor) -> None:
        """Look at the latest draws ``(S, D)`` of a chain, and fit where they ask for it."""
        self.windows[chain] = u, grad
        if self.trained:
            divergence = fisher_divergence(self.flow.transform.condition(), u, grad).mean()
            if divergence < GOOD * self.target.dim:
                return
        # With those of the chains before it: the more, the less is overfitted.
        self._fit(*map(torch.cat, zip(*self.windows.values(), strict=True)))

    def tensor(self, values: Array | Sequence[Array]) -> Tensor:
        """Nutpie's numbers as a tensor."""
        return torch.as_tensor(np.asarray(values)).to(self.probes)

    def _fit(self, u: Tensor, grad: Tensor) -> None:
        """Train, and go back where the draws that were held out say so."""
        if not self.trained:
            self.flow.transform.standardization.set_(*diagonal(u, grad))
        old = copy.deepcopy(self.flow.state_dict())
        with forked_rng(self.seed):
            order = torch.randperm(len(u))
            held, kept = order.tensor_split([max(1, int(HELD_OUT * len(u)))])
            better = self._train((u[kept], grad[kept]), (u[held], grad[held]))
        if not better:
            self.flow.load_state_dict(old)
        self.seed += 1
        self.trained = True

    def _loss(self, u: Tensor, grad: Tensor) -> Tensor:
        # Its logarithm, because it falls by orders of magnitude.
        return fisher_divergence(self.flow.transform.condition(), u, grad).mean().log()

    def _train(self, kept: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> bool:
        """Whether the divergence at the draws held out has fallen."""

        def batches() -> Iterator[tuple[Tensor, ...]]:
            while True:
                rows = torch.randint(len(kept[0]), (BATCH,))
                yield tuple(part[rows] for part in kept)

        before = self._loss(*held).item()
        loop = Loop(
            loss=self._loss,
            batches=batches(),
            parameters=list(self.flow.parameters()),
            steps=STEPS,
            lr=LR if self.trained else FIRST_LR,
            clip_norm=10.0,
            check=lambda: self._loss(*held).item(),
            check_every=max(1, STEPS // 12),
            patience=None,
            progress=False,
            title="Fisher divergence",
        )
        try:
            loop.run()
        except FitError:
            return False
        return loop.history.best[1] < before


def diagonal(u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of the diagonal map with the least Fisher divergence."""
    if len(u) < 3:
        scale = grad.abs().mean(0).clamp(1e-5, 1e5).rsqrt()
        return u.mean(0), scale
    spread = (u.var(0) / grad.var(0)).sqrt()
    scale = torch.where(spread.isfinite() & (spread > 0), spread, torch.ones_like(spread)).sqrt()
    return u.mean(0) + scale.square() * grad.mean(0), scale


class Adapter:
    """The map of one chain, by the interface that nutpie calls.

    Positions and gradients are nutpie's arrays ``(D,)``; transformed ones are those in the
    straightened space.
    """

    def __init__(self, learner: Learner, chain: int, u: Tensor, grad: Tensor) -> None:
        self.learner = learner
        self.chain = chain
        self.transformation_id = 0
        if learner.trained:
            self._take_flow()
        else:
            self._take_diagonal(u[None], grad[None])

    # --- the map ------------------------------------------------------------------------------

    def _take_diagonal(self, u: Tensor, grad: Tensor) -> None:
        loc, scale = diagonal(u, grad)
        density, log_det = self.learner.density, scale.log().sum()

        def evaluate(z: Tensor) -> tuple[Tensor, ...]:
            u = loc + scale * z
            value, grad = density(u)
            return value, log_det, u, grad, scale * grad

        self._transform: Transform = DiagonalAffineTransform(loc, scale.log())
        self._evaluate: ValueAndGrad = evaluate

    def _take_flow(self) -> None:
        # A copy: the learner's flow trains on, for other chains.
        transform = copy.deepcopy(self.learner.flow).transform.condition().detach_params()
        target = self.learner.target

        def evaluate(z: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                z = z.detach().unsqueeze(0).requires_grad_()
                u, log_det = transform.call_and_ladj(z)
                values, grads = target.values_and_grads(u)
                (pulled,) = torch.autograd.grad((u * grads).sum() + log_det.sum(), z)
            return values[0], log_det[0].detach(), u[0].detach(), grads[0], pulled[0]

        probes = transform.inverse_and_ladj(self.learner.probes)[0].detach()
        self._transform = transform
        self._evaluate = compiled(evaluate, probes)

    # --- what nutpie calls --------------------------------------------------------------------

    def update(
        self,
        seed: int,
        positions: Sequence[Array],
        gradients: Sequence[Array],
        log_densities: Sequence[float],
    ) -> None:
        """Learn from all draws of the chain so far."""
        self.transformation_id += 1
        learner = self.learner
        if not learner.trained and len(positions) < FEWEST:
            recent = slice(-max(3, len(positions) // 2), None)  # the first are far off
            self._take_diagonal(
                learner.tensor(positions[recent]), learner.tensor(gradients[recent])
            )
            return
        u, grad = learner.tensor(positions[-WINDOW:]), learner.tensor(gradients[-WINDOW:])
        if len(u) < FEWEST:
            return
        learner.learn(self.chain, u, grad)
        self._take_flow()

    def init_from_transformed_position(self, z: Array) -> tuple[Any, ...]:
        """Log density, log-determinant, position, its gradient, the transformed gradient."""
        self.learner.gradients += 1
        value, log_det, *arrays = self._evaluate(self.learner.tensor(z))
        return float(value), float(log_det), *map(_array, arrays)

    def init_from_untransformed_position(self, u: Array) -> tuple[Any, ...]:
        """Log density, log-determinant, its gradient, transformed position and gradient."""
        self.learner.gradients += 1
        value, grad = self.learner.density(self.learner.tensor(u))
        log_det, z, pulled = self.inv_transform(u, _array(grad))
        return float(value), log_det, _array(grad), z, pulled

    def inv_transform(self, u: Array, grad: Array) -> tuple[float, Array, Array]:
        """Log-determinant, transformed position and gradient of a known point."""
        z, log_det, pulled = pulled_back(
            self._transform, self.learner.tensor(u)[None], self.learner.tensor(grad)[None]
        )
        return float(log_det.detach().sum()), _array(z[0]), _array(pulled[0])


def _array(values: Tensor) -> Array:
    array: Array = values.detach().double().cpu().numpy()
    return array
