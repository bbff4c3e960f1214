"""Trainable parameters inside SVI must be known to Pyro's param store: an error, not silence."""

from __future__ import annotations

import pyro
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn

from pyroflows.errors import UnregisteredParametersError


def _captures_parameters() -> bool:
    """Whether an SVI step is collecting the parameters that it will train."""
    return any(isinstance(h, TraceMessenger) and h.param_only for h in _PYRO_STACK)


def check_registered(module: nn.Module) -> None:
    """Raise where Pyro's SVI would leave trainable parameters of ``module`` untrained.

    Outside of SVI, and with Pyro's module-local parameters, there is nothing to check.
    """
    if not _PYRO_STACK or not _captures_parameters():
        return
    if pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()
    lost = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and store.param_name(parameter) is None
    ]
    if lost:
        raise UnregisteredParametersError(
            f"{type(module).__name__}: {len(lost)} trainable parameter(s) are not in Pyro's param "
            f"store, so this SVI step would not train them (the first is {lost[0]!r}). Register "
            "the flow before use with pyro.module('name', flow), or make it an attribute of a "
            "PyroModule; freeze it with flow.requires_grad_(False) if it must not train. If "
            "another module's parameters are stored under that name, choose a different name or "
            "call pyro.clear_param_store(); to continue from stored ones use "
            "pyro.module('name', flow, update_module_params=True)."
        )
