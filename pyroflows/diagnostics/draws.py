"""Draws from a guide or an MCMC run, with the model and the arguments that they belong to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.reparam import NeuTraReparam
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamHandler
from torch import Tensor

from pyroflows.diagnostics.predictions import Model, Program

_SHARED = "_shared_latent"
# How many draws are scored twice, to see whether the score is random.
_REPEATED = 20
_RANDOM_SCORE = (
    "lp and log_weight are left out of sample_stats: two scores of the same draws differ, because "
    "the model samples what is neither data nor a latent of the guide (a minibatch, a discrete "
    "site behind poutine.block, data that were not given)."
)


class FlowGuide(Protocol):
    """What the diagnostics need of a guide: `AutoFlow` has it."""

    original_model: Model

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Return the distribution of the unconstrained latent vector."""

    def unpack(self, latents: Tensor) -> dict[str, Tensor]:
        """Map ``(S, D)`` unconstrained to ``{site: (S, *shape)}`` constrained."""

    def log_joint(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Score ``(S, D)`` unconstrained latents by the model: ``(S,)``, in nats."""


def is_flow_guide(fitted: Any) -> TypeGuard[FlowGuide]:
    """Tell whether ``fitted`` has what `FlowGuide` lists."""
    names = ("original_model", "get_posterior", "unpack", "log_joint")
    return all(hasattr(fitted, name) for name in names)


@dataclass(frozen=True)
class Draws:
    """Posterior draws ``{site: (chains * draws, *shape)}`` and how they came about."""

    samples: dict[str, Tensor]
    num_chains: int
    model: Model | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    stats: dict[str, Tensor] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def draw_posterior(
    fitted: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    num_samples: int,
    model: Model | None,
    neutra: Any,
) -> Draws:
    """Draw from a guide, or collect the draws of an MCMC run; `Draws` are taken as they are."""
    if isinstance(fitted, Draws):
        return replace(fitted, model=fitted.model and _summed_out_shown(fitted.model))
    if isinstance(fitted, MCMC):
        return _from_mcmc(fitted, args, kwargs, model, neutra)
    if neutra is not None:
        raise TypeError(
            "neutra: expected only with an MCMC run in the space of a guide. "
            "To export the guide itself, leave neutra out."
        )
    if is_flow_guide(fitted):
        return _from_guide(fitted, args, kwargs or {}, model, num_samples)
    raise TypeError(
        f"fitted: expected an AutoFlow guide or a pyro.infer.MCMC object, got "
        f"{type(fitted).__name__}. Pass the guide or the MCMC object itself, the model's "
        "arguments after it."
    )


def _from_guide(
    guide: FlowGuide,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    model: Model | None,
    num_samples: int,
) -> Draws:
    model = _summed_out_shown(guide.original_model if model is None else model)
    check_call(model, args, kwargs)
    posterior = guide.get_posterior(*args, **kwargs)
    latents, log_q = posterior.rsample_and_log_prob((num_samples,))
    lp = guide.log_joint(latents, *args, **kwargs)
    samples, stats = guide.unpack(latents), {"log_q": log_q}
    again = guide.log_joint(latents[:_REPEATED], *args, **kwargs)
    if not torch.allclose(again, lp[:_REPEATED], rtol=1e-4, atol=1e-3, equal_nan=True):
        return Draws(samples, 1, model, args, kwargs, stats, notes=[_RANDOM_SCORE])
    return Draws(samples, 1, model, args, kwargs, {"lp": lp, **stats, "log_weight": lp - log_q})


def _from_mcmc(
    mcmc: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    model: Model | None,
    neutra: Any,
) -> Draws:
    # Pyro keeps these under private names only; `diagnostics()` fails below four draws.
    if mcmc._samples is None:
        raise ValueError("The MCMC object has no draws yet. Call its run() first.")
    if not args and kwargs is None:
        args, kwargs = mcmc._args, mcmc._kwargs
    kwargs = kwargs or {}
    samples = {name: value.flatten(0, 1) for name, value in mcmc._samples.items()}
    kernel_model = getattr(mcmc.kernel, "model", None)
    if neutra is not None and kernel_model is not None:
        guide = neutra.guide if isinstance(neutra, NeuTraReparam) else neutra
        samples = _in_model_space(mcmc, samples, guide)
        inside = kernel_model.fn if isinstance(kernel_model, ReparamHandler) else None
        kernel_model = getattr(guide, "original_model", inside)
    model = kernel_model if model is None else model
    if model is not None:
        model = _summed_out_shown(model)
        check_call(model, args, kwargs)
    diverging = np.zeros((mcmc.num_chains, mcmc.num_samples), dtype=bool)
    for chain, diagnostics in enumerate(mcmc._diagnostics):
        diverging[chain, diagnostics.get("divergences", [])] = True
    stats = {"diverging": torch.from_numpy(diverging.reshape(-1))}
    # A mean over the chain, so an attribute: Pyro keeps no value for each draw.
    rates = [d["acceptance rate"] for d in mcmc._diagnostics if "acceptance rate" in d]
    attrs = {"acceptance_rate": [float(rate) for rate in rates]} if rates else {}
    return Draws(samples, mcmc.num_chains, model, args, kwargs, stats, attrs)


def _in_model_space(mcmc: Any, samples: dict[str, Tensor], guide: Any) -> dict[str, Tensor]:
    """Map the draws of a NeuTra run to the model's own sites.

    The run's model computes these itself. The guide's `unpack` would not do: it takes each support
    as it was at the start, where the run takes it at the draw, as in b ~ Uniform(0, a).
    """
    if not isinstance(guide, AutoContinuous):
        raise TypeError(
            f"neutra: expected the NeuTraReparam or its guide, got {type(guide).__name__}."
        )
    first = {name: value[0] for name, value in samples.items()}
    program = Program(mcmc.kernel.model, mcmc._args, mcmc._kwargs, first)
    prototype: Any = guide.prototype_trace
    names = [name for name, _ in prototype.iter_stochastic_nodes() if name in program.sites]
    shared = shared_latent(samples, program)
    if shared is None or not names:
        raise ValueError(
            f"neutra: the run sampled {sorted(samples)}, and none in the space of this guide. "
            "Leave neutra out if the run was not made with poutine.reparam(model, neutra)."
        )
    values = program.evaluate(samples, len(samples[shared]), values=names).values
    return values | {name: value for name, value in samples.items() if name != shared}


def shared_latent(samples: Mapping[str, Tensor], program: Program) -> str | None:
    """Find the site that NeuTraReparam samples in place of the model's own."""
    names = (name for name in samples if name.removesuffix(_SHARED) in program.sites)
    return next((name for name in names if name.endswith(_SHARED)), None)


def _handler(model: Model) -> tuple[Messenger | None, Model]:
    """Take the outermost Pyro handler off a model."""
    if isinstance(model, ReparamHandler):
        return model.msngr, model.fn
    call = model.func if isinstance(model, partial) and not model.args else model
    if isinstance(call, partial) and len(call.args) > 1 and isinstance(call.args[0], Messenger):
        return call.args[0], call.args[1]
    return None, model


def _summed_out_shown(model: Model) -> Model:
    """Undo `poutine.block`: sites that the guide does not see are still to be sampled here."""
    handler, inside = _handler(model)
    while isinstance(handler, BlockMessenger | InferConfigMessenger):
        model = inside
        handler, inside = _handler(model)
    return model


def _signature(model: Model) -> inspect.Signature | None:
    handler, model = _handler(model)
    while handler is not None:
        handler, model = _handler(model)
    try:
        return inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    except ValueError:  # a callable written in C
        return None


def check_call(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise `TypeError` unless the model can be called with these arguments."""
    named_arguments(model, args, kwargs)


def named_arguments(
    model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the model's arguments by the names of its parameters."""
    signature = _signature(model)
    if signature is None:
        return dict(kwargs)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(
            f"The model, called as model{signature}, does not accept the arguments given: {error}. "
            "Pass its arguments after the guide or MCMC object, keywords as model_kwargs={...}."
        ) from None
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{position}": item for position, item in enumerate(value)}
        else:
            named[name] = value
    return named
