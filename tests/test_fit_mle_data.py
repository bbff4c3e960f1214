"""Data that maximum likelihood takes, and what it refuses or warns of, each by its own words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyroflows as pf
from pyroflows.errors import ContextError, DataError, ShapeError


def small(features: int = 2, context: int = 0) -> pf.Flow:
    return pf.RealNVP(features, context, transforms=1, hidden_features=(4,))


def fit(flow: pf.Flow, *data: Any, **kwargs: Any) -> Any:
    return pf.fit_mle(flow, *data, **{"steps": 2, "seed": 0, "progress": False, **kwargs})


def as_loader(*tensors: Tensor) -> DataLoader[Any]:
    rows = TensorDataset(*tensors) if len(tensors) > 1 else tensors[0]
    return DataLoader(rows, batch_size=64, shuffle=True)  # type: ignore[arg-type]


def rows(count: int = 50, features: int = 2) -> Tensor:
    return torch.randn(count, features)


def with_bad_rows(value: float) -> Tensor:
    x = rows()
    x[[7, 31], [1, 0]] = value
    return x


# --- what it takes --------------------------------------------------------------------------------


KINDS: dict[str, Any] = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "float64 array": lambda x: x.double().numpy(),
    "float16 array": lambda x: x.half().numpy(),
    "foreign byte order": lambda x: x.numpy().astype(">f8"),
    "extended precision": lambda x: x.numpy().astype(np.longdouble),
    "read-only array": lambda x: _read_only(x.numpy()),
    "strided array": lambda x: x.numpy()[::-1],
    "lists": lambda x: x.tolist(),
    "leading dimensions": lambda x: x.reshape(4, -1, 2),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "loader": as_loader,
}


def _read_only(array: Any) -> Any:
    array = array.copy()
    array.setflags(write=False)
    return array


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(kind: str) -> None:
    x = torch.tensor([3.0, -2.0]) + torch.randn(400, 2)
    flow = small()
    result = fit(flow, KINDS[kind](x), steps=5)
    assert len(result.history.losses) == 5
    assert flow.dtype == torch.float32
    loc, scale = flow.transform.standardization.loc, flow.transform.standardization.scale
    assert torch.allclose(loc, x.mean(0), atol=0.1)
    assert torch.allclose(scale, x.std(0), atol=0.1)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "loader"])
def test_kinds_of_contexts(kind: str) -> None:
    x, context = torch.randn(100, 2), 7.0 + 3.0 * torch.randn(100, 3)
    data = {
        "tensors": (x, context),
        "arrays": (x.numpy(), context.numpy()),
        "loader": (as_loader(x, context),),
    }[kind]
    flow = small(2, 3)
    fit(flow, *data, steps=5)
    standardization = flow.transform.context_standardization
    assert torch.allclose(standardization.loc, context.mean(0), atol=1.0)
    assert torch.allclose(standardization.scale, context.std(0), atol=1.0)


def test_the_loader_is_standardised_as_a_whole() -> None:
    x = 1e4 + torch.randn(130, 2)  # ragged last batch; large mean
    flow = small()
    fit(flow, as_loader(x), steps=1)
    standardization = flow.transform.standardization
    assert torch.allclose(standardization.loc, x.mean(0), rtol=1e-6)
    assert torch.allclose(standardization.scale, x.std(0, correction=0), rtol=1e-3)


def test_double_flows_are_fitted_in_double() -> None:
    flow = small().double()
    fit(flow, np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32), steps=3)
    assert {p.dtype for p in flow.parameters()} == {torch.float64}


# --- not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("as_array", [False, True])
def test_values_that_are_not_finite(value: float, as_array: bool) -> None:
    x = with_bad_rows(value)
    flow = small()
    with pytest.raises(DataError, match=r"x: 2 of 50 rows are not finite, the first is row 7"):
        fit(flow, x.numpy() if as_array else x)
    assert flow.transform.standardization.is_identity()


def test_values_beyond_the_flows_precision() -> None:
    x = rows().double()
    x[3, 0] = 1e300
    with pytest.raises(DataError, match=r"x: 1 of 50 rows are not finite, the first is row 3"):
        fit(small(), x)
    fit(small().double(), x / 1e300, steps=1)


def test_values_whose_variance_overflows() -> None:
    x = rows()
    x[3, 1] = 1e30
    with pytest.raises(DataError, match=r"x: the variance of column 1 overflows torch.float32"):
        fit(small(), x)
    with pytest.raises(DataError, match=r"context: the variance of column 1 overflows"):
        fit(small(2, 2), rows(), x)
    fit(small().double(), x.double(), steps=1)


def test_contexts_and_validation_rows_that_are_not_finite() -> None:
    bad = with_bad_rows(float("nan"))
    with pytest.raises(DataError, match=r"^context: 2 of 50 rows are not finite"):
        fit(small(2, 2), rows(), bad)
    with pytest.raises(DataError, match=r"^validation x: 2 of 50 rows are not finite"):
        fit(small(), rows(), validation=bad)
    with pytest.raises(DataError, match=r"^validation context: 2 of 50 rows are not finite"):
        fit(small(2, 2), rows(), rows(), validation=(rows(), bad))
    with pytest.raises(DataError, match=r"^batch 2: x: 1 of 10 rows are not finite, .* row 1"):
        fit(small(), DataLoader(bad[10:], batch_size=10))  # type: ignore[arg-type]


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 3), (50,), (2, 50), ()])
def test_wrong_feature_count(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"x: expected shape \(\*batch, 2\), got \("):
        fit(small(), torch.randn(shape))


def test_contexts_that_do_not_fit() -> None:
    with pytest.raises(ContextError, match=r"expected a context of shape \(\*batch, 3\), got none"):
        fit(small(2, 3), rows())
    with pytest.raises(ContextError, match=r"but the flow has none"):
        fit(small(), rows(), rows(50, 3))
    with pytest.raises(ShapeError, match=r"context: expected shape \(\*batch, 3\), got \(50, 2\)"):
        fit(small(2, 3), rows(), rows(50, 2))
    with pytest.raises(DataError, match=r"one row for each of the 50 rows of x, got 49"):
        fit(small(2, 3), rows(), rows(49, 3))
    with pytest.raises(ContextError, match=r"got none"):
        fit(small(2, 3), rows(), rows(50, 3), validation=rows())


def test_contexts_beside_a_loader() -> None:
    pairs = list(zip(rows(), rows(50, 3), strict=True))
    with pytest.raises(DataError, match=r"let it give pairs \(x, context\)"):
        fit(small(2, 3), DataLoader(pairs, batch_size=10), rows(50, 3))  # type: ignore[arg-type]
    with pytest.raises(ContextError, match=r"got none"):
        fit(small(2, 3), DataLoader(rows(), batch_size=10))  # type: ignore[arg-type]
    with pytest.raises(ContextError, match=r"but the flow has none"):
        fit(small(), DataLoader(pairs, batch_size=10))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_rows(count: int) -> None:
    with pytest.raises(DataError, match=f"x: expected at least 10 rows, got {count}"):
        fit(small(), rows(count))


def test_the_fewest_rows() -> None:
    fit(small(), rows(10))
    fit(small(), rows(10), validation=0.99)
    with pytest.raises(DataError, match=r"validation: expected at least one row"):
        fit(small(), rows(), validation=rows(0))


# --- not numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        np.array([["a", "b"]] * 20),
        np.array([[1, None]] * 20),
        np.ones((20, 2), dtype=complex),
        np.array(["2020-01-01"] * 20, dtype="datetime64[D]"),
        None,
        {"x": 1.0},
    ],
    ids=["strings", "objects", "complex", "dates", "none", "dict"],
)
def test_what_is_not_numeric(data: Any) -> None:
    with pytest.raises(DataError, match=r"x: expected numbers, got an array of dtype"):
        fit(small(), data)


def test_complex_tensors() -> None:
    with pytest.raises(
        DataError, match=r"x: expected real numbers, got a tensor of torch\.complex64"
    ):
        fit(small(), torch.ones(20, 2, dtype=torch.complex64))


# --- loaders --------------------------------------------------------------------------------------


class Once(IterableDataset):  # type: ignore[type-arg]
    """Gives its rows a given number of times, then nothing."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __iter__(self) -> Iterator[Tensor]:
        self.times -= 1
        yield from rows() if self.times >= 0 else ()


@pytest.mark.parametrize("times", [0, 1, 2, 3])
@pytest.mark.parametrize("standardize", [True, False])
def test_a_loader_that_runs_dry(times: int, standardize: bool) -> None:
    """An error, not a loop without end."""
    with pytest.raises(DataError, match=r"DataLoader gave no batch.*read repeatedly"):
        fit(small(), DataLoader(Once(times), batch_size=10), steps=50, standardize=standardize)


def test_a_loader_of_too_many_tensors() -> None:
    triples = [(row, row, row) for row in rows()]
    with pytest.raises(DataError, match=r"expected x or \(x, context\), got 3 tensors"):
        fit(small(), DataLoader(triples, batch_size=10))  # type: ignore[arg-type]


# --- columns --------------------------------------------------------------------------------------


def test_constant_columns() -> None:
    x = rows(50, 4)
    x[:, 1] = 3.7
    x[:, 3] = 0.0
    flow = small(4)
    with pytest.warns(UserWarning, match=r"column 1, 3 of x is constant: .* remove it") as caught:
        fit(flow, x)
    assert caught[0].filename == __file__.replace(".pyc", ".py")
    assert torch.equal(flow.transform.standardization.scale[[1, 3]], torch.ones(2))
    assert flow().log_prob(x).isfinite().all()


def test_integer_columns() -> None:
    x = rows(50, 3)
    x[:, 2] = torch.randint(5, (50,))
    with pytest.warns(UserWarning, match=r"column 2 of x is integer-valued: .*uniform noise"):
        fit(small(3), x)
    with pytest.warns(UserWarning, match=r"column 0, 1 of x is integer-valued"):
        fit(small(), torch.randint(5, (50, 2)))


def test_other_columns_go_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(small(), 1e3 * rows())
