"""Flows and guides in one file: weights by safetensors, the recipe as JSON, no pickle.

The weights and buffers are stored under their ``state_dict`` names. One metadata entry describes
in JSON how to build the module that they belong to: public classes of this package by name and
their constructors' arguments. Reading a file runs these constructors and no other code.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyroflows.errors import SavedFileError
from pyroflows.flows import Flow
from pyroflows.flows.description import (
    DAMAGED,
    Record,
    build,
    check_tensors,
    describe,
    digest,
    field,
    restore,
)
from pyroflows.flows.file import FORMAT_VERSION, Path, read_file, write_file
from pyroflows.guides import AutoAmortizedFlow, AutoFlow
from pyroflows.guides.saved import describe_amortized, restore_amortized
from pyroflows.numerics import forked_rng

__all__ = ["load", "save"]

logger = logging.getLogger(__name__)


def save(flow_or_guide: Flow | AutoFlow | AutoAmortizedFlow, path: Path) -> None:
    """Write a flow or a guide to one file, which `load` reads on any device.

    Stored are all parameters and buffers with their dtypes, the class and its arguments, which
    parameters are frozen (``requires_grad``), which are shared, and which modules train or
    evaluate. Of a guide, also its name and the unconstrained shapes of its latent sites; not the
    model, which `load` takes as an argument. An amortised guide has encoders of yours, so of it the
    tensors are stored, and `load` takes a guide constructed anew. Equal content gives equal bytes,
    with a checksum. The file appears whole or not at all.

    Parameters
    ----------
    flow_or_guide
        A recipe such as `pyroflows.NSF`, a `pyroflows.Flow` of public layers, or a
        `pyroflows.AutoFlow` or `pyroflows.AutoAmortizedFlow` that has seen its model.
    path
        The file to write, ``.safetensors`` by custom. An existing file is replaced.

    Raises
    ------
    TypeError
        If the file could not say how to build the module: a class of your own, a lambda as
        activation, a module changed after construction.
    ValueError
        If there is nothing to store: a guide before its first call, tensors on the meta device.

    Examples
    --------
    >>> import tempfile
    >>> import pyroflows as pf
    >>> flow = pf.NSF(2, transforms=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pf.save(flow, f"{folder}/flow.safetensors")
    ...     again = pf.load(f"{folder}/flow.safetensors")
    >>> x = torch.randn(5, 2)
    >>> torch.equal(again().log_prob(x), flow().log_prob(x))
    True
    """
    from pyroflows import __version__  # defined after this module is imported

    if isinstance(flow_or_guide, AutoAmortizedFlow):
        kind, (record, tensors) = "amortized", describe_amortized(flow_or_guide)
    else:
        kind, record, tensors = _describe(flow_or_guide)
    versions = {"format_version": FORMAT_VERSION, "pyroflows_version": __version__}
    record = {**versions, "kind": kind, **record}
    write_file(path, {**record, "sha256": digest(record, tensors)}, tensors)


def _describe(flow_or_guide: Flow | AutoFlow) -> tuple[str, Record, dict[str, Tensor]]:
    flow, guide = _flow_of(flow_or_guide)
    record, tensors = describe(flow)
    if guide is None:
        return "flow", record, tensors
    sites = [[site, list(shape)] for site, shape in guide.latent_shapes.items()]
    record["guide"] = {"name": guide.name, "latent_shapes": sites}
    if guide.groups is not None:
        record["guide"]["arranged"] = True
    return "guide", record, tensors


@overload
def load(
    path: Path, *, map_location: str | torch.device | None = None, model: None = None
) -> Flow: ...


@overload
def load(
    path: Path,
    *,
    map_location: str | torch.device | None = None,
    model: Callable[..., Any],
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> AutoFlow: ...


@overload
def load(
    path: Path,
    *,
    guide: AutoAmortizedFlow,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> AutoAmortizedFlow: ...


def load(
    path: Path,
    *,
    map_location: str | torch.device | None = None,
    model: Callable[..., Any] | None = None,
    guide: AutoAmortizedFlow | None = None,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Flow | AutoFlow | AutoAmortizedFlow:
    """Read a flow or a guide that `save` wrote.

    The result has the saved one's dtype, densities (to the bit), frozen parameters and training
    mode. Neither the random state nor the default dtype or device matters or changes.

    Parameters
    ----------
    path
        The file.
    map_location
        Where to put a flow; by default the CPU, wherever it was saved. A guide goes where its
        model's latents are, so that device is all that may be named here.
    model
        Of a guide: the model. Its latent sites must be those of the file.
    guide
        Of an amortised guide: one constructed as the saved one was; it gets the file's values.
    example_args, example_kwargs
        Of a guide: the model's arguments, if it takes any.

    Returns
    -------
    Flow, AutoFlow or AutoAmortizedFlow
        What was saved. A guide's parameters are in Pyro's param store under its name (or the next
        free one, where another live guide has it), in place of what a former guide left there.

    Raises
    ------
    SavedFileError
        If the file is damaged, was not written by `save`, is of a newer format, or does not fit
        the model.
    ValueError
        If ``model`` or its arguments are missing or not called for.

    Examples
    --------
    >>> import tempfile
    >>> import pyro, pyro.distributions as dist
    >>> import pyroflows as pf
    >>> def model():
    ...     pyro.sample("scale", dist.HalfNormal(1.0))
    >>> guide = pf.guides.AutoFlow(model, name="scale_guide", example_args=())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pf.save(guide, f"{folder}/guide.safetensors")
    ...     del guide
    ...     guide = pf.load(f"{folder}/guide.safetensors", model=model)
    >>> guide.latent_shapes
    {'scale': ()}
    """
    with _about(path):
        record, tensors = read_file(path)
        kind = field(record, "kind", str)
        if kind not in ("flow", "guide", "amortized"):
            raise SavedFileError(
                f"kind: expected 'flow', 'guide' or 'amortized', got {kind!r}. {DAMAGED}"
            )
        if kind != "amortized":
            flow = build(record)
            check_tensors(flow, record, tensors)
        if field(record, "sha256", str) != digest(record, tensors):
            raise SavedFileError(f"the content is not what was saved. {DAMAGED}")
    arguments = (tuple(example_args or ()), dict(example_kwargs or {}))
    if (kind == "amortized") != (guide is not None):
        raise ValueError(
            f"{path} holds {'an amortised' if guide is None else 'no amortised'} guide. Of an "
            "amortised guide neither model nor encoders are saved: construct it as it was, and "
            "load(path, guide=guide). Anything else takes no guide."
        )
    if guide is not None:
        guide.register(*arguments[0], **arguments[1])
        with _about(path):
            restore_amortized(guide, record, tensors)
        return guide
    if kind == "flow":
        if model is not None or any(arguments):
            raise ValueError(
                f"{path} holds a flow: it takes no model and no example arguments. For a guide "
                "with this flow write AutoFlow(model, load(path))."
            )
        flow.to(device="cpu" if map_location is None else map_location)
        restore(flow, record, tensors)
        return flow
    model = _checked_model(path, model, arguments)
    with _about(path):
        return _build_guide(flow, record, tensors, model, arguments, map_location)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong with it."""
    try:
        yield
    except SavedFileError as error:
        raise SavedFileError(f"{os.fspath(path)}: {error}") from error
    except RecursionError as error:
        raise SavedFileError(
            f"{os.fspath(path)}: the description is nested too deeply. {DAMAGED}"
        ) from error


def _flow_of(flow_or_guide: Any) -> tuple[Flow, AutoFlow | None]:
    if isinstance(flow_or_guide, Flow):
        return flow_or_guide, None
    if type(flow_or_guide) is not AutoFlow:
        raise TypeError(
            f"expected a Flow or an AutoFlow, got {type(flow_or_guide).__name__}. Of a guide class "
            "of your own save the flow: save(guide.flow, path)."
        )
    if flow_or_guide.prototype_trace is None:
        raise ValueError(
            "the guide does not know its model's latents yet, so there is nothing to save: call "
            "guide(*args) once, or construct it with example_args"
        )
    return flow_or_guide.flow, flow_or_guide


# --- guides ---------------------------------------------------------------------------------------


def _checked_model(
    path: Path, model: Callable[..., Any] | None, arguments: tuple[tuple[Any, ...], Record]
) -> Callable[..., Any]:
    """The model, if there is one and it takes these arguments."""
    if model is None:
        raise ValueError(
            f"{os.fspath(path)} holds a guide, and models are not saved: pass the model, "
            "load(path, model=model, example_args=(...))"
        )
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # some callables do not tell
        return model
    try:
        signature.bind(*arguments[0], **arguments[1])
    except TypeError as error:
        raise ValueError(
            f"the model takes {signature}, and example_args and example_kwargs do not fit "
            f"({error}): pass arguments of the shapes that the guide was made with"
        ) from error
    return model


def _check_sites(saved: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise unless the model's latent vector is the saved one."""
    for site in [*saved, *found]:
        if saved.get(site) != found.get(site):
            shapes = [s.get(site, "no such site") for s in (saved, found)]
            raise SavedFileError(
                f"site {site!r}: the guide was saved with unconstrained shape {shapes[0]}, the "
                f"model has {shapes[1]}. Pass the model that the guide was made for, with "
                "arguments of the same shapes."
            )
    if list(saved) != list(found):
        raise SavedFileError(
            f"the guide was saved with the sites in the order {list(saved)}, the model has them as "
            f"{list(found)}, and the latent vector follows that order. Put the model's sample "
            "statements back in order."
        )


def _guide_record(record: Record) -> tuple[str, dict[str, tuple[int, ...]]]:
    guide = field(record, "guide", dict)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in field(guide, "latent_shapes", list):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
            raise SavedFileError(f"latent_shapes: expected [site, shape], got {entry}. {DAMAGED}")
        shapes[str(entry[0])] = tuple(entry[1])
    return field(guide, "name", str), shapes


def _build_guide(
    flow: Flow,
    record: Record,
    tensors: Mapping[str, Tensor],
    model: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], Record],
    map_location: str | torch.device | None,
) -> AutoFlow:
    name, shapes = _guide_record(record)
    restore(flow, record, tensors)

    def checked(features: int) -> Flow:
        """Called when the guide has met its model, before anything is registered."""
        _check_sites(shapes, guide.latent_shapes)
        trace: Any = guide.prototype_trace
        values = [trace.nodes[site]["value"] for site in shapes]
        _check_place(values, flow.dtype, map_location)
        _forget(guide.name, flow)
        return flow

    # Of a guide in groups the order of the sites is its own; the flow is there already.
    groups = [list(shapes)] if record["guide"].get("arranged") is True else None
    # Start values are the file's: the model's own, which may be costly or undefined, do not matter.
    guide = AutoFlow(model, checked, groups=groups, name=name, init_loc_fn=init_to_feasible)
    with forked_rng(), poutine.block():
        guide(*arguments[0], **arguments[1])
    # Once more, for meeting the model may have moved the flow and set its standardisation.
    restore(flow, record, tensors)
    guide.training = flow.training
    return guide


def _forget(name: str, flow: Flow) -> None:
    """Drop what the param store holds for the flow of a guide that is gone: the file replaces it.

    Without this the new guide would adopt those values.
    """
    store = pyro.get_param_store()
    keys = [key for key, _ in (*flow.named_parameters(), *flow.named_buffers())]
    stored = {param_with_module_name(f"{name}.flow", key) for key in keys} & set(store)
    for key in stored:
        del store[key]
    if stored:
        logger.warning("%s: %d tensors of the param store replaced", name, len(stored))


def _check_place(
    values: Sequence[Tensor], dtype: torch.dtype, map_location: str | torch.device | None
) -> None:
    """Raise unless the model's latents have the flow's dtype and are where they were wanted."""
    latents = torch.cat([value.reshape(-1) for value in values])
    if latents.dtype != dtype:
        raise SavedFileError(
            f"the guide was saved in {dtype}, the model's latents are {latents.dtype}. Pass "
            f"example arguments of {dtype}, or set the default dtype that the model was run with."
        )
    wanted = latents.device if map_location is None else torch.device(map_location)
    if wanted.type != latents.device.type or wanted.index not in (None, latents.device.index):
        raise ValueError(
            f"map_location: the model's latents are on {latents.device}, and so will the guide be; "
            f"got {wanted}. Move the model and its example arguments, or leave map_location out."
        )
