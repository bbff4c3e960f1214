"""A device that is not there: its tensors say that they are on it, and have their numbers here.

Operations on tensors of two devices fail as they would with a GPU, and so does NumPy; what the host
reads back is counted. For a process of its own: torch keeps a device for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("privateuseone", 0)
#: Whether this torch can have one.
IS_POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
_ATEN = torch.ops.aten
#: Those that take tensors of two devices.
_ACROSS = {
    _ATEN._to_copy.default,
    _ATEN.copy_.default,
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
}
#: Those that wait for the device.
_READING = {_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.equal.default}


class There(Tensor):
    """A tensor on the device."""

    here: Tensor
    reads = 0
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[There], here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        There.reads += 1
        return self.here.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("NumPy cannot read a device")


class _Factories(TorchDispatchMode):
    """Catches what makes tensors out of none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation with the numbers that are here, and its results there."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, There)}
    asked = kwargs.get("device")
    is_there = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if func is _ATEN.copy_.default:
        is_there = isinstance(args[0], There)
    here = [tensor for tensor in tensors if not isinstance(tensor, There)]
    # Single numbers may come from the CPU.
    if there and func not in _ACROSS and any(tensor.dim() for tensor in here):
        raise RuntimeError(f"{func}: tensors of two devices")
    There.reads += bool(there) and (func in _READING or not is_there)
    if is_there and asked is not None:
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: a generator of the CPU")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
    results = func(*inner[0], **inner[1])
    if is_there and torch.Tag.inplace_view in func.tags:
        with no_dispatch():  # gives what says to be there the new shape too
            func(*args, **kwargs)
    if not is_there:
        return results

    def moved(result: Tensor) -> There:
        # What is changed in place is what was given.
        return there[id(result)] if id(result) in there else There(result)

    return tree_map_only(Tensor, moved, results)


@cache
def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend("elsewhere")


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, for as long as it is needed."""
    _register()
    # As inside torch's own modes: numbers become tensors of the CPU first, and are moved by _run.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Factories():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def reads(function: Callable[[], object]) -> int:
    """How often the host waits for the device."""
    before = There.reads
    function()
    return There.reads - before
