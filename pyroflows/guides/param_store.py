"""Guides and Pyro's param store: stable names, adoption of stored values, nothing silent."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pyro
import torch
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyroflows.errors import ParamStoreError

logger = logging.getLogger(__name__)

_owners: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _is_free(name: str, guide: Any) -> bool:
    owner = _owners.get(name)
    if owner is not None and owner is not guide:
        # Guides sit in reference cycles: one that nobody holds may not be collected yet.
        gc.collect()
        owner = _owners.get(name)
    return owner is None or owner is guide or _is_cleared(owner)


def _is_cleared(guide: nn.Module) -> bool:
    """Whether the guide has parameters and none of them is in the store (any more)."""
    store = pyro.get_param_store()
    parameters = list(guide.parameters())
    return bool(parameters) and all(store.param_name(p) is None for p in parameters)


def claim(name: str, guide: Any, stem: str) -> str:
    """Take a name for a live guide: ``name``, or the next free one of its stem.

    Parameters
    ----------
    name
        The name wished for.
    guide
        Who takes it; the name is free again when the guide is gone, or the store was cleared.
    stem
        What to number (``stem_1``, ``stem_2``, ...) where the name belongs to another live guide.
    """
    taken, number = name, 0
    while not _is_free(taken, guide):
        number += 1
        taken = f"{stem}_{number}"
    if taken != name:
        logger.warning(
            "the name %r belongs to another live guide: this one is called %r", name, taken
        )
    _owners[taken] = guide
    return taken


def enter(guide: Any, *parts: str) -> None:
    """Bring a guide's modules and the param store together, under a name that it owns.

    Parameters
    ----------
    guide
        A Pyro module with the name that it took last and the stem of its names.
    *parts
        Names of its modules.
    """
    if pyro.settings.get("module_local_params"):
        return
    if guide._pyro_name != guide._own_name:
        # A parent module or guide list has given it another.
        guide._stem = guide._pyro_name
    guide._own_name = guide._pyro_name = claim(guide._pyro_name, guide, guide._stem)
    for part in parts:
        adopt(guide._pyro_get_fullname(part), guide._modules[part])


def adopt(name: str, module: nn.Module) -> None:
    """Bring a module and the param store's entries under its name together, as ``pyro.module``.

    Entries that are not the module's own tensors (from a loaded store, or a guide that is gone) are
    copied into the module, buffers too; the store then holds the module's tensors. Buffers are kept
    in the store so that its ``save`` and ``load`` restore all that the guide needs.

    Raises
    ------
    ParamStoreError
        If a stored tensor has another shape; nothing has been changed then.
    """
    store = pyro.get_param_store()
    tensors = {
        param_with_module_name(name, key): value
        for key, value in (*module.named_parameters(), *module.named_buffers())
        if value.requires_grad or not isinstance(value, nn.Parameter)
    }
    # The very tensors that the store holds, before any constraint.
    entries = dict(store.named_parameters())
    stored = {key: entries[key] for key in tensors if key in entries}
    foreign = [
        key for key in stored if tensors[key].requires_grad and stored[key] is not tensors[key]
    ]
    if foreign:
        _check_shapes(name, stored, tensors)
        with torch.no_grad():
            for key, value in stored.items():
                tensors[key].copy_(value)
        for key in foreign:
            del store[key]
            store[key] = tensors[key]
        logger.warning("%s: %d parameters taken from the param store", name, len(foreign))
    for key, value in tensors.items():
        if value.requires_grad:
            # One by one: pyro.module would warn of each frozen parameter at each call.
            pyro.param(key, value)
        else:
            _keep_buffer(store, key, value, stored.get(key))


def _check_shapes(name: str, stored: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for key, value in stored.items():
        if value.shape != tensors[key].shape:
            raise ParamStoreError(
                f"{key}: the param store holds shape {tuple(value.shape)}, the module expects "
                f"{tuple(tensors[key].shape)}. Give the guide another name than {name!r}, or call "
                "pyro.clear_param_store() if the stored parameters are not needed."
            )


def _keep_buffer(store: Any, key: str, value: Tensor, known: Tensor | None) -> None:
    """An alias of the buffer as a store entry; of integers a copy, as the store takes floats."""
    copied = not value.is_floating_point()
    entry = value.to(torch.float32) if copied else value.detach()
    if known is not None and known.device == entry.device:
        kept = torch.equal(known, entry) if copied else known.data_ptr() == entry.data_ptr()
        if kept:
            return
    store[key] = entry
