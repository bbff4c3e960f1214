"""Checks of a layer or a flow: its density under every use that torch and Pyro make of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions import Transform as TorchTransform
from torch.func import functional_call

from pyroflows.errors import ShapeError
from pyroflows.testing.tools import (
    CheckError,
    Made,
    check_close,
    forward,
    inverse,
    log_density,
    relative,
)


class _LogDensity(nn.Module):
    """The density as a module's forward: for functional calls, which end before a lazy density."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        return log_density(self.module(context), value)


def check_batching(
    module: nn.Module, value: Tensor, context: Tensor | None = None, tolerance: float = 1e-10
) -> None:
    """A batch is scored as its rows one by one, whatever its shape, also where it is empty.

    The relative ``tolerance`` is there because a batch may be summed in another order than a row.
    """
    contexts = [None] * len(value) if context is None else list(context)
    rows = [log_density(module(c), v) for c, v in zip(contexts, value, strict=True)]
    expected = torch.stack(rows)
    allowed = relative(tolerance, expected)
    check_close("batch against rows", log_density(module(context), value), expected, allowed)
    for shape in ((1, 2), (0,), (2, 0)):
        made = module(None if context is None else context.expand(*shape, *context.shape))
        values = value.expand(*shape, *value.shape)
        got = log_density(made, values)
        check_close(f"batch {shape}", got, expected.expand(*shape, *expected.shape), allowed)
        if isinstance(made, TorchTransform):
            check_close(f"forward, batch {shape}", forward(made, values)[1].detach() * 0, got * 0)


def check_context(
    module: nn.Module, value: Tensor, context: Tensor, tolerance: float = 1e-10
) -> None:
    """Contexts ``(M, 1, context)`` meet ``N`` values, and ``(M, context)`` one value."""
    expected = torch.stack([log_density(module(c), value) for c in context])
    got = log_density(module(context.unsqueeze(1)), value)
    check_close("contexts against values", got, expected, relative(tolerance, expected))
    one = log_density(module(context), value[0])
    check_close("contexts against one", one, expected[:, 0], relative(tolerance, one))


def check_tails(
    module: nn.Module,
    directions: Tensor,
    context: Tensor | None = None,
    magnitudes: Sequence[float] = (10.0, 100.0, 1e4),
    support: Any = None,
) -> None:
    """Densities and their gradients, in values and parameters, are finite far out.

    Far out is ``magnitude * directions``, on a ``support`` what ``biject_to(support)`` makes of it.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    for magnitude in magnitudes:
        value = directions * magnitude
        if support is not None:
            value = biject_to(support)(value)
        value.requires_grad_()
        density = log_density(module(context), value)
        gradients = torch.autograd.grad(density.sum(), [value, *parameters], materialize_grads=True)
        for what, tensor in (("density", density), *(("gradient", g) for g in gradients)):
            bad = ~tensor.isfinite()
            if bad.any():
                raise CheckError(
                    f"{what} at |x| = {magnitude:g}: {int(bad.sum())} of {bad.numel()} entries not "
                    f"finite, {int(tensor.isnan().sum())} of them NaN; shape {tuple(tensor.shape)}"
                )


def check_nan(module: nn.Module, value: Tensor, context: Tensor | None = None) -> None:
    """A NaN anywhere in an event makes its density NaN, and no other event's."""
    expected = log_density(module(context), value)[1:]
    for column in range(value[0].numel()):
        spoilt = value.clone()
        spoilt[0].view(-1)[column] = torch.nan
        got = log_density(module(context), spoilt)
        check_close("beside a NaN", got[1:], expected, relative(1e-4, expected))
        if not got[0].isnan().any():
            raise CheckError(f"NaN in coordinate {column}: its density is {got[0].tolist()}")


def check_dtype(module: nn.Module, value: Tensor, context: Tensor | None = None) -> None:
    """``module.double()`` and ``.float()`` reach every tensor, and densities have that dtype."""
    for dtype in (torch.float64, torch.float32):
        converted = copy.deepcopy(module).to(dtype)
        made = converted(None if context is None else context.to(dtype))
        tensors = {"density": log_density(made, value.to(dtype)), **converted.state_dict()}
        if isinstance(made, Distribution):
            tensors["draw"] = made.sample(torch.Size((2,)))
        wrong = {
            n: t.dtype for n, t in tensors.items() if t.is_floating_point() and t.dtype != dtype
        }
        if wrong:
            raise CheckError(f"expected {dtype}, got {wrong}")


@contextmanager
def _hostile_defaults() -> Iterator[None]:
    """A default dtype and a default device that nobody wants."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def check_defaults(module: nn.Module, value: Tensor, context: Tensor | None = None) -> None:
    """Nothing is allocated on torch's default dtype or device: densities and draws do without."""
    expected = log_density(module(context), value)
    with _hostile_defaults():
        made = module(context)
        got = log_density(made, value)
        draw = made.sample() if isinstance(made, Distribution) else forward(made, value)[0]
    check_close("density under hostile defaults", got, expected)
    if draw.dtype != value.dtype or draw.device != value.device:
        raise CheckError(
            f"draw: expected {value.dtype}, {value.device}; got {draw.dtype}, {draw.device}"
        )


def check_meta(module: nn.Module, value: Tensor, context: Tensor | None = None) -> None:
    """``.to("meta")`` moves every tensor, densities follow, and the state brings it all back."""
    expected = log_density(module(context), value)
    moved = copy.deepcopy(module).to("meta")
    got = log_density(moved(None if context is None else context.to("meta")), value.to("meta"))
    tensors = {"density": got, **moved.state_dict(), **dict(moved.named_buffers())}
    stayed = [name for name, tensor in tensors.items() if not tensor.is_meta]
    if stayed or got.shape != expected.shape or got.dtype != expected.dtype:
        raise CheckError(
            f"on meta: expected {tuple(expected.shape)} of {expected.dtype}, got "
            f"{tuple(got.shape)} of {got.dtype}; not moved: {stayed}"
        )
    moved.to_empty(device=value.device).load_state_dict(module.state_dict())
    check_close("density after meta", log_density(moved(context), value), expected)


def check_state(
    module: nn.Module, other: nn.Module, value: Tensor, context: Tensor | None = None
) -> None:
    """The saved state, loaded with ``weights_only=True``, makes ``other`` the same density."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    log_density(other(context), value)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    expected = log_density(module(context), value)
    check_close("density after loading", log_density(other(context), value), expected)


def check_copies(module: nn.Module, value: Tensor, context: Tensor | None = None) -> None:
    """A used module can be deep-copied and pickled, and carries no batch with it."""
    expected = log_density(module(context), value)
    sizes = []
    for repeats in (1, 100):
        batch = None if context is None else context.repeat(repeats, 1)
        many = value.repeat(repeats, *(1,) * (value.dim() - 1)).requires_grad_()
        log_density(module(batch), many).sum().backward()
        module.zero_grad()
        sizes.append(len(pickle.dumps(module)))
    if sizes[0] != sizes[1]:
        raise CheckError(f"pickle: {sizes[0]} bytes after {len(value)} rows, {sizes[1]} after more")
    for what, clone in (
        ("deepcopy", copy.deepcopy(module)),
        ("pickle", pickle.loads(pickle.dumps(module))),
    ):
        check_close(f"density after {what}", log_density(clone(context), value), expected)


def check_vmap_grad(
    module: nn.Module, value: Tensor, context: Tensor | None = None, tolerance: float = 1e-8
) -> None:
    """``torch.func.vmap`` and ``grad`` of the density agree with batches and with autograd."""
    score = _LogDensity(module)
    dims = (0, None if context is None else 0)
    leaf = value.detach().clone().requires_grad_()
    expected = score(leaf, context)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    got = torch.func.vmap(score, in_dims=dims)(value, context)
    gradient = torch.func.grad(lambda v, c: score(v, c).sum())
    slopes = torch.func.vmap(gradient, in_dims=dims)(value, context)
    check_close("vmap", got, expected, relative(tolerance, expected))
    check_close("vmap of grad", slopes, slope, relative(tolerance, slope))


def check_gradients(module: nn.Module, value: Tensor, context: Tensor | None = None) -> None:
    """First and second derivatives against finite differences: float64, away from knots."""
    score = _LogDensity(module)
    named = {name: p for name, p in score.named_parameters() if p.requires_grad}

    def function(value: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(score, dict(zip(named, parameters, strict=True)), (value, context))

    inputs = tuple(leaf.detach().clone().requires_grad_() for leaf in (value, *named.values()))
    try:
        torch.autograd.gradcheck(function, inputs, fast_mode=True)
        torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    except RuntimeError as error:
        raise CheckError(f"gradients of {tuple(value.shape)} values: {error}") from error


def _scored(made: Made, value: Tensor) -> Tensor:
    """One number that depends on all that a module computes from these values."""
    if isinstance(made, Distribution):
        return made.log_prob(value).sum()
    z, ladj = inverse(made, value)
    # Generic weights: a normal density would not see a rotation.
    weights = torch.arange(z.numel(), dtype=z.dtype, device=z.device).cos().view_as(z)
    return (weights * z).sum() + ladj.sum()


def check_every_parameter(
    module: nn.Module,
    value: Tensor,
    context: Tensor | None = None,
    idle: Collection[str] = (),
    tolerance: float = 1e-10,
) -> None:
    """Every parameter that may train has a gradient other than zero, for these values.

    Parameters
    ----------
    module
        With generic parameters, see `redraw_`: at the start many have no influence yet.
    value, context
        Enough of them to visit every part of a map.
    idle
        ``"Class.parameter"`` of what cannot have an influence, as weights between features have
        none where there is one feature.
    tolerance
        What counts as zero, relative to the largest gradient.

    Examples
    --------
    >>> flow, x = pf.MAF(2).double(), torch.randn(64, 2, dtype=torch.float64)
    >>> pf.testing.redraw_(flow, scale=0.3)
    >>> check_every_parameter(flow, x)
    """
    owned = {
        f"{prefix}.{name}".lstrip("."): (f"{type(owner).__name__}.{name}", parameter)
        for prefix, owner in module.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.numel()
    }
    if not owned:
        return
    score = _scored(module(context), value)
    leaves = [parameter for _, parameter in owned.values()]
    gradients = torch.autograd.grad(score, leaves, materialize_grads=True)
    sizes = [float(gradient.abs().max()) for gradient in gradients]
    least = tolerance * max(sizes, default=0.0)
    unused = [
        f"{where} ({name})"
        for (where, (name, _)), size in zip(owned.items(), sizes, strict=True)
        if not size > least and name not in idle
    ]
    if unused:
        raise CheckError(
            f"no gradient, or NaN, in {len(unused)} of {len(owned)} parameters: {', '.join(unused)}"
        )


def _density(distribution: Distribution, to_support: TorchTransform, x: Tensor) -> Tensor:
    """The density of unconstrained numbers, whose images are the distribution's."""
    value = to_support(x)
    return (distribution.log_prob(value) + to_support.log_abs_det_jacobian(x, value)).exp()


@torch.no_grad()
def check_mass(
    distribution: Distribution, points: int = 401, tolerance: float = 1e-3, support: Any = None
) -> None:
    """The density integrates to one, by the trapezoidal rule in one or two dimensions.

    Parameters
    ----------
    distribution
        Of event shape ``(1,)`` or ``(2,)`` and no batch.
    points
        Of the grid, per dimension: dense near the median, and a thousand deviations wide.
    tolerance
        Of the mass. Coarse, for a grid sees nothing much narrower than its step.
    support
        Of a density that does not vanish at the ends of its support, which a grid of values would
        miss: the grid is then one of unconstrained numbers, by ``biject_to(support)``.

    Examples
    --------
    >>> from pyro.distributions import Normal
    >>> check_mass(Normal(torch.zeros(2), 1.0).to_event(1))
    """
    if distribution.event_shape not in ((1,), (2,)) or distribution.batch_shape:
        raise ShapeError(f"expected an event of one or two features, got {distribution}")
    to_support = biject_to(constraints.real_vector if support is None else support)
    draws = to_support.inv(distribution.sample(torch.Size((4096,))))
    centre = draws.median(0)[0]
    deviation = (draws - centre).abs().median(0)[0]
    steps = torch.linspace(-7.6, 7.6, points, dtype=draws.dtype, device=draws.device).sinh()
    axes = [c + d * steps for c, d in zip(centre, deviation, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    mass = torch.cat([_density(distribution, to_support, part) for part in grid.split(32)])
    for axis in reversed(axes):
        mass = torch.trapezoid(mass, axis)
    check_close("mass", mass, torch.ones_like(mass), tolerance)
