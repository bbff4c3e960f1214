"""An amortised guide as tensors with a description, and back into a guide made anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import SavedFileError
from pyroflows.guides.amortized import AutoAmortizedFlow

Record = dict[str, Any]


def describe_amortized(guide: AutoAmortizedFlow) -> tuple[Record, dict[str, Tensor]]:
    """What identifies the guide, as JSON, and copies of its tensors on the CPU.

    Raises
    ------
    ValueError
        For a guide before its first call.
    """
    if not guide.blocks:
        raise ValueError(
            "the guide does not know its model's latents yet, so there is nothing to save: call "
            "guide(*args) once, or construct it with example_args"
        )
    record = {
        "guide": {"name": guide.name, "blocks": _blocks(guide)},
        "frozen": [name for name, p in guide.named_parameters() if not p.requires_grad],
    }
    state = guide.state_dict()
    return record, {name: value.detach().cpu().clone() for name, value in state.items()}


def restore_amortized(
    guide: AutoAmortizedFlow, record: Record, tensors: Mapping[str, Tensor]
) -> None:
    """Give a guide that has met its model the values of a saved one, in place.

    Raises
    ------
    SavedFileError
        If its latents, flows or encoders are others, with the first difference.
    """
    saved = record["guide"]["blocks"]
    if saved != _blocks(guide):
        raise SavedFileError(
            f"the guide was saved with the latents {_shown(saved)}, this one has "
            f"{_shown(_blocks(guide))}. Construct it with the model and encoders of the saved one, "
            "and pass arguments of its shapes."
        )
    state = guide.state_dict()
    for name in (*state, *tensors):
        if name not in tensors or name not in state or tensors[name].shape != state[name].shape:
            had, has = (_shape(values.get(name)) for values in (tensors, state))
            raise SavedFileError(
                f"{name}: {had} in the file, {has} in this guide. Construct the guide with the "
                "encoders and the flow of the saved one."
            )
        if tensors[name].dtype != state[name].dtype:
            raise SavedFileError(
                f"{name}: {tensors[name].dtype} in the file, {state[name].dtype} in this guide. "
                "Pass arguments of the saved guide's dtype."
            )
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(tensors[name])
    for name, parameter in guide.named_parameters():
        parameter.requires_grad_(name not in record["frozen"])


def _blocks(guide: AutoAmortizedFlow) -> list[Any]:
    return [[b.key, [[n, list(shape)] for n, shape in b.shapes.items()]] for b in guide.blocks]


def _shown(blocks: list[Any]) -> str:
    sites = [f"{name!r} {tuple(shape)}" for _, shapes in blocks for name, shape in shapes]
    return ", ".join(sites)


def _shape(value: Tensor | None) -> str:
    return "not there" if value is None else f"shape {tuple(value.shape)}"
