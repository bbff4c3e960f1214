"""Rows for maximum likelihood: checked, split, in minibatches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader

from pyroflows.errors import DataError, check_event
from pyroflows.flows.supports import check_support, rows_at_ends
from pyroflows.training.processes import gathered, world

#: Fewer rows than this cannot be split into training and validation.
MIN_ROWS = 10

Batch = tuple[Tensor, "Tensor | None"]
Rows = TypeVar("Rows", bound="tuple[Tensor | None, ...]")


def as_rows(name: str, value: Any, event_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Anything array-like as ``(rows, *event_shape)`` of a dtype, all finite.

    Raises
    ------
    DataError
        If it is not numeric, or not finite (with the count and the first row).
    ShapeError
        If the rightmost dimensions are not the event.
    """
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: expected numbers, got an array of dtype {array.dtype}")
        # A copy: the array may be read-only, of the other byte order, or of more precision.
        kind = array.dtype if array.dtype in (np.float32, np.float64) else np.float64
        value = torch.from_numpy(np.array(array, dtype=kind))
    elif value.is_complex():
        raise DataError(f"{name}: expected real numbers, got a tensor of {value.dtype}")
    check_event(name, value, event_shape)
    rows = value.detach().reshape(-1, *event_shape).to(dtype)
    bad = ~rows.isfinite().flatten(1).all(1)
    if bad.any():
        raise DataError(
            f"{name}: {int(bad.sum())} of {len(rows)} rows are not finite, the first is row "
            f"{int(bad.nonzero()[0])}. Remove or impute them."
        )
    return rows


def warn_about_columns(x: Tensor, support: Any) -> None:
    """Warn of columns to which a density can give unbounded likelihood."""
    columns = x.flatten(1)
    parts = support.cseq if isinstance(support, constraints.stack) else [support]
    dense = torch.tensor([not part.is_discrete for part in parts], device=x.device)
    constant = (columns == columns[:1]).all(0) & dense
    whole = (columns == columns.round()).all(0) & dense & ~constant
    for found, problem, advice in (
        (constant, "constant", "remove it"),
        (whole, "integer-valued", "add uniform noise in [0, 1) to it"),
    ):
        if found.any():
            listed = found.nonzero().flatten().tolist()
            warnings.warn(
                f"column {', '.join(map(str, listed))} of x is {problem}: a density on it can grow "
                f"without bound, and likelihoods do not compare; {advice}.",
                stacklevel=5,
            )
    at_end = rows_at_ends(x, support)
    if at_end:
        warnings.warn(
            f"{at_end} rows of x have values at the end of their support, which are scored as the "
            "nearest number inside and lie far out in unconstrained units; move them inward.",
            stacklevel=5,
        )


class Epochs:
    """Batches of epoch after epoch without end, which can go on from where they were.

    Parameters
    ----------
    epoch
        The batches of one epoch, shuffled by the generator.
    generator
        Random numbers that belong to these batches alone.
    """

    def __init__(
        self,
        epoch: Callable[[torch.Generator], Iterable[tuple[Any, ...]]],
        generator: torch.Generator,
    ) -> None:
        self.epoch, self.generator = epoch, generator
        self._begin()

    def _begin(self) -> None:
        self._start, self._given = self.generator.get_state(), 0
        self._batches = iter(self.epoch(self.generator))

    def __iter__(self) -> Epochs:
        return self

    def __next__(self) -> tuple[Any, ...]:
        batch = next(self._batches, None)
        if batch is None:
            self._begin()
            batch = next(self._batches)
        self._given += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where the batches are."""
        return {"generator": self._start, "given": self._given}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there; the batches of the epoch so far are made again."""
        self.generator.set_state(state["generator"])
        self._begin()
        for _ in range(state["given"]):
            next(self)


def minibatches(
    rows: tuple[Tensor | None, ...], batch_size: int, generator: torch.Generator
) -> Epochs:
    """Shuffled minibatches without end; a ragged last batch is kept where there is no other.

    Several processes with the same generator share out each batch.
    """
    x = cast("Tensor", rows[0])
    size = min(batch_size, len(x))
    rank, count = world()
    if size < count:
        raise ValueError(
            f"batch_size: expected at least a row for each of {count} processes, got {size}"
        )

    def epoch(generator: torch.Generator) -> Iterator[tuple[Tensor | None, ...]]:
        order = torch.randperm(len(x), generator=generator, device="cpu").to(x.device)
        for index in order.split(size):
            if len(index) == size:
                yield take(rows, index[rank::count])

    return Epochs(epoch, generator)


class LoaderRows:
    """A DataLoader as batches of rows on the flow's device."""

    def __init__(self, loader: DataLoader[Any], flow: Any) -> None:
        self.loader = loader
        self.flow = flow

    def __iter__(self) -> Iterator[Batch]:
        number = -1
        for number, item in enumerate(self.loader):
            parts = list(item) if isinstance(item, (list, tuple)) else [item]
            if len(parts) > 2:
                raise DataError(f"DataLoader: expected x or (x, context), got {len(parts)} tensors")
            yield rows_of(
                self.flow, parts[0], parts[1] if len(parts) == 2 else None, f"batch {number}: "
            )
        if number < 0:
            raise DataError(
                "the DataLoader gave no batch. It is read for the standardisation and again in "
                "every epoch: its data set must be one that can be read repeatedly."
            )

    def endless(self) -> Iterator[Batch]:
        """Epoch after epoch."""
        while True:
            yield from self


def rows_of(flow: Any, x: Any, context: Any, prefix: str = "") -> Batch:
    """Rows and contexts for a flow, checked, on its device."""
    x = as_rows(f"{prefix}x", x, flow.event_shape, flow.dtype).to(flow.device)
    check_support(f"{prefix}x", x, flow.support)
    if context is None or not flow.context_size:
        # Raises for a context that is missing, or not expected.
        flow.transform.check_context(None if context is None else torch.as_tensor(context))
        return x, None
    context = as_rows(f"{prefix}context", context, (flow.context_size,), flow.dtype)
    if len(context) != len(x):
        raise DataError(
            f"{prefix}context: expected one row for each of the {len(x)} rows of x, got "
            f"{len(context)}"
        )
    return x, context.to(flow.device)


def take(rows: Rows, index: Tensor) -> Rows:
    """Some of the rows, with their contexts."""
    return cast("Rows", tuple(None if part is None else part[index] for part in rows))


def location_and_scale(batches: Iterable[Batch], which: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over batches; 1 for a column that does not vary.

    Of several processes, over the batches of all. Raises `DataError` where they overflow.
    """
    count, mean, total = _merged(_moments(batch[which]) for batch in batches)
    if world()[1] > 1:
        parts = gathered((count, mean.cpu(), total.cpu()))
        count, mean, total = _merged((n, m.to(mean), t.to(mean)) for n, m, t in parts)
    scale = (total / count).sqrt()
    if not scale.isfinite().all():
        column = (~scale.isfinite()).flatten().nonzero()[0].item()
        raise DataError(
            f"{('x', 'context')[which]}: the variance of column {column} overflows {scale.dtype}. "
            "Correct its values, or give it in other units."
        )
    # Rounding leaves a constant column a deviation of about one unit in the last place.
    constant = scale <= 10 * torch.finfo(scale.dtype).eps * mean.abs()
    return mean, torch.where(constant, torch.ones_like(scale), scale)


#: Number of rows, their mean, and the sum of squares around it.
Moments = tuple[int, Tensor, Tensor]


def _moments(rows: Tensor | None) -> Moments:
    if rows is None:
        raise DataError("the DataLoader gave no context, but the flow has one")
    mean = rows.mean(0)
    return len(rows), mean, ((rows - mean) ** 2).sum(0)


def _merged(parts: Iterable[Moments]) -> Moments:
    """Chan's update: exact for any split, without squares of large means."""
    count, mean, total = 0, torch.zeros(()), torch.zeros(())
    for n, its_mean, its_total in parts:
        if not n:
            continue
        shift = its_mean - mean.to(its_mean)
        share = n / (count + n)
        total = total.to(its_mean) + its_total + shift**2 * (count * share)
        mean = mean.to(its_mean) + shift * share
        count += n
    if not count:
        raise DataError("the DataLoader gave no rows")
    return count, mean, total
