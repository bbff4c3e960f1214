"""A function of one point without its Python: traced, folded, and compared with the original."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.errors import first_line

logger = logging.getLogger(__name__)

ValueAndGrad = Callable[[Tensor], tuple[Tensor, ...]]


def compiled(function: ValueAndGrad, probes: Tensor) -> ValueAndGrad:
    """The function's tensor operations alone, gradients included; several times faster.

    A model and a flow of small tensors spend nearly all their time in Python: in Pyro's handlers,
    in modules, in autograd. All that is the same at every point, so the operations are recorded
    once, those that do not depend on the point are done in advance, and TorchScript replays the
    rest, without holding Python's global lock. Control flow that depends on values cannot be
    recorded: it raises while recording. What was recorded is compared with the function at all
    probes; where it differs, or nothing could be recorded, the function itself is returned, with a
    message.

    Parameters
    ----------
    function
        From a point ``(D,)`` to tensors, such as a scalar and its gradient.
    probes
        Points ``(P, D)`` to compare at.
    """
    expected = [function(probe) for probe in probes]
    trouble = ""
    for build in (_scripted, _recorded):
        try:
            record = build(function, probes[0])
            with torch.no_grad():
                # Twice, because TorchScript optimises after having seen a call.
                found = [[record(probe) for probe in probes] for _ in range(2)][1]
        except Exception as error:  # of whatever kind: the function itself is still there
            trouble = first_line(error)
            continue
        if all(map(_agree, found, expected)):
            return _replayed(record, function)
        trouble = "what was recorded gives other values"
    logger.warning(
        "The model's log density cannot be recorded (%s): it is evaluated step by step, which is "
        "several times slower.",
        trouble,
    )
    return function


def _recorded(function: ValueAndGrad, example: Tensor) -> Any:
    def plain(z: Tensor) -> tuple[Tensor, ...]:
        return function(z)  # make_fx takes the self of a bound method for an argument

    return _folded(make_fx(plain)(example))


def _scripted(function: ValueAndGrad, example: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its tracer warns of what is compared here
        return torch.jit.trace(_recorded(function, example), example, check_trace=False)


def _replayed(record: Any, function: ValueAndGrad) -> ValueAndGrad:
    one_at_a_time = threading.Lock()  # a record may be replayed in many threads, Pyro may not

    def call(z: Tensor) -> tuple[Tensor, ...]:
        try:
            with torch.no_grad():
                found: tuple[Tensor, ...] = record(z)
        except RuntimeError:  # a matrix without a factor, which the function knows to score
            with one_at_a_time:
                return function(z)
        return found

    return call


@torch.no_grad()
def _folded(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with all that does not depend on its input computed."""
    nodes = list(module.graph.nodes)
    if any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in nodes):
        return module  # what is computed once may not be changed in place at every call
    known: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        elif node.op == "call_function" and all(i in known for i in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            value = known[node] = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                name = f"_known_{len(known)}"
                module.register_buffer(name, value)
                with module.graph.inserting_before(node):
                    constant = module.graph.get_attr(name)
                node.replace_all_uses_with(constant)
                known[constant] = value
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    # Operations may be reordered, so rounding may differ; a wrong record differs by far more.
    rtol = 1e4 * torch.finfo(expected[0].dtype).eps
    scale = max(float(e.abs().nan_to_num(0, 0, 0).max()) for e in expected)
    return all(
        f.shape == e.shape
        and torch.allclose(f, e, rtol=rtol, atol=rtol * (1 + scale), equal_nan=True)
        for f, e in zip(found, expected, strict=True)
    )
