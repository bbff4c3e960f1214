"""A flow's recipe as JSON, and back: public classes by name, and their arguments."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyroflows import distributions, layers, transforms
from pyroflows.errors import SavedFileError
from pyroflows.flows.flow import Flow
from pyroflows.flows.supports import constraint_by_name, name_of_constraint
from pyroflows.nn import RecordedModule
from pyroflows.numerics import forked_rng

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
Record = dict[str, Any]
DAMAGED = "The file is damaged or was edited: save it again, or restore a copy."


def field(record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """``record[key]``, which must be there and of this kind."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
        raise SavedFileError(
            f"expected {key!r} of type {' or '.join(names)}, got {value!r:.80}. {DAMAGED}"
        )
    return value


def _names(record: Any, key: str) -> list[str]:
    names = field(record, key, list)
    if not all(isinstance(name, str) for name in names):
        raise SavedFileError(f"{key}: expected names, got {names!r:.80}. {DAMAGED}")
    return list(names)


@functools.cache
def _registry() -> dict[str, type]:
    """The classes that a file may name: public, and built from their arguments alone."""
    from pyroflows import flows  # this module is a part of it

    parts = (distributions, flows, layers, transforms)
    public = {name: getattr(part, name) for part in parts for name in part.__all__}
    return {
        name: value
        for name, value in public.items()
        if isinstance(value, type)
        and (issubclass(value, RecordedModule) or dataclasses.is_dataclass(value))
    }


def _is_torch_module(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, RecordedModule):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return {name: getattr(value, name) for name in names}
    # With the defaults: a later pyroflows may choose others, and the file must not follow.
    given = value.arguments
    _, *parameters = inspect.signature(type(value).__init__).parameters.values()
    arguments = {p.name: given.get(p.name, p.default) for p in parameters}
    if isinstance(value, Flow) and "layers" in arguments:
        # They may have been given as an iterator, which is spent by now.
        arguments["layers"] = list(value.transform.layers)
    return arguments


def encode(value: Any, where: str) -> Any:
    """As JSON; what JSON has no word for becomes an object with one telling key."""
    if isinstance(value, np.generic):
        value = value.item()
    is_finite = isinstance(value, float) and math.isfinite(value)
    if value is None or isinstance(value, (bool, int, str)) or is_finite:
        return value
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (tuple, range)):
        return {"tuple": encode(list(value), where)}
    if isinstance(value, (Tensor, np.ndarray)):
        array = torch.as_tensor(value)
        return {"tensor": array.tolist(), "dtype": str(array.dtype).removeprefix("torch.")}
    if isinstance(value, functools.partial) and _is_torch_module(value.func):
        args = encode(list(value.args), where)
        kwargs = {key: encode(item, where) for key, item in value.keywords.items()}
        return {**encode(value.func, where), "args": args, "kwargs": kwargs}
    if isinstance(value, Constraint) and (named := name_of_constraint(value)):
        return {"constraint": named[0], "arguments": encode(named[1], where)}
    name = getattr(value, "__name__", "")
    if _is_torch_module(value) and getattr(nn, name, None) is value:
        return {"torch.nn": name}
    name = type(value).__name__
    if _registry().get(name) is type(value):
        arguments = _arguments(value)
        inner = {key: encode(item, f"{where}.{key}") for key, item in arguments.items()}
        return {"class": name, "arguments": inner}
    raise TypeError(
        f"{where}: expected a finite number, a string, a tensor, a torch.nn class (or a partial of "
        f"one), a constraint or a public class of pyroflows, got {value!r}, which a file cannot "
        "describe. "
        "torch.save(flow.state_dict(), path) stores the weights of any flow."
    )


def decode(value: Any, where: str) -> Any:
    """The inverse of `encode`; builds the modules."""
    if isinstance(value, list):
        return [decode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(decode(field(value, "tuple", list), where))
    if "tensor" in value:
        dtype = getattr(torch, field(value, "dtype", str), None)
        if not isinstance(dtype, torch.dtype):
            raise SavedFileError(f"{where}: {value['dtype']!r} is not a torch dtype. {DAMAGED}")
        return _call(torch.tensor, [value["tensor"]], {"dtype": dtype}, where)
    if "torch.nn" in value:
        return _decode_torch(value, where)
    if "constraint" in value:
        make = constraint_by_name(field(value, "constraint", str))
        if make is None:
            raise SavedFileError(f"{where}: {value['constraint']!r} is no constraint. {DAMAGED}")
        return _call(make, decode(field(value, "arguments", list), where), {}, where)
    name = field(value, "class", str)
    if name not in _registry():
        raise SavedFileError(
            f"{where}: expected a class that this pyroflows knows ({', '.join(_registry())}), got "
            f"{name!r}. Update pyroflows if a newer one wrote the file."
        )
    arguments = field(value, "arguments", dict)
    kwargs = {key: decode(item, f"{where}.{key}") for key, item in arguments.items()}
    return _call(_registry()[name], [], kwargs, f"{where}: {name}")


def _decode_torch(value: Record, where: str) -> Any:
    name = field(value, "torch.nn", str)
    cls: Any = getattr(nn, name, None)
    if not _is_torch_module(cls):
        raise SavedFileError(f"{where}: {name!r} is not a module class of torch.nn. {DAMAGED}")
    if "args" not in value:
        return cls
    args = decode(field(value, "args", list), where)
    kwargs = field(value, "kwargs", dict)
    return functools.partial(cls, *args, **{key: decode(v, where) for key, v in kwargs.items()})


def _call(function: Callable[..., Any], args: list[Any], kwargs: Record, where: str) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:  # of whatever kind: the arguments may be anything
        raise SavedFileError(
            f"{where}: cannot be built from the arguments in the file ({error}). {DAMAGED}"
        ) from error


# --- state ----------------------------------------------------------------------------------------


def describe(flow: Flow) -> tuple[Record, dict[str, Tensor]]:
    """How to build the flow, as JSON, and copies of its parameters and buffers on the CPU.

    Raises
    ------
    TypeError
        If the description could not give the flow back.
    ValueError
        If the flow is on the meta device.
    """
    record = {"flow": encode(flow, type(flow).__name__), **_state(flow)}
    tensors = _tensors(flow, record)
    _check_faithful(flow, record, tensors)
    return record, tensors


def _state(flow: Flow) -> Record:
    """What the tensors' values do not say, as JSON."""
    shared: dict[int, list[str]] = {}
    for name, tensor in flow.state_dict(keep_vars=True).items():
        shared.setdefault(id(tensor), []).append(name)
    modes = flow.named_modules()
    return {
        "whitening": flow.transform.standardization.rank,
        "dtype": str(flow.dtype).removeprefix("torch."),
        "frozen": [name for name, p in flow.named_parameters() if not p.requires_grad],
        "tied": [names for names in shared.values() if len(names) > 1],
        "training": flow.training,
        "training_differs": [name for name, m in modes if m.training != flow.training],
    }


def _tensors(flow: Flow, record: Record) -> dict[str, Tensor]:
    """Copies on the CPU without aliases, shared ones once."""
    repeated = {name for names in record["tied"] for name in names[1:]}
    tensors = {k: v for k, v in flow.state_dict().items() if k not in repeated}
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(
            f"{meta[0]} is on the meta device and has no values to save: move the flow with "
            "flow.to_empty(device=...) and load values first"
        )
    return {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def digest(record: Record, tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of the whole content, but for the record's own ``sha256``."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    content = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def build(record: Record) -> Flow:
    """A flow as the record describes it, on the CPU, its values not yet set.

    Raises
    ------
    SavedFileError
        If the record is not such a description.
    """
    dtype = field(record, "dtype", str)
    if dtype not in DTYPES:
        raise SavedFileError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    with forked_rng(), torch.device("cpu"):
        flow = decode(field(record, "flow", dict), "flow")
    if not isinstance(flow, Flow):
        raise SavedFileError(f"flow: expected a flow, got {type(flow).__name__}. {DAMAGED}")
    flow.to(dtype=DTYPES[dtype])
    rank = field(record, "whitening", int)
    if rank:
        _call(flow.transform.whiten_, [rank], {}, "whitening")
    _tie(flow, record)
    known = {
        "frozen": {name for name, _ in flow.named_parameters()},
        "training_differs": {name for name, _ in flow.named_modules()},
    }
    for key, names in known.items():
        for name in _names(record, key):
            if name not in names:
                raise SavedFileError(f"{key}: {type(flow).__name__} has no {name!r}. {DAMAGED}")
    field(record, "training", bool)
    return flow


def _tie(flow: Flow, record: Record) -> None:
    """Make shared tensors one again; moving a module separates its buffers."""
    state = flow.state_dict(keep_vars=True)
    groups = [_names({"tied": group}, "tied") for group in field(record, "tied", list)]
    if len({name for names in groups for name in names}) != sum(map(len, groups)):
        raise SavedFileError(f"tied: expected each name once, got {groups!r:.80}. {DAMAGED}")
    for names in groups:
        like = {
            (type(state[n]), state[n].shape, state[n].dtype) if n in state else None for n in names
        }
        if len(like) != 1 or None in like:
            raise SavedFileError(f"tied: {names} cannot be one tensor. {DAMAGED}")
        for name in names[1:]:
            owner, _, attribute = name.rpartition(".")
            setattr(flow.get_submodule(owner), attribute, state[names[0]])


def check_tensors(flow: Flow, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless these are the flow's tensors: all, no other, each of its shape and dtype."""
    repeated = {name for names in record["tied"] for name in names[1:]}
    expected = {k: v for k, v in flow.state_dict().items() if k not in repeated}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} does not belong there" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        want, got = expected[name], tensors[name]
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            problems.append(
                f"{name}: expected shape {tuple(want.shape)} of {want.dtype}, got shape "
                f"{tuple(got.shape)} of {got.dtype}"
            )
    if problems:
        raise SavedFileError(
            f"the tensors are not the {len(expected)} of the {type(flow).__name__} that the file "
            f"describes, {len(problems)} problem(s): {'; '.join(sorted(problems)[:3])}. {DAMAGED}"
        )


def _check_faithful(flow: Flow, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Raise `TypeError` unless the description builds a flow like this one."""
    try:
        again = build(record)
        check_tensors(again, record, tensors)
        problem = ""
    except SavedFileError as error:
        problem = str(error).removesuffix(DAMAGED).strip()
    else:
        modules = dict(again.named_modules(remove_duplicate=False))
        for name, module in flow.named_modules(remove_duplicate=False):
            if type(modules.get(name)) is not type(module):
                problem = f"{name} is now a {type(module).__name__}"
    if problem:
        raise TypeError(
            f"{type(flow).__name__}: its constructor's arguments no longer describe it ({problem})."
            " Construct the flow as it is meant to be, or store flow.state_dict() alone."
        )


@torch.no_grad()
def restore(flow: Flow, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Give a flow that was checked the file's values and flags, in place."""
    _tie(flow, record)
    state = flow.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(name not in record["frozen"])
    flow.train(record["training"])
    for name in record["training_differs"]:
        flow.get_submodule(name).training = not record["training"]
