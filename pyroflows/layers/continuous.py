"""The layer of continuous flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.nn import Conditioner, ResidualMLP
from pyroflows.nn.mlp import Activation
from pyroflows.numerics.ode import Solver, check_solver
from pyroflows.transforms import ContinuousTransform
from pyroflows.transforms.continuous import Noise

#: With more features than this, ``trace="auto"`` estimates the trace.
EXACT_FEATURES = 16


class Velocity:
    """A network as a velocity field ``v(t, x)``, its context in hand.

    Parameters
    ----------
    conditioner
        Of ``(*batch, features + 1)``: the point, then the time.
    """

    def __init__(self, conditioner: Conditioner) -> None:
        self.conditioner = conditioner

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """A time, scalar or one for each point ``(*batch, 1)``, and points to velocities."""
        t = t.expand(*x.shape[:-1], 1)
        return self.conditioner(torch.cat([x, t], -1)).squeeze(0)

    def detach_params(self, keep_context: bool = False) -> Velocity:
        """The same field with the network's parameters and the context as constants."""
        return Velocity(self.conditioner.detach_params(keep_context))

    def tensors(self) -> list[Tensor]:
        """What the field depends on beside time and point."""
        return self.conditioner.tensors()


class ContinuousLayer(Layer):
    r"""Continuous flow: points follow a network's velocity from time 0 to time 1.

    .. math:: \dot x = v(t, x, c)

    Either direction costs as many network passes as the solver takes stages (some 40 to 200), each
    with the vector-Jacobian products of the trace; see `pyroflows.transforms.ContinuousTransform`.
    Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    hidden_features, activation
        Of the `pyroflows.nn.ResidualMLP` velocity. A bounded activation bounds the velocity, so
        that points far out are moved and no more; one that is smooth keeps the solver's steps long.
    trace
        ``"exact"``, ``"hutchinson"`` (an unbiased estimate, at one vector-Jacobian product per
        pass: log-determinants are random), or ``"auto"``: exact up to 16 features.
    noise
        Of the estimate: ``"rademacher"`` or ``"gaussian"``.
    solver, tolerance, steps, adjoint
        See `pyroflows.numerics.integrate` and `pyroflows.transforms.ContinuousTransform`.

    References
    ----------
    Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud, "FFJORD", ICLR 2019.

    Examples
    --------
    >>> ContinuousLayer(2, solver="rk4", steps=4)()(torch.ones(2))
    tensor([1., 1.], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.Tanh,
        trace: Literal["auto", "exact", "hutchinson"] = "auto",
        noise: Noise = "rademacher",
        solver: Solver = "dopri5",
        tolerance: float | None = None,
        steps: int = 20,
        adjoint: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(features, context)
        check_solver(solver, tolerance, steps, adjoint)
        if trace not in ("auto", "exact", "hutchinson"):
            raise ValueError(f"trace: expected 'auto', 'exact' or 'hutchinson', got {trace!r}")
        if trace == "auto":
            trace = "exact" if features <= EXACT_FEATURES else "hutchinson"
        self.trace = trace
        self.noise = noise
        self.solver = solver
        self.tolerance = tolerance
        self.steps = steps
        self.adjoint = adjoint
        self.network = ResidualMLP(features + 1, context, features, hidden_features, activation)

    def velocity(self, context: Tensor | None = None) -> Velocity:
        """The velocity field under this context, in the layer's units."""
        conditioner = Conditioner(self.network, 1, context)
        # The adjoint equation evaluates the network in the backward pass.
        return Velocity(conditioner.bound() if self.adjoint else conditioner)

    def forward(self, context: Tensor | None = None) -> ContinuousTransform:
        return ContinuousTransform(
            self.velocity(context),
            trace=self.trace,
            noise=self.noise,
            solver=self.solver,
            tolerance=self.tolerance,
            steps=self.steps,
            adjoint=self.adjoint,
        )
