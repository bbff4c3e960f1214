"""Simulations from a model's own prior: at once where it broadcasts, else one by one."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyroflows.diagnostics.predictions import Program, isolated
from pyroflows.errors import FitError
from pyroflows.numerics import forked_rng

Model = Callable[..., Any]
Values = dict[str, Tensor]

#: Simulations of one vectorised run of the model.
AT_ONCE = 10_000
#: Simulations of one task of a worker process.
TASK = 50


@dataclass(frozen=True)
class Simulations:
    """Draws of latents and data from a model.

    Attributes
    ----------
    values
        ``{site: (count, *shape)}``, only of simulations that succeeded.
    failures
        How many simulations failed, by reason.
    vectorized
        Whether the model broadcast over simulations.
    seconds
        Wall time.
    """

    values: Mapping[str, Tensor] = field(repr=False)
    failures: Mapping[str, int]
    vectorized: bool
    seconds: float

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def failed(self) -> int:
        """Number of simulations that failed."""
        return sum(self.failures.values())

    def __str__(self) -> str:
        how = "at once" if self.vectorized else "one by one"
        lines = [f"{len(self)} simulations in {self.seconds:.1f} s, {how}"]
        lines += [f"  {count} failed: {reason}" for reason, count in self.failures.items()]
        return "\n".join(lines)

    def joined(self, other: Simulations) -> Simulations:
        """These simulations and others."""
        values = {name: torch.cat([v, other.values[name]]) for name, v in self.values.items()}
        return Simulations(
            values,
            dict(Counter(self.failures) + Counter(other.failures)),
            self.vectorized and other.vectorized,
            self.seconds + other.seconds,
        )


def simulate(
    model: Model,
    *args: Any,
    sites: Sequence[str],
    count: int,
    given: Mapping[str, Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    vectorized: bool | None = None,
    workers: int = 0,
    max_failed: float = 0.1,
    seed: int | None = None,
) -> Simulations:
    """Draw sites of a model jointly.

    All draws are made at once, in a plate around the model, where the model broadcasts: two of them
    are compared with runs alone, which a simulator with random numbers of its own cannot pass. It
    is trusted where you say ``vectorized=True``. Where the model does not broadcast, it runs once
    for each draw, with a seed of its own: the same draws come from any number of worker processes.
    A run that raises, or gives a number that is not finite, is left out and counted.

    Parameters
    ----------
    model
        The model.
    *args
        Its arguments.
    sites
        The sites whose values are wanted.
    count
        Number of simulations.
    given
        Values ``{site: (count, *shape)}`` to run the model at; other sites are drawn.
    model_kwargs
        The model's keyword arguments.
    vectorized
        Whether the model broadcasts over simulations; None to find out.
    workers
        Worker processes for a model that does not broadcast; 0 for none.
    max_failed
        Largest share of failures.
    seed
        Seed of torch, NumPy and Python inside the model; the global states are left alone.

    Raises
    ------
    FitError
        If more than the allowed share failed, with the reasons.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 1.0))
    >>> simulate(model, sites=["z", "y"], count=100, seed=0).values["y"].shape
    torch.Size([100])
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 simulation, got {count}")
    if not 0 <= max_failed < 1:
        raise ValueError(f"max_failed: expected a share in [0, 1), got {max_failed}")
    start = time.perf_counter()
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    task = _Tasks(model, args, dict(model_kwargs or {}), tuple(sites), count, given or {}, seed)
    values = None if vectorized is False else task.at_once(trust=vectorized is True)
    failures: Counter[str] = Counter()
    if values is None:
        parts = []
        loader = DataLoader(task, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
        with _own_seeds():
            for part, reasons in loader:
                parts += [part] if part else []
                failures.update(reasons)
        found = {name: torch.cat([p[name] for p in parts]) for name in sites} if parts else {}
    else:
        found, reasons = _finite(values)
        failures.update(reasons)
    if failures.total() > max_failed * count or not found:
        listed = "; ".join(f"{n} times {reason}" for reason, n in failures.most_common(3))
        raise FitError(
            f"{failures.total()} of {count} simulations failed, and max_failed={max_failed} allows "
            f"{int(max_failed * count)}: {listed}. Mend the simulator, narrow the prior, or raise "
            "max_failed."
        )
    seconds = time.perf_counter() - start
    return Simulations(found, dict(failures.most_common()), values is not None, seconds)


@dataclass
class _Tasks(Dataset[Any]):
    """Simulations in tasks of a few, each with a seed of its own."""

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sites: tuple[str, ...]
    count: int
    given: Mapping[str, Tensor]
    seed: int

    def __len__(self) -> int:
        return math.ceil(self.count / TASK)

    def __getitem__(self, task: int) -> tuple[Values, Counter[str]]:
        """The simulations of a task that succeeded, and reasons of those that did not."""
        rows: list[Values] = []
        reasons: Counter[str] = Counter()
        for number in range(task * TASK, min((task + 1) * TASK, self.count)):
            try:
                row = self._one(number)
            except Exception as error:  # a simulator fails in whatever way: it is counted
                reasons[f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"] += 1
                continue
            bad = [name for name, value in row.items() if not value.isfinite().all()]
            if bad:
                reasons[_not_finite(bad[0])] += 1
            else:
                rows.append(row)
        # Stacked: a worker's reply is then a few tensors.
        return (
            {n: torch.stack([row[n] for row in rows]) for n in self.sites} if rows else {}
        ), reasons

    def _one(self, number: int) -> Values:
        pyro.set_rng_seed(int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0]))
        here = {name: value[number] for name, value in self.given.items()}
        with torch.no_grad(), poutine.block():
            model = poutine.condition(self.model, data=here)
            nodes: Any = poutine.trace(model).get_trace(*self.args, **self.kwargs).nodes
        return {name: torch.as_tensor(nodes[name]["value"]) for name in self.sites}

    def at_once(self, trust: bool) -> Values | None:
        """All simulations from runs that broadcast; None where the model does not."""
        parts = []
        try:
            with isolated(), _own_seeds(), poutine.block():
                pyro.set_rng_seed(self.seed)
                first = {name: value[0] for name, value in self.given.items()}
                program = Program(self.model, self.args, self.kwargs, first)
                for begin in range(0, self.count, AT_ONCE):
                    size = min(AT_ONCE, self.count - begin)
                    part = {name: v[begin : begin + size] for name, v in self.given.items()}
                    parts.append(program.vectorized(part, size, self.sites, trust=trust).values)
        except Exception:  # as above
            if trust:
                raise
            # Whatever it is, single runs will tell which simulations it concerns.
            return None
        return {name: torch.cat([part[name] for part in parts]) for name in self.sites}


def _finite(values: Values) -> tuple[Values, Counter[str]]:
    """The rows in which all is finite, and the reasons for the others."""
    count = len(next(iter(values.values())))
    usable = torch.ones(count, dtype=torch.bool)
    reasons: Counter[str] = Counter()
    for name, value in values.items():
        bad = ~value.reshape(count, -1).isfinite().all(1) & usable
        if bad.any():
            reasons[_not_finite(name)] += int(bad.sum())
            usable &= ~bad
    if not usable.any():
        return {}, reasons
    return {name: value[usable] for name, value in values.items()}, reasons


def _not_finite(site: str) -> str:
    return f"site {site!r} is not finite"


def _as_it_is(value: Any) -> Any:
    return value


@contextmanager
def _own_seeds() -> Iterator[None]:
    """Put the random states of NumPy and Python back at the end, and torch's."""
    numpy_state, state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with forked_rng():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(state)


class _Stop(Exception):  # noqa: N818  (no error)
    """All sites that were wanted have been drawn."""


class _StopAfter(Messenger):
    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.missing = set(sites)

    def _pyro_post_sample(self, msg: Any) -> None:
        self.missing.discard(msg["name"])
        if not self.missing:
            raise _Stop


def only(model: Model, sites: Collection[str]) -> Model:
    """A model that ends once these sites are drawn, so that no simulator runs after them."""

    def shortened(*args: Any, **kwargs: Any) -> None:
        try:
            with _StopAfter(sites):
                model(*args, **kwargs)
        except _Stop:
            return

    return shortened
