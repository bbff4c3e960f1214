"""Recorded operations: compiled, captured as a CUDA graph, and evaluated in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

#: Random numbers as in eager mode. By default Inductor inlines what several operations read, and
#: unrolls sums over bins: a third of the time to compile is left without, and steps are as fast.
OPTIONS = {"fallback_random": True, "unroll_reductions_threshold": 1, "realize_reads_threshold": 2}

#: Runs before a capture, in which libraries set up what they need.
WARM_UP = 3


def record(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The tensor operations of a function; branches on values raise."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)(*inputs)


def inductor(recorded: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Recorded operations compiled by Inductor, random numbers drawn as in eager mode."""
    from torch import _inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor keeps what it has compiled for other processes only where it knows of symbolic
    # shapes, of which there are none here.
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with _inductor.config.patch(OPTIONS), tracing(context):
        return cast("Callable[..., Any]", _inductor.compile(recorded, list(inputs)))


def captured(
    step: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], kept: int
) -> Callable[..., tuple[Tensor, ...]]:
    """A compiled step as one CUDA graph, which a single launch replays.

    The first ``kept`` inputs are read and updated where they are, in every replay; the others are
    copied into places of the graph's own. Raises where the graph would not do what the step does.
    """
    fixed, places = list(inputs[:kept]), [tensor.clone() for tensor in inputs[kept:]]
    with torch.cuda.device(inputs[0].device):
        random, aside = torch.get_rng_state(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                step(*(tensor.clone() for tensor in (*fixed, *places)))
        torch.cuda.current_stream().wait_stream(aside)
        if not torch.equal(torch.get_rng_state(), random):
            raise RuntimeError("random numbers of the CPU, which a graph would repeat")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step(*fixed, *places)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        for place, new in zip(places, given[kept:], strict=True):
            place.copy_(new)
        graph.replay()
        # The next replay writes to the same outputs.
        return tuple(output.clone() for output in outputs)

    return replay


@torch.no_grad()
def in_double(recorded: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """Recorded operations in double precision, with the random numbers of single precision."""
    if inputs[0].dtype == torch.float64:
        return recorded(*inputs)
    return _InDouble(recorded).run(*map(_double, inputs))


def _double(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


class _InDouble(fx.Interpreter):
    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _double(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            # In double precision the generator would give other numbers.
            args, kwargs = tree_map(_single, (args, kwargs))
            return tree_map(_double, super().call_function(target, args, kwargs))
        args, kwargs = tree_map(_double, (args, kwargs))
        return super().call_function(target, args, kwargs)
