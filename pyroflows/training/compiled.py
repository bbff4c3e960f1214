"""A training step as one compiled graph: loss, gradient and Adam's update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyroflows.errors import first_line
from pyroflows.nn.swap import swapped
from pyroflows.numerics import forked_rng
from pyroflows.numerics.concrete import recording
from pyroflows.training.adam import BETA1, BETA2, EPS, Adam
from pyroflows.training.processes import world
from pyroflows.training.recorded import captured, in_double, inductor, record
from pyroflows.training.repay import Repay, count_operations
from pyroflows.training.watch import Watch

logger = logging.getLogger(__name__)

Batch = tuple[Any, ...]
Compile = bool | Literal["auto"]
#: How far compiled gradients may be from those of float64 and from eager ones, relative to their
#: norm and in units of the square root of the dtype's rounding: about 0.003 in float32.
TOLERANCE = 10.0
#: Steps at which the loss may be undefined, by draws without a density, before all are eager.
TRIES = 20


class CompiledStep:
    """Steps of Adam with clipped gradients, without Python between a step's operations.

    The operations of loss, backward pass and update are recorded once and compiled by Inductor; on
    a GPU what it makes is captured as a CUDA graph. Parameters and Adam's moments become views of
    three vectors that the graph updates in place, so that module, optimiser and checkpoints see
    every step. A step whose batch has another shape than the first, or whose loss or gradient is
    not finite, is left undone, for the caller to take in eager mode. What cannot be recorded, as
    branches on values, or comes out wrong is left so for good, with a message. One object serves
    one fit: what is no parameter stays as it is.

    Parameters
    ----------
    loss
        From a batch to a scalar. Random numbers are drawn as in eager mode.
    parameters
        What is trained.
    clip_norm
        Largest norm of the gradient.
    repay
        Asked before each step whether to compile now; None for at the first.
    watch
        Whether to look at each step; where not, one that is not finite is left out.

    Attributes
    ----------
    seconds
        What recording, compiling and checking have taken.
    refused
        Why all steps are eager; empty where they are not.
    """

    def __init__(
        self,
        loss: nn.Module,
        parameters: Sequence[Tensor],
        clip_norm: float,
        repay: Repay | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.loss, self.parameters, self.clip_norm = loss, list(parameters), clip_norm
        self.repay, self.watch = repay, watch or Watch()
        self.seconds = 0.0
        self.refused = "several processes average their gradients" if world()[1] > 1 else ""
        self._state: _State | None = None
        self._tries = 0
        self._graph: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._batch: Batch = ()

    @property
    def outcome(self) -> str:
        """What became of the steps, in words."""
        if self.refused:
            return f"not compiled: {self.refused}"
        if self._graph is not None:
            return f"compiled in {self.seconds:.1f} s"
        return f"not compiled: {self.repay.reason if self.repay else 'there was no step'}"

    def take(self, adam: Adam, lr: float, batch: Batch, left: int = 1) -> Tensor | None:
        """One step, ``left`` with those to come; the loss before it, or None: nothing was done.

        Of an unwatched step that did nothing the loss is not finite.
        """
        if self.refused or not self._is_due(left, batch):
            return None
        if self._state is None:
            self._state = _State(adam)
        if self._graph is None:
            self._compile([*self._state.inputs(lr), *_tensors(batch)], batch)
        if self._graph is None or not _alike(batch, self._batch):
            return None
        generators = self._state.generators() if self.watch.on else []
        before = [generator.get_state() for generator in generators]
        loss, _ = self._graph(*self._state.inputs(lr), *_tensors(batch))
        if self.watch.on and not loss.isfinite():
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
            return None
        return loss

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        for parameter in self.parameters:
            parameter.data = parameter.detach().clone()
        self._state = None

    def _is_due(self, left: int, batch: Batch) -> bool:
        """Whether the step is compiled, or to be compiled now."""
        if self.repay is None or self._state is not None:
            return True
        try:
            return self.repay.due(left, lambda: self._operations(batch))
        except Exception as error:  # what cannot be counted cannot be recorded
            self._refuse(error)
            return False

    def _operations(self, batch: Batch) -> int:
        """How many operations the recorded step will have, nearly."""
        flat = _joined([parameter.detach() for parameter in self.parameters])
        with recording(), forked_rng(0):
            return count_operations(lambda: self._value_and_gradient(flat, batch))

    def _compile(self, inputs: list[Tensor], batch: Batch) -> None:
        start = time.perf_counter()
        self._batch, self._tries = batch, self._tries + 1
        validation = Distribution._validate_args
        try:
            if self._is_defined(batch):
                self._graph = self._launched_at_once(self._checked(inputs, batch), inputs)
                logger.info("compiled in %.1f s", time.perf_counter() - start)
        except Exception as error:  # of whatever kind: the eager step is still there
            self._refuse(error)
        finally:
            # Torch's compiler switches the validation of all distributions off.
            Distribution.set_default_validate_args(validation)
        self.seconds += time.perf_counter() - start

    def _refuse(self, error: Exception) -> None:
        self.refused = first_line(error)
        logger.warning(
            "The step cannot be compiled (%s): it is taken operation by operation.", self.refused
        )

    def _is_defined(self, batch: Batch) -> bool:
        """Whether the step can be compared here; raise where it has not been for long."""
        with recording(), forked_rng(self._tries), torch.no_grad():
            defined = bool(self.loss(*batch).isfinite())
        if not defined and self._tries == TRIES:
            raise ArithmeticError(f"the loss is not finite, in each of {TRIES} steps")
        return defined

    def _checked(self, inputs: list[Tensor], batch: Batch) -> Callable[..., Any]:
        """The compiled step; `ArithmeticError` where its gradient is not that of other ways."""

        def copies() -> list[Tensor]:
            return [t.clone() for t in inputs]

        # The same noise, of which it is known that all draws have a density.
        with forked_rng(self._tries):
            eager = self._value_and_gradient(inputs[0].clone(), batch)[1].double()
        with recording(), forked_rng(self._tries), torch.no_grad():
            recorded = record(self._step_of(batch), copies())
        graph = inductor(recorded, copies())
        with forked_rng(self._tries):
            gradient = graph(*copies())[1].double()
        with forked_rng(self._tries):
            exact = in_double(recorded, copies())[1]
        eps = torch.finfo(inputs[0].dtype).eps
        limit = TOLERANCE * eps**0.5 * (eps + exact.norm())
        for name, other in {"eager": eager, "float64's": exact}.items():
            apart = (gradient - other).norm()
            if not apart <= limit:
                raise ArithmeticError(f"its gradient is off the {name} one by {float(apart):.2g}")
        return graph

    def _launched_at_once(
        self, step: Callable[..., Any], inputs: list[Tensor]
    ) -> Callable[..., Any]:
        """On a GPU the step as a CUDA graph, if it can be one."""
        if not inputs[0].is_cuda:
            return step
        try:
            with forked_rng(self._tries), torch.no_grad():
                return captured(step, inputs, kept=len(_State.INPUTS))
        except Exception as error:  # the compiled step is still there
            logger.warning("The compiled step is no CUDA graph (%s).", first_line(error))
            return step

    def _step_of(self, batch: Batch) -> Callable[..., tuple[Tensor, Tensor]]:
        """Loss, NaN where nothing was done, and gradient; flat vectors are updated in place."""

        def step(
            flat: Tensor, mean: Tensor, square: Tensor, counts: Tensor, lr: Tensor, *rows: Tensor
        ) -> tuple[Tensor, Tensor]:
            loss, gradient = self._value_and_gradient(flat, _with_tensors(batch, rows))
            norm = gradient.norm()
            clipped = gradient * (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            count = counts[0].double() + 1
            new_mean = mean.lerp(clipped, 1 - BETA1)
            new_square = BETA2 * square + (1 - BETA2) * clipped.square()
            root = (new_square / (1 - BETA2**count)).sqrt() + EPS
            new_flat = flat - lr / (1 - BETA1**count) * new_mean / root
            usable = (loss + norm).isfinite()
            news = (new_flat, new_mean, new_square, counts + 1)
            for old, new in zip((flat, mean, square, counts), news, strict=True):
                old.copy_(torch.where(usable, new, old))
            return torch.where(usable, loss, torch.nan), gradient

        return step

    def _value_and_gradient(self, flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        parts = [part.detach().requires_grad_() for part in _split(flat, self.parameters)]
        own = {id(parameter) for parameter in self.loss.parameters()}
        strange = sum(id(parameter) not in own for parameter in self.parameters)
        if strange:
            raise NotImplementedError(f"{strange} parameters belong to the model, not to the guide")
        with torch.enable_grad(), swapped(self.loss, self.parameters, parts):
            loss = self.loss(*batch)
            found = torch.autograd.grad(loss, parts, materialize_grads=True)
        return loss.detach(), torch.cat([part.reshape(-1) for part in found])


def compiled_step(
    compile: Compile,
    loss: nn.Module,
    parameters: Sequence[Tensor],
    clip_norm: float,
    sure: bool,
    watch: Watch,
) -> CompiledStep | None:
    """What the option ``compile`` of a fit asks for; see `Repay` for ``sure``."""
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")
    repay = Repay(sure) if compile == "auto" else None
    return CompiledStep(loss, parameters, clip_norm, repay, watch) if compile else None


class _State:
    """Parameters and an Adam's moments as views of flat vectors, one after the other."""

    #: What a step reads and updates in place.
    INPUTS = ("flat", "mean", "square", "counts", "lr")

    def __init__(self, adam: Adam) -> None:
        self.flat = _joined([parameter.detach() for parameter in adam.parameters])
        self.mean, self.square = _joined(adam.means), _joined(adam.squares)
        self.counts = torch.stack(adam.steps)
        self.lr = torch.zeros((), dtype=torch.float64, device=self.flat.device)
        for parameter, value in zip(
            adam.parameters, _split(self.flat, adam.parameters), strict=True
        ):
            parameter.data = value
        adam.means = _split(self.mean, adam.parameters)
        adam.squares = _split(self.square, adam.parameters)
        adam.steps = list(self.counts)

    def inputs(self, lr: float) -> list[Tensor]:
        self.lr.fill_(lr)
        return [getattr(self, name) for name in self.INPUTS]

    def generators(self) -> list[torch.Generator]:
        """Those of which a step may draw."""
        found = [torch.default_generator]
        if self.flat.is_cuda:
            found.append(torch.cuda.default_generators[self.flat.device.index])
        return found


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _tensors(batch: Batch) -> list[Tensor]:
    return [part for part in batch if isinstance(part, Tensor)]


def _with_tensors(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """The batch with other tensors in the places of its own."""
    rest = iter(tensors)
    return tuple(next(rest) if isinstance(part, Tensor) else part for part in batch)


def _alike(batch: Batch, other: Batch) -> bool:
    """Whether two batches have tensors of the same shapes, and are the same beside them."""
    return len(batch) == len(other) and all(
        a.shape == b.shape if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in zip(batch, other, strict=True)
    )
