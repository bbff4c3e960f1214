"""Rows in files that need not fit into memory: ``.npy``, and Parquet by its row groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyroflows.errors import DataError
from pyroflows.flows import Flow
from pyroflows.training.data import Batch, Epochs, rows_of, take
from pyroflows.training.processes import gathered, own_share, world

#: Shares of the memory: rows in training, held-out rows; and rows being read, a block at a time.
TRAINED, HELD, READ = 0.6, 0.1, 1 / 32


@dataclass(frozen=True)
class Block:
    """Rows that lie together in a file, and are read in parts."""

    name: str
    parts: Callable[[], Iterator[Any]]


class RowFile:
    """Rows of data in a file, for `pyroflows.fit_mle`; they need not fit into memory.

    Rows that fill less than the memory are simply read. Of more, the fit keeps as many as fit, from
    blocks of the file in a new random order every epoch, and draws its minibatches from these; the
    rows held out for validation are drawn from all of the file, but fill a tenth of the memory at
    most. The file is read twice before the first step and once an epoch. Of several processes each
    reads blocks of its own.

    Parameters
    ----------
    path
        A ``.npy`` file, which is mapped, or a Parquet file, which is read row group by row group
        (needs pyarrow, the extra ``parquet``); or several files of one kind.
    columns
        What the flow models: names in a Parquet file, numbers in a two-dimensional array; by
        default all that are not context.
    context
        The columns of the context, as in ``columns``.
    memory
        Bytes for rows, those held out and those being read included.

    Raises
    ------
    DataError
        For files of another kind, or columns that they lack.
    ImportError
        Without pyarrow, for Parquet.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/x.npy", np.random.default_rng(0).normal(size=(1000, 3)))
    ...     rows = pf.RowFile(f"{folder}/x.npy", context=[2], memory=2**13)
    ...     fit = pf.fit_mle(pf.RealNVP(2, context=1), rows, steps=20, seed=0, patience=None)
    >>> len(rows), fit.stop_reason
    (1000, 'all steps were done')
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        columns: Sequence[str | int] | None = None,
        context: Sequence[str | int] | None = None,
        memory: int = 2**28,
    ) -> None:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        self.paths = [Path(each) for each in paths]
        kinds = {each.suffix for each in self.paths}
        if len(kinds) != 1 or not kinds <= {".npy", ".parquet"}:
            raise DataError(
                "x: expected .npy files or .parquet files, got "
                f"{', '.join(map(str, self.paths)) or 'none'}. Read other data into an array."
            )
        if memory < 1:
            raise ValueError(f"memory: expected a positive number of bytes, got {memory}")
        self.columns, self.context, self.memory = columns, context, memory
        self._layouts = [_LAYOUTS[each.suffix](each) for each in self.paths]

    def __len__(self) -> int:
        return sum(layout.rows for layout in self._layouts)

    def sizes(self) -> tuple[int, int]:
        """Numbers of columns to model and of the context."""
        columns, context = self._layouts[0].chosen(self.columns, self.context)
        return len(columns), len(context)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.paths))}: {len(self)} rows)"

    def blocks(self, rows: int) -> list[Block]:
        """What is read at a time; an array in blocks of so many rows."""
        return [
            block
            for layout in self._layouts
            for block in layout.blocks(self.columns, self.context, rows)
        ]


class _Npy:
    """A mapped array. It is mapped anew for each block: what a mapping has read stays with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        array = self._open()
        self.shape, self.rows = array.shape, len(array)

    def _open(self) -> Any:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{self.path}: cannot be mapped as an array ({error})") from error
        if not array.ndim:
            raise DataError(f"{self.path}: expected rows, got an array without dimensions")
        return array

    def blocks(self, columns: Any, context: Any, rows: int) -> Iterator[Block]:
        if columns is not None or context is not None:
            columns, context = self.chosen(columns, context)
        for start in range(0, self.rows, rows):
            stop = min(start + rows, self.rows)

            def parts(start: int = start, stop: int = stop) -> Iterator[Any]:
                array = np.array(self._open()[start:stop])
                if columns is None:
                    yield array, None
                else:
                    yield array[:, columns], array[:, context] if context else None

            yield Block(f"{self.path.name}, rows {start} to {stop - 1}: ", parts)

    def chosen(self, columns: Any, context: Any) -> tuple[list[int], list[int]]:
        if len(self.shape) != 2:
            raise DataError(f"{self.path}: expected two dimensions for columns, got {self.shape}")
        return _chosen(self.path, list(range(self.shape[1])), columns, context)


class _Parquet:
    """A Parquet file, a block for each row group."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(
                "x: Parquet files need pyarrow; run pip install 'pyroflows[parquet]'."
            ) from error
        self.path = path
        self._file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16)
        self.rows = self._file.metadata.num_rows

    def chosen(self, columns: Any, context: Any) -> tuple[list[str], list[str]]:
        return _chosen(self.path, self._file.schema_arrow.names, columns, context)

    def blocks(self, columns: Any, context: Any, rows: int) -> Iterator[Block]:
        names = self.chosen(columns, context)
        for group in range(self._file.num_row_groups):

            def parts(group: int = group) -> Iterator[Any]:
                import pyarrow

                wanted = {"columns": [*names[0], *names[1]], "use_threads": False}
                for table in self._file.iter_batches(rows, [group], **wanted):
                    x, c = (_array(table, which) for which in names)
                    yield x, c if names[1] else None
                pyarrow.default_memory_pool().release_unused()

            yield Block(f"{self.path.name}, row group {group}: ", parts)


_LAYOUTS: dict[str, Any] = {".npy": _Npy, ".parquet": _Parquet}


def _chosen(path: Path, all_: list[Any], columns: Any, context: Any) -> tuple[list[Any], list[Any]]:
    """The columns to model, and those of the context."""
    given = list(context or [])
    wanted = [name for name in all_ if name not in given] if columns is None else list(columns)
    missing = [name for name in [*wanted, *given] if name not in all_]
    if missing:
        raise DataError(
            f"{path}: has no column {missing[0]!r}. It has {', '.join(map(str, all_[:20]))}"
            f"{', ...' if len(all_) > 20 else ''}."
        )
    return wanted, given


def _array(table: Any, names: list[str]) -> Any:
    """Columns of an Arrow table as an array; what is missing becomes NaN, which is refused."""
    columns = [table.column(name).to_numpy(zero_copy_only=False) for name in names]
    return np.stack(columns, -1) if columns else None


class FileRows:
    """The rows of a file for one flow: training rows in blocks, and those held out.

    Parameters
    ----------
    file
        The file.
    flow
        Says shape, dtype and device.
    validation
        Share of the rows to hold out.
    seed
        Which rows these are.
    """

    def __init__(self, file: RowFile, flow: Flow, validation: float, seed: int) -> None:
        self.file, self.flow, self.seed = file, flow, seed
        values = flow.event_shape.numel() + flow.context_size
        # With its place in a shuffled order.
        self.row_bytes = values * torch.finfo(flow.dtype).bits // 8 + 8
        # Read in parts, joined, and split.
        self.fits = 3 * len(file) * self.row_bytes <= file.memory
        self.blocks = file.blocks(max(1, int(READ * file.memory / self.row_bytes)))
        rank, count = world()
        if not self.fits and len(self.blocks) < count:
            raise DataError(
                f"{file}: expected at least a block or row group for each of {count} processes, "
                f"got {len(self.blocks)}. Write the file in smaller row groups."
            )
        most = HELD * file.memory / self.row_bytes / max(1, len(file))
        self.share = validation if self.fits else min(validation, most)
        self.own = range(len(self.blocks)) if self.fits else range(rank, len(self.blocks), count)

    def _parts(self, number: int) -> Iterator[tuple[Batch, Tensor]]:
        """The rows of a block in parts, and which of them are held out."""
        block = self.blocks[number]
        generator = torch.Generator().manual_seed((self.seed + number) % 2**62)
        for x, context in block.parts():
            rows = rows_of(self.flow, x, context, block.name)
            held = torch.rand(len(rows[0]), generator=generator, device="cpu") < self.share
            yield rows, held.to(self.flow.device)

    def whole(self) -> Batch:
        """All rows at once."""
        return _joined(
            [rows_of(self.flow, x, c, b.name) for b in self.blocks for x, c in b.parts()]
        )

    def __iter__(self) -> Iterator[Batch]:
        for number in self.own:
            for rows, held in self._parts(number):
                yield take(rows, (~held).nonzero().squeeze(-1))

    def held_out(self) -> Batch | None:
        """The rows that are held out, of this process's blocks."""
        if not self.share:
            return None
        expected = self.share * len(self.file)
        # Made at once: what is kept between what is read would scatter over the memory.
        pool = _Pool(self.flow, int(expected + 6 * expected**0.5) + 6)
        for number in self.own:
            for rows, held in self._parts(number):
                pool.add(take(rows, held.nonzero().squeeze(-1)))
        return pool.rows() if sum(gathered(pool.count)) else None

    def epochs(self, batch_size: int, generator: torch.Generator) -> Epochs:
        """Shuffled minibatches without end."""
        size = own_share(batch_size, "batch_size")
        pool = _Pool(self.flow, max(size, int(TRAINED * self.file.memory / self.row_bytes)))
        return Epochs(lambda generator: self._epoch(pool, size, generator), generator)

    def _epoch(self, pool: _Pool, size: int, generator: torch.Generator) -> Iterator[Batch]:
        pool.count, whole = 0, False
        order = torch.randperm(len(self.own), generator=generator, device="cpu")
        for place in order.tolist():
            for rows, held in self._parts(self.own[place]):
                left = take(rows, (~held).nonzero().squeeze(-1))
                while len(left[0]):
                    left = pool.add(left)
                    if pool.is_full:
                        yield from pool.drawn(size, generator)
                        whole = True
        yield from pool.drawn(size if whole else min(size, max(1, pool.count)), generator)


class _Pool:
    """Rows from many blocks, from which minibatches are drawn at random."""

    def __init__(self, flow: Flow, capacity: int) -> None:
        where: dict[str, Any] = {"dtype": flow.dtype, "device": flow.device}
        self.x = torch.empty(capacity, *flow.event_shape, **where)
        size = flow.context_size
        self.context = torch.empty(capacity, size, **where) if size else None
        self.count = 0

    @property
    def is_full(self) -> bool:
        return self.count == len(self.x)

    def rows(self) -> Batch:
        """What is there."""
        context = None if self.context is None else self.context[: self.count]
        return self.x[: self.count], context

    def add(self, rows: Batch) -> Batch:
        """Take in what there is place for; the rest."""
        taken = min(len(self.x) - self.count, len(rows[0]))
        places = slice(self.count, self.count + taken)
        for mine, new in zip((self.x, self.context), rows, strict=True):
            if mine is not None and new is not None:
                mine[places] = new[:taken]
        self.count += taken
        return cast("Batch", tuple(None if part is None else part[taken:] for part in rows))

    def drawn(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Minibatches of all rows; fewer than a batch stay."""
        order = torch.randperm(self.count, generator=generator, device="cpu").to(self.x.device)
        given = self.count - self.count % size
        for start in range(0, given, size):
            yield take((self.x, self.context), order[start : start + size])
        left = take((self.x, self.context), order[given:])
        self.count = 0
        self.add(left)


def _joined(parts: Sequence[Batch]) -> Batch:
    x = torch.cat([part[0] for part in parts])
    contexts = [part[1] for part in parts if part[1] is not None]
    return x, torch.cat(contexts) if contexts else None
