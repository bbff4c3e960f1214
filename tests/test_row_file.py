"""Rows in files: what is read, in which order, in how much memory, and what is refused."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.errors import DataError
from pyroflows.training.files import FileRows

ROOT = Path(__file__).parents[1]
BATCH = 4096


def numbered(rows: int) -> np.ndarray:
    """Each row's number, and its negative."""
    return np.stack([np.arange(rows), -np.arange(rows)], -1).astype(np.float32)


def write(folder: Path, kind: str, x: np.ndarray, group: int = 50) -> Path:
    path = folder / f"x.{kind}"
    if kind == "npy":
        np.save(path, x)
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pa.table({f"c{i}": column for i, column in enumerate(x.T)})
        parquet.write_table(table, path, row_group_size=group)
    return path


def flow(context: int = 0) -> pf.Flow:
    return pf.RealNVP(2, context, transforms=1, hidden_features=(4,))


def streamed(path: Path, validation: float = 0.1, memory: int = 2**13) -> FileRows:
    """A file of 1,000 rows of 16 bytes, of which a third fits."""
    rows = FileRows(pf.RowFile(path, memory=memory), flow(), validation, seed=1)
    assert not rows.fits
    return rows


KINDS = ("npy", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_trained_on_once_an_epoch_or_held_out(tmp_path: Path, kind: str) -> None:
    rows = streamed(write(tmp_path, kind, numbered(1000)))
    held = rows.held_out()
    assert held is not None
    trained = torch.cat([x for x, _ in rows])
    numbers = torch.cat([trained, held[0]])[:, 0].sort().values
    assert torch.equal(numbers, torch.arange(1000.0))
    assert 20 <= len(held[0]) <= 80  # a tenth of the memory is 51 rows
    size = 30
    batches = rows.epochs(size, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(batches)[0] for _ in range(len(trained) // size)])[:, 0]
    assert len(epoch.unique()) == len(epoch)
    assert set(epoch.tolist()) <= set(trained[:, 0].tolist())
    again = torch.cat([next(batches)[0] for _ in range(len(trained) // size)])[:, 0]
    assert not torch.equal(again, epoch)


@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_are_mixed_from_all_of_the_file(tmp_path: Path, kind: str) -> None:
    """Of a sorted file, the mean of a batch is near that of the file."""
    batches = streamed(write(tmp_path, kind, numbered(1000))).epochs(64, torch.Generator())
    means = torch.stack([next(batches)[0][:, 0].mean() for _ in range(40)])
    assert (means - 500).abs().max() < 350
    assert means.std() < 150


def test_batches_go_on_where_they_were(tmp_path: Path) -> None:
    rows = streamed(write(tmp_path, "npy", numbered(1000)))
    batches = rows.epochs(30, torch.Generator().manual_seed(0))
    for _ in range(40):
        next(batches)
    state = batches.state()
    expected = [next(batches)[0] for _ in range(10)]
    other = rows.epochs(30, torch.Generator().manual_seed(7))
    other.restore(state)
    assert all(torch.equal(next(other)[0], x) for x in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [2**13, 2**28])
def test_columns_and_context(tmp_path: Path, kind: str, memory: int) -> None:
    x = np.random.default_rng(0).normal([0.0, 10.0, 20.0, 30.0], size=(600, 4))
    path = write(tmp_path, kind, x)
    names: list[Any] = [3, 0, 1] if kind == "npy" else ["c3", "c0", "c1"]
    rows = pf.RowFile(path, columns=names[:2], context=names[2:], memory=memory)
    assert rows.sizes() == (2, 1)
    assert len(rows) == 600
    fitted = flow(context=1)
    pf.fit_mle(fitted, rows, steps=3, seed=0, progress=False)
    transform = fitted.transform
    assert transform.standardization.loc.tolist() == pytest.approx([30.0, 0.0], abs=0.3)
    assert transform.context_standardization.loc.tolist() == pytest.approx([10.0], abs=0.3)


def test_a_file_that_fits_is_fitted_as_its_rows_are(tmp_path: Path) -> None:
    x = torch.randn(300, 2)
    np.save(tmp_path / "x.npy", x.numpy())
    start, losses = flow(), []
    for rows in (tmp_path / "x.npy", str(tmp_path / "x.npy"), pf.RowFile(tmp_path / "x.npy")):
        fitted = flow()
        fitted.load_state_dict(start.state_dict())
        losses.append(pf.fit_mle(fitted, rows, steps=4, seed=0, progress=False).history.losses)
    assert losses[0] == losses[1] == losses[2]


def test_several_files_and_events_of_any_shape(tmp_path: Path) -> None:
    x = torch.randn(400, 2, 3)
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, part in zip(paths, x.split(200), strict=True):
        np.save(path, part.numpy())
    images = pf.Flow([], (2, 3))
    rows = pf.RowFile(paths, memory=2**13)
    found = torch.cat([part for part, _ in FileRows(rows, images, 0.0, seed=0)])
    assert torch.equal(found, x)
    assert "800 rows" not in repr(rows)
    assert "400 rows" in repr(rows)


def test_a_fit_learns_from_a_file(tmp_path: Path) -> None:
    def curved(rows: int) -> Tensor:
        z = torch.randn(rows, 2)
        return torch.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], -1)

    path = write(tmp_path, "npy", curved(4000).numpy())
    fitted = pf.NSF(2, transforms=2, hidden_features=(16,))
    rows = pf.RowFile(path, memory=2**14)
    pf.fit_mle(fitted, rows, steps=200, lr=0.01, seed=0, progress=False)
    assert -fitted().log_prob(curved(1000)).mean() < 2.2  # the best normal has 3.2


# --- memory ---------------------------------------------------------------------------------------

FIT = """
import re, sys
from pathlib import Path
import pyroflows as pf

flow = pf.RealNVP(16, transforms=2, hidden_features=(16,))
rows = pf.RowFile(sys.argv[1], memory=int(sys.argv[2]))
pf.fit_mle(flow, rows, steps=int(sys.argv[3]), batch_size=int(sys.argv[4]), seed=0, progress=False)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak(path: Path, memory: int, steps: int) -> int:
    """Largest resident size; that of getrusage begins at the parent's."""
    run = subprocess.run(
        [sys.executable, "-c", FIT, str(path), str(memory), str(steps), str(BATCH)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "large"),
    # Arrow itself takes some fifteen MiB.
    [("npy", 200), pytest.param("parquet", 400, marks=pytest.mark.slow)],
)
def test_memory_stays_within_what_was_given(tmp_path: Path, kind: str, large: int) -> None:
    """Less than 1.5 times the memory given, of a file of ten times as much."""
    given = large * 2**20 // 10
    group = 10 * given // 64 // 100
    block = np.random.default_rng(0).standard_normal((group, 16), dtype=np.float32)
    path = write(tmp_path, kind, np.tile(block, (100, 1)), group)
    (tmp_path / "small").mkdir()
    small = write(tmp_path / "small", kind, block, group)
    # An epoch and a half: every row is read.
    used = peak(path, given, 150 * group // BATCH) - peak(small, given, 20)
    assert used < 1.5 * given


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_are_named(tmp_path: Path, kind: str) -> None:
    x = numbered(1000)
    x[130, 1] = np.nan
    where = r"x\.npy, rows \d+ to \d+: x: 1 of" if kind == "npy" else r"x\.parquet, row group 2: x"
    with pytest.raises(DataError, match=where):
        list(streamed(write(tmp_path, kind, x)))


def test_missing_values_of_a_table_are_not_finite(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"a": [1.0, None] * 20, "b": range(40)})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"20 of 40 rows are not finite, the first is row 1"):
        pf.fit_mle(flow(), tmp_path / "x.parquet", steps=1)


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected \.npy files or \.parquet files, got .*x\.csv"):
        pf.RowFile(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"expected \.npy files or \.parquet files, got none"):
        pf.RowFile([])
    with pytest.raises(ValueError, match=r"memory: expected a positive number of bytes, got 0"):
        pf.RowFile(write(tmp_path, "npy", numbered(20)), memory=0)
    (tmp_path / "y.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"y\.npy: cannot be mapped as an array"):
        pf.RowFile(tmp_path / "y.npy")
    np.save(tmp_path / "z.npy", np.float32(1.0))
    with pytest.raises(DataError, match=r"z\.npy: expected rows, got an array without dimensions"):
        pf.RowFile(tmp_path / "z.npy")


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, "npy", numbered(20))
    with pytest.raises(DataError, match=r"x\.npy: has no column 2\. It has 0, 1\."):
        pf.RowFile(path, context=[2]).sizes()
    with pytest.raises(DataError, match=r"x\.parquet: has no column 'd'\. It has c0, c1\."):
        pf.RowFile(write(tmp_path, "parquet", numbered(20)), columns=["d"]).sizes()
    np.save(path, np.zeros((20, 2, 2)))
    with pytest.raises(DataError, match=r"expected two dimensions for columns, got \(20, 2, 2\)"):
        pf.RowFile(path, columns=[0]).sizes()


def test_a_context_beside_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "npy", numbered(20))
    with pytest.raises(DataError, match=r"RowFile\(path, context=\[\.\.\.\]\) name its columns"):
        pf.fit_mle(flow(1), path, torch.zeros(20, 1))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"need pyarrow; run pip install 'pyroflows\[parquet\]'"):
        pf.RowFile(tmp_path / "x.parquet")
