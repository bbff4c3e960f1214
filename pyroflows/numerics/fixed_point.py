"""Inverses of the identity plus a contraction, and Jacobians of batches of functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from pyroflows.errors import InversionError
from pyroflows.numerics.concrete import has_values

#: A function of the last dimension, batch by batch.
VectorFunction = Callable[[Tensor], Tensor]

#: Beyond so many features the iteration goes without Newton's steps, which take a Jacobian each.
NEWTON_FEATURES = 64
#: Most steps, and how many Newton's method has where values cannot be looked at.
STEPS, FIXED_STEPS = 2000, 30
#: Accepted error, and the one that ends the iteration, in units in the last place.
ROUNDINGS, GOAL = 1024, 16


def batched_vjp(
    function: VectorFunction, x: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    """The function's values, and its vector-Jacobian product at these points.

    As `torch.func.vjp`, but where the function adds batch dimensions, such as those of a context,
    each event of the larger batch has a product of its own.

    Parameters
    ----------
    function
        From ``(*batch, features)`` to the same shape, each event by itself.
    x
        Points, ``(*batch, features)``.

    Examples
    --------
    >>> value, product = batched_vjp(torch.square, torch.tensor([1.0, 2.0]))
    >>> product(torch.tensor([0.0, 1.0]))
    (tensor([0., 4.]),)
    """
    value, product, *_ = torch.func.vjp(function, x)
    if value.shape != x.shape:
        value, product, *_ = torch.func.vjp(function, x.expand(value.shape))
    return value, product


def value_and_jacobian(function: VectorFunction, x: Tensor) -> tuple[Tensor, Tensor]:
    """The function's values and Jacobians, by one vector-Jacobian product for each feature.

    Parameters
    ----------
    function
        From ``(*batch, features)`` to the same shape, each event by itself; see `batched_vjp`.
    x
        Points, ``(*batch, features)``.

    Returns
    -------
    tuple of Tensor
        Values ``(*batch, features)`` and Jacobians ``(*batch, features, features)``, outputs first.

    Examples
    --------
    >>> value_and_jacobian(lambda x: x**2, torch.tensor([1.0, 2.0]))[1]
    tensor([[2., 0.],
            [0., 4.]])
    """
    value, product = batched_vjp(function, x)
    rows = torch.ones_like(value).diag_embed().movedim(-2, 0)
    return value, torch.func.vmap(lambda row: product(row)[0])(rows).movedim(0, -2)


# Compiled code calls it as it is: unrolled, its loop would be thousands of operations.
@_disable_dynamo
def contraction_root(
    function: VectorFunction, y: Tensor, lipschitz: float, tolerance: float | None = None
) -> Tensor:
    r"""Solve :math:`x + g(x) = y` for a contraction :math:`g`.

    The Banach iteration :math:`x \leftarrow y - g(x)` shrinks the error by ``lipschitz`` at each
    step. Up to 64 features, Newton's step is tried first and kept where it shrinks the residual as
    much. The first and second derivatives of the root, with respect to ``y`` and to whatever the
    function depends on, are those of the implicit function: two differentiable Newton steps from
    the root carry them.

    Parameters
    ----------
    function
        The contraction :math:`g`, from ``(*batch, features)`` to the same shape.
    y
        Values, ``(*batch, features)``; the function may add batch dimensions.
    lipschitz
        A Lipschitz constant of the function, below 1.
    tolerance
        Largest residual, relative to the size of the event; by default 1024 units in the last place
        of the dtype.

    Returns
    -------
    Tensor
        The root; NaN where ``y`` is.

    Raises
    ------
    InversionError
        Where the tolerance is not met; not inside ``torch.func`` transforms, while tracing or on
        the meta device, where the number of steps is fixed.

    References
    ----------
    Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML 2019.

    Examples
    --------
    >>> contraction_root(lambda x: 0.5 * x.sin(), torch.tensor([1.0, 2.0]), lipschitz=0.5)
    tensor([0.6840, 1.5012])
    """
    with torch.no_grad():
        x = _solve(function, y, lipschitz)
        if has_values(x):
            _check(function, x, y, tolerance)
    if torch.is_grad_enabled():
        for _ in range(2):
            value, matrix = value_and_jacobian(function, x)
            x = x + _newton_step(matrix, y - x - value)
    return x


def _solve(function: VectorFunction, y: Tensor, lipschitz: float) -> Tensor:
    """The root, without gradients."""
    residual = -function(y)
    x = y.expand_as(residual)
    matrix = torch.zeros_like(x).diag_embed()
    newton, known = x.shape[-1] <= NEWTON_FEATURES, has_values(x)
    accuracy = GOAL * torch.finfo(x.dtype).eps
    steps = STEPS
    if not known:
        steps = FIXED_STEPS if newton else math.ceil(math.log(accuracy) / math.log(lipschitz))
    # A plain step always shrinks the residual: it is taken where Newton's did not.
    step, plain = residual, torch.ones_like(x[..., :1], dtype=torch.bool)
    for _ in range(steps):
        if known and not (_size(residual) > accuracy * (1 + _size(y))).any():
            break
        trial = x + step
        value, trial_matrix = (
            value_and_jacobian(function, trial) if newton else (function(trial), matrix)
        )
        rest = y - trial - value
        good = plain | (_size(rest) <= lipschitz * _size(residual))
        x, residual = torch.where(good, trial, x), torch.where(good, rest, residual)
        matrix = torch.where(good.unsqueeze(-1), trial_matrix, matrix)
        step, plain = residual, torch.ones_like(plain)
        if newton:
            plain = ~good
            step = torch.where(good, _newton_step(matrix, residual), residual)
    return x


def _newton_step(matrix: Tensor, residual: Tensor) -> Tensor:
    """The step that removes the residual of the identity plus a function of this Jacobian."""
    eye = torch.ones_like(residual).diag_embed()
    # Never singular, so nothing to check: the check would make a GPU wait.
    return torch.linalg.solve_ex(eye + matrix, residual.unsqueeze(-1)).result.squeeze(-1)


def _size(vector: Tensor) -> Tensor:
    """Euclidean norm, with the last dimension kept."""
    return torch.linalg.vector_norm(vector, dim=-1, keepdim=True)


def _check(function: VectorFunction, x: Tensor, y: Tensor, tolerance: float | None) -> None:
    if tolerance is None:
        tolerance = ROUNDINGS * torch.finfo(x.dtype).eps
    residual = _size(y - x - function(x))
    allowed = tolerance * (1 + _size(y))
    wrong = (residual > allowed) | (x.isnan().any(-1, True) & ~y.isnan().any(-1, True))
    if wrong.any():
        worst = torch.where(wrong, residual, torch.zeros_like(residual)).nan_to_num(torch.inf)
        raise InversionError(
            f"inverse: {int(wrong.sum())} of {wrong.numel()} event(s) were not found to a relative "
            f"tolerance of {tolerance:.1e}; the worst residual is {worst.max().item():.3g}. The "
            "function may not be a contraction, or rounding hides the root: use float64, or a "
            "smaller Lipschitz constant."
        )
