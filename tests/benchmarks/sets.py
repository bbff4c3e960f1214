"""Data sets of the density benchmark, each split into rows to fit, to stop and to test on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

from pyroflows.testing.samples import two_dimensional


@dataclass(frozen=True)
class Split:
    """Rows of one split, in the units that all flows are compared in."""

    train: Tensor
    validation: Tensor
    test: Tensor


def plane(name: str) -> Callable[[int], Split]:
    """A two-dimensional density: 5,000 rows to fit, 1,000 to stop, 10,000 to test on."""

    def load(seed: int) -> Split:
        rows = two_dimensional(name, 16_000, seed)
        return Split(*rows.split([5_000, 1_000, 10_000]))

    return load


def table(
    load_table: Callable[..., tuple[np.ndarray, np.ndarray]], columns: slice
) -> Callable[[int], Split]:
    """A table of scikit-learn, standardised; a fifth of the rows to test, a fifth to stop on."""

    def load(seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.as_tensor(load_table(return_X_y=True)[0][:, columns], dtype=torch.float64)
        rows = (rows - rows.mean(0)) / rows.std(0)
        # Measured in few digits: a density could grow without bound on the repeated values.
        rows = rows + 0.05 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        rows = rows[torch.randperm(len(rows), generator=generator)].float()
        fifth = len(rows) // 5
        return Split(rows[2 * fifth :], rows[fifth : 2 * fifth], rows[:fifth])

    return load


def power(seed: int) -> Split:
    """The slice of the POWER set under the folder that PYROFLOWS_DATA names; its split is fixed."""
    folder = Path(os.environ["PYROFLOWS_DATA"]) / "power_2007h1"
    parts = ("train", "validation", "test")
    return Split(*(torch.from_numpy(np.load(folder / f"{part}.npy")).float() for part in parts))


SETS: dict[str, Callable[[int], Split]] = {
    "POWER": power,
    "wine": table(datasets.load_wine, slice(None)),
    "breast cancer": table(datasets.load_breast_cancer, slice(10)),
    # Without the column of two values.
    "diabetes": table(datasets.load_diabetes, slice(2, None)),
    **{name: plane(name) for name in ("moons", "rings", "eight gaussians")},
    **{name: plane(name) for name in ("checkerboard", "spirals", "pinwheel")},
}
