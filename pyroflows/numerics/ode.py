"""Initial value problems: a fixed grid of our own, adaptive steps by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyroflows.errors import IntegrationError
from pyroflows.numerics.concrete import has_values

Field = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["dopri5", "dopri8", "rk4"]

#: Error allowed to one step of an adaptive solver, where the user names none.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-8}
#: Steps after which an adaptive solver gives up.
MAX_STEPS = 10_000
_FIRST_STEP = 0.05


def integrate(
    field: Field,
    y: Tensor,
    start: float,
    stop: float,
    *,
    solver: Solver = "dopri5",
    tolerance: float | None = None,
    steps: int = 20,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""The end of the path :math:`\dot y = f(t, y)` that begins at ``y``.

    The error of an adaptive step is measured for each row by itself, in the root mean square over
    its entries, and the worst row decides: the tolerance holds for every row, however many there
    are, though a row's result varies with its company within it. A row that is not finite, or whose
    velocity is not, comes out as NaN and does not disturb the others.

    Where values cannot be looked at (``torch.func`` transforms, compiling, the meta device), and
    for an empty batch, an adaptive solver gives way to ``steps`` steps of ``"rk4"``.

    Parameters
    ----------
    field
        The velocity :math:`f`, from a scalar time and ``(*batch, n)`` to ``(*batch, n)``.
    y
        Shape ``(*batch, n)``.
    start, stop
        Times, in either order.
    solver
        ``"dopri5"`` or ``"dopri8"``: adaptive Runge-Kutta methods of order 5 and 8, which need the
        ``ode`` extra. ``"rk4"``: the classical method on a fixed grid.
    tolerance
        Absolute and relative error of an adaptive step; by default 1e-5 in float32 and 1e-8 in
        float64. What the dtype cannot resolve is not asked for.
    steps
        Of the fixed grid; four evaluations each.
    adjoint_params
        By default gradients go back through the steps taken. Given a sequence of tensors that the
        field depends on, adaptive solvers integrate the adjoint equation backwards instead: first
        derivatives only, in memory that does not grow with the number of steps.

    Raises
    ------
    IntegrationError
        Where the tolerance is not met within 10,000 steps or before the step vanishes.
    ImportError
        Where torchdiffeq is needed and not installed.

    References
    ----------
    Dormand and Prince, "A family of embedded Runge-Kutta formulae", Journal of Computational and
    Applied Mathematics 1980; Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary
    differential equations", NeurIPS 2018 (adjoint).

    Examples
    --------
    >>> y = integrate(lambda t, y: -y, torch.ones(1), 0.0, 1.0, solver="rk4")
    >>> y.allclose(torch.tensor(-1.0).exp())
    True
    """
    check_solver(solver, tolerance, steps, adjoint_params is not None)
    if solver == "rk4" or not y.numel() or not has_values(y):
        return _fixed_grid(field, y, start, stop, steps)
    tolerance = TOLERANCES.get(y.dtype, 1e-5) if tolerance is None else tolerance
    return _adaptive(field, y, start, stop, solver, tolerance, adjoint_params)


def check_solver(
    solver: Solver, tolerance: float | None, steps: int, adjoint: bool = False
) -> None:
    """Raise unless these are a known solver that is installed, a tolerance and a step count."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver: expected one of {get_args(Solver)}, got {solver!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number or None, got {tolerance}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if adjoint and solver == "rk4":
        raise ValueError("adjoint: needs an adaptive solver ('dopri5' or 'dopri8'), got 'rk4'")
    if solver != "rk4":
        torchdiffeq()


def torchdiffeq() -> Any:
    """The package of that name, which an extra of ours installs."""
    try:
        import torchdiffeq as package
    except ImportError as error:
        raise ImportError(
            "solver: 'dopri5' and 'dopri8' need torchdiffeq; run pip install 'pyroflows[ode]', or "
            "choose solver='rk4'."
        ) from error
    return package


def _fixed_grid(field: Field, y: Tensor, start: float, stop: float, steps: int) -> Tensor:
    """The classical Runge-Kutta method of order 4."""
    h = (stop - start) / steps
    times = torch.linspace(start, stop, 2 * steps + 1, dtype=y.dtype, device=y.device)
    for begin, middle, end in zip(times[:-1:2], times[1::2], times[2::2], strict=True):
        k1 = field(begin, y)
        k2 = field(middle, y + h / 2 * k1)
        k3 = field(middle, y + h / 2 * k2)
        k4 = field(end, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def _adaptive(
    field: Field,
    y: Tensor,
    start: float,
    stop: float,
    solver: str,
    tolerance: float,
    adjoint_params: Sequence[Tensor] | None,
) -> Tensor:
    package = torchdiffeq()
    times = torch.tensor([start, stop], dtype=y.dtype, device=y.device)
    with torch.no_grad():
        usable = (y + field(times[0], y)).isfinite().all(-1, keepdim=True)

    def guarded(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(usable, field(t, y), 0.0)

    tolerance = max(tolerance, 50 * torch.finfo(y.dtype).eps)
    options = {
        "norm": _worst_row,
        # A fixed one: gradients through the solver's own choice would be wrong in second order.
        "first_step": _FIRST_STEP,
        "max_num_steps": MAX_STEPS,
    }
    solve, adjoint = package.odeint, {}
    if adjoint_params is not None:
        back = {**options, "step_t": times[:1]}
        del back["norm"]
        adjoint = {"adjoint_params": tuple(adjoint_params), "adjoint_options": back}
        solve = package.odeint_adjoint
    # The last step ends where the path does: beyond it the field need not be tame.
    options["step_t"] = times[1:]
    try:
        path = solve(
            guarded,
            torch.where(usable, y, 0.0),
            times,
            rtol=tolerance,
            atol=tolerance,
            method=solver,
            options=options,
            **adjoint,
        )
    except AssertionError as error:
        raise IntegrationError(
            f"{solver} did not reach the tolerance {tolerance:g} over {y[..., 0].numel()} rows: "
            f"{str(error)[:80]}. The velocity is too steep or not finite: train with a smaller lr, "
            "allow a larger tolerance, or use float64."
        ) from error
    return torch.where(usable, path[-1], torch.nan)


def _worst_row(error: Tensor) -> Tensor:
    return error.square().mean(-1).sqrt().amax()
