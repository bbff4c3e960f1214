"""Continuous flows: points carried along a velocity field, by an ODE solver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics import integrate
from pyroflows.numerics.ode import Solver, check_solver
from pyroflows.transforms.base import Transform

Trace = Literal["exact", "hutchinson"]
Noise = Literal["rademacher", "gaussian"]


class ContinuousTransform(Transform):
    r"""Points carried along a velocity field, from time 0 (base) to time 1 (data).

    .. math::

        \dot x = v(t, x), \qquad
        \frac{\mathrm d}{\mathrm dt} \log|\det J| = \operatorname{tr} \frac{\partial v}{\partial x}

    Forward solves from 0 to 1, the inverse from 1 to 0, both to the solver's tolerance. A direction
    costs one evaluation of the velocity for each of the solver's stages (`evaluations` counts
    them) and, for the trace, as many vector-Jacobian products as there are features
    (``"exact"``), or a single one (``"hutchinson"``). The value alone takes no trace.

    Parameters
    ----------
    velocity
        From a scalar time and ``(*batch, features)`` to ``(*batch, features)``.
    trace
        ``"exact"``, or ``"hutchinson"`` for the unbiased estimate :math:`\varepsilon^\top J
        \varepsilon` with noise drawn afresh for every event at every call and held during the
        solve: log-determinants are then random.
    noise
        Of the estimate: ``"rademacher"`` (less variance) or ``"gaussian"``.
    solver, tolerance, steps
        See `pyroflows.numerics.integrate`.
    adjoint
        Whether an adaptive solver integrates the adjoint equation for gradients: memory does not
        grow with the number of steps, but there are no second derivatives. The tensors that it
        reaches beside the points are those of ``velocity.tensors()``.

    References
    ----------
    Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary differential equations", NeurIPS
    2018; Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud, "FFJORD: free-form continuous
    dynamics for scalable reversible generative models", ICLR 2019.

    Examples
    --------
    >>> double = ContinuousTransform(lambda t, x: 0.6931472 * x, solver="rk4")
    >>> double.call_and_ladj(torch.tensor([1.0, 2.0]))
    (tensor([2.0000, 4.0000]), tensor(1.3863))
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        *,
        trace: Trace = "exact",
        noise: Noise = "rademacher",
        solver: Solver = "dopri5",
        tolerance: float | None = None,
        steps: int = 20,
        adjoint: bool = False,
    ) -> None:
        super().__init__()
        check_solver(solver, tolerance, steps, adjoint)
        for name, value, known in (("trace", trace, Trace), ("noise", noise, Noise)):
            if value not in get_args(known):
                raise ValueError(f"{name}: expected one of {get_args(known)}, got {value!r}")
        self.velocity = velocity
        self.trace = trace
        self.noise = noise
        self.solver = solver
        self.tolerance = tolerance
        self.steps = steps
        self.adjoint = adjoint

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._carried(x, 0.0, 1.0)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._carried(y, 1.0, 0.0)

    def _call(self, x: Tensor) -> Tensor:
        return self._solve(self.velocity, self._expanded(x), 0.0, 1.0)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._solve(self.velocity, self._expanded(y), 1.0, 0.0)

    def evaluations(self, value: Tensor, *, inverse: bool = False) -> int:
        """How often a direction evaluates the velocity, for these values.

        Examples
        --------
        >>> transform = ContinuousTransform(lambda t, x: -x, solver="rk4", steps=5)
        >>> transform.evaluations(torch.ones(2))
        21
        """
        counted = copy.copy(self)
        counted.velocity = counter = _Counter(self.velocity)
        with torch.no_grad():
            (counted.inverse_and_ladj if inverse else counted.call_and_ladj)(value)
        return counter.count

    def _carried(self, x: Tensor, start: float, stop: float) -> tuple[Tensor, Tensor]:
        x = self._expanded(x)
        probes = self._probes(x)

        def field(t: Tensor, state: Tensor) -> Tensor:
            velocity, divergence = divergence_of(
                lambda x: self.velocity(t, x), state[..., :-1], probes
            )
            return torch.cat([velocity, divergence.unsqueeze(-1)], -1)

        end = self._solve(field, torch.cat([x, torch.zeros_like(x[..., :1])], -1), start, stop)
        return end[..., :-1], end[..., -1]

    def _expanded(self, x: Tensor) -> Tensor:
        """The points with the batch that the velocity's context may add to theirs."""
        with torch.no_grad():
            shape = self.velocity(torch.zeros_like(x[..., :0].sum()), x).shape
        return x.expand(shape)

    def _probes(self, x: Tensor) -> Sequence[Tensor]:
        """Vectors ``e`` whose sum of ``e J e`` is the trace, or estimates it."""
        if self.trace == "exact":
            return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).unbind()
        noise = torch.randn_like(x)
        return [noise if self.noise == "gaussian" else torch.where(noise > 0, 1.0, -1.0).to(x)]

    def _solve(self, field: Any, y: Tensor, start: float, stop: float) -> Tensor:
        return integrate(
            field,
            y,
            start,
            stop,
            solver=self.solver,
            tolerance=self.tolerance,
            steps=self.steps,
            adjoint_params=_tensors(self.velocity) if self.adjoint else None,
        )


def divergence_of(
    function: Callable[[Tensor], Tensor], x: Tensor, probes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The function's value and the sum of ``e J e`` over the probes ``e``, per event."""
    value: Tensor
    value, pullback = torch.func.vjp(function, x)  # type: ignore[misc]
    parts = [(pullback(probe.expand_as(value))[0] * probe).sum(-1) for probe in probes]
    return value, torch.stack(parts).sum(0)


def _tensors(velocity: Any) -> list[Tensor]:
    """The tensors that gradients of the adjoint equation must reach."""
    return (
        [t for t in velocity.tensors() if t.requires_grad] if hasattr(velocity, "tensors") else []
    )


class _Counter:
    """A velocity that counts how often it is evaluated."""

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.velocity = velocity
        self.count = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        return self.velocity(t, x)
