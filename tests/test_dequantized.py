"""Dequantized flows: an honest bound, exact draws, tables of mixed columns."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyroflows as pf
from pyroflows import testing
from pyroflows.distributions import Categories, DequantizedDistribution, Quantization
from pyroflows.errors import ContextError, DataError, ShapeError

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": (16,)}
DIGIT = constraints.integer_interval(0, 4)
MIXED = [
    constraints.unit_interval,
    Categories(3),
    DIGIT,
    constraints.real,
    constraints.nonnegative_integer,
    constraints.boolean,
    Categories(2),
]
# Two continuous columns, three integers, five categories.
WIDTH, NOISE = 10, 8
ROW = torch.tensor([0.3, 2.0, 4.0, -0.7, 12.0, 1.0, 0.0])
TRUTH = torch.tensor([0.05, 0.2, 0.4, 0.1, 0.25])


def redrawn(
    columns: Any, width: int, noise: int = 0, context: int = 0, scale: float = 0.5
) -> pf.Dequantized:
    torch.manual_seed(0)
    flow = pf.NSF(width, context, **SMALL)
    of_noise = pf.NSF(noise, width + context, **SMALL) if noise else None
    made = pf.Dequantized(flow, columns, of_noise)
    testing.redraw_(made, scale)
    return made


def bounds(made: pf.Dequantized, values: Tensor, draws: int, repeats: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the bound at each value."""
    with torch.no_grad():
        many = made().log_prob_bound(values.expand(repeats, *values.shape), draws=draws)
    return many.mean(0), many.std(0) / repeats**0.5


def table_of(made: pf.Dequantized, count: int, draws: int = 200_000) -> Tensor:
    """Log probabilities of one column by counting draws."""
    drawn = made().sample((draws,))[:, 0].long()
    return (torch.bincount(drawn, minlength=count) / draws).log()


def each(categories: int) -> Any:
    """All ways to dequantize one column, categories with this many values."""
    of_categories = Categories(categories), categories
    return pytest.mark.parametrize(
        ("column", "width", "noise"),
        [(DIGIT, 1, 0), (DIGIT, 1, 1), (*of_categories, 0), (*of_categories, categories)],
        ids=["uniform", "variational", "argmax", "variational-argmax"],
    )


# --- the bound --------------------------------------------------------------------------------


@each(3)
def test_the_bound_is_below_the_truth_and_tightens(column: Any, width: int, noise: int) -> None:
    """At parameters drawn at random; the truth is the frequency of draws."""
    # Weights of parameters far from a fit have tails that no number of draws tames.
    made = redrawn([column], width, noise, scale=0.5 if width == 1 else 0.2)
    count = 5 if width == 1 else width
    values = torch.arange(float(count)).unsqueeze(-1)
    truth = table_of(made, count)
    loose, loose_error = bounds(made, values, draws=1, repeats=4000)
    middle, middle_error = bounds(made, values, draws=10, repeats=1000)
    tight, tight_error = bounds(made, values, draws=2000, repeats=20)
    # Frequencies of 200,000 draws are known to about 2 per cent where they are one in a hundred.
    assert (loose < truth + 4 * loose_error + 0.03).all()
    assert (middle > loose - 4 * (loose_error + middle_error)).all()
    assert (tight > middle - 4 * (middle_error + tight_error)).all()
    testing.check_close("tight", tight, truth, 0.03 + 4 * tight_error)
    assert (loose < tight - 0.01).any()


@each(3)
def test_the_mass_is_one(column: Any, width: int, noise: int) -> None:
    """Weights are unbiased: over all values their means add up to one, and bounds to less."""
    made = redrawn([column], width, noise, scale=0.3 if width == 1 else 0.2)
    values = torch.arange(5.0 if width == 1 else width).unsqueeze(-1)
    with torch.no_grad():
        weights = made().log_prob_bound(values.expand(20_000, -1, 1)).exp().sum(-1)
    error = weights.std() / len(weights) ** 0.5
    assert abs(weights.mean() - 1) < 4 * error + 1e-3
    mean, mean_error = bounds(made, values, draws=1, repeats=4000)
    assert mean.exp().sum() < 1 + 4 * mean_error.sum()


def test_integers_without_bounds_by_their_mass() -> None:
    made = redrawn(None, 1, scale=0.3)
    values = torch.arange(-30.0, 30.0).unsqueeze(-1)
    mean, _ = bounds(made, values, draws=500, repeats=4)
    assert abs(mean.exp().sum() - 1) < 1e-2


@each(5)
def test_a_fit_reaches_the_entropy(column: Any, width: int, noise: int) -> None:
    """Within 0.03 nats with learned noise; with fixed noise 0.05, for categories 0.15."""
    torch.manual_seed(0)
    x = torch.multinomial(TRUTH, 4000, replacement=True).unsqueeze(-1)
    sizes: dict[str, Any] = {"transforms": 2, "hidden_features": (32,)}
    made = pf.Dequantized(
        pf.NSF(width, **sizes), [column], pf.NSF(noise, width, **sizes) if noise else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.fit_mle(made, x, steps=400, lr=5e-3, batch_size=512, seed=0, validation=0)
    values = torch.arange(5.0).unsqueeze(-1)
    mean, _ = bounds(made, values, draws=1, repeats=2000)
    gap = (TRUTH * (TRUTH.log() - mean)).sum()
    assert gap < (0.03 if noise else 0.05 if width == 1 else 0.15)
    testing.check_close("draws", table_of(made, 5).exp(), TRUTH, 0.03 if noise else 0.1)


# --- the distribution -------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0, NOISE])
def test_tables_of_mixed_columns(noise: int) -> None:
    made = redrawn(MIXED, WIDTH, noise)
    q = made()
    assert isinstance(q, DequantizedDistribution)
    x = q.sample((500,))
    for column, values in zip(q.support.cseq, x.unbind(-1), strict=True):
        assert column.check(values).all()
    assert q.log_prob_bound(x).isfinite().all()
    assert len(x[:, 1].unique()) == 3
    outside = ROW.repeat(7, 1)
    outside[range(7), range(7)] = torch.tensor([1.5, 3.0, 2.5, torch.nan, -1.0, 0.5, -1.0])
    got = q.log_prob_bound(outside)
    assert got[3].isnan()
    assert (got[[0, 1, 2, 4, 5, 6]] == -torch.inf).all()


def test_what_is_behind_a_row_rounds_to_it() -> None:
    quantization = Quantization(MIXED)
    assert (quantization.width, quantization.noise_features) == (WIDTH, NOISE)
    x = ROW.expand(1000, -1)
    w, ladj = quantization.dequantize(x, torch.randn(1000, NOISE))
    testing.check_close("row", quantization.quantize(w), x, 1e-6)
    testing.check_close("encoded", quantization.quantize(quantization.encode(x)), x, 1e-6)
    assert w.isfinite().all()
    assert ladj.isfinite().all()


def test_the_determinant_of_dequantization() -> None:
    quantization = Quantization(MIXED)
    row, noise = ROW.double(), torch.randn(NOISE, dtype=torch.float64)

    def vector(free: Tensor) -> Tensor:
        """By the continuous columns, which are 0 and 3, and the noise."""
        x = torch.cat([free[:1], row[1:3], free[1:2], row[4:]])
        return quantization.dequantize(x, free[2:])[0]

    free = torch.cat([row[[0, 3]], noise])
    expected = testing.jacobian(vector, free, 1).slogdet()[1]
    testing.check_close("ladj", quantization.dequantize(row, noise)[1], expected, 1e-8)


def test_uniform_noise_fills_the_cell_evenly() -> None:
    """Without learned noise, log q cancels the log-determinant but for the support's."""
    quantization = Quantization([constraints.integer, constraints.integer])
    x, noise = torch.tensor([3.0, -7.0]), torch.randn(5000, 2)
    w, ladj = quantization.dequantize(x, noise)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    testing.check_close("cancelled", ladj - log_q, torch.zeros(5000), 1e-5)
    share = (w - x).sort(0).values
    expected = torch.linspace(0, 1, 5000).unsqueeze(-1).expand(-1, 2)
    testing.check_close("even", share, expected, 0.03)


@pytest.mark.parametrize("noise", [0, NOISE])
def test_contexts(noise: int) -> None:
    made = redrawn(MIXED, WIDTH, noise, context=3)
    context = torch.randn(5, 3)
    q = made(context)
    assert (q.batch_shape, q.event_shape) == ((5,), (7,))
    x = q.sample((4,))
    assert x.shape == (4, 5, 7)
    assert q.log_prob_bound(x, draws=3).shape == (4, 5)
    assert q.log_prob_bound(x[0, 0]).shape == (5,)
    assert made(context.unsqueeze(1)).log_prob_bound(x[0]).shape == (5, 5)
    assert q.expand((2, 5)).sample().shape == (2, 5, 7)
    assert q.expand((2, 5)).log_prob_bound(x[:2]).shape == (2, 5)
    with pytest.raises(ContextError):
        made()


def test_there_is_no_log_prob_to_mistake() -> None:
    q = redrawn(MIXED, WIDTH)()
    with pytest.raises(NotImplementedError, match=r"log_prob_bound\(value, draws=100\)"):
        q.log_prob(ROW)
    with pytest.raises(NotImplementedError, match="log_prob_bound"):
        pyro.poutine.trace(lambda: pyro.sample("x", q)).get_trace().log_prob_sum()
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        q.log_prob_bound(ROW, draws=0)
    with pytest.raises(ShapeError, match=r"value: expected shape \(\*batch, 7\)"):
        q.log_prob_bound(ROW[:6])
    with pytest.raises(TypeError, match=r"value: expected torch\.float32"):
        q.log_prob_bound(ROW.double())


def test_rows_of_integers() -> None:
    q = redrawn([DIGIT, Categories(3)], 4)()
    x = torch.tensor([[4, 2], [0, 1]])
    torch.manual_seed(0)
    got = q.log_prob_bound(x)
    torch.manual_seed(0)
    testing.check_close("as floats", got, q.log_prob_bound(x.float()))


# --- the module -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0, NOISE])
def test_files_copies_and_dtypes(noise: int, tmp_path: Path) -> None:
    made = redrawn(MIXED, WIDTH, noise)
    pf.save(made, tmp_path / "table.safetensors")
    for again in (pf.load(tmp_path / "table.safetensors"), copy.deepcopy(made)):
        scores = []
        for module in (made, again):
            torch.manual_seed(1)
            scores.append(module().log_prob_bound(ROW, draws=5))
        testing.check_close("bound", *scores)
    double = copy.deepcopy(made).double()
    assert double().log_prob_bound(ROW.double()).dtype == torch.float64
    assert double().sample().dtype == torch.float64


def test_a_fit_of_a_mixed_table() -> None:
    torch.manual_seed(0)
    count = 400
    category = torch.randint(3, (count,))
    number = torch.poisson(3.0 + 5 * category)
    x = torch.stack([torch.randn(count) * 0.1 + 50 * category, category, number], -1)
    columns = [constraints.real, Categories(3), constraints.nonnegative_integer]
    made = pf.Dequantized(pf.RealNVP(5, act_norm=True, **SMALL), columns, pf.RealNVP(4, 5, **SMALL))
    before = made().log_prob_bound(x).mean()
    pf.fit_mle(made, x, steps=60, lr=5e-3, seed=0)
    assert made.transform.standardization.loc[0] > 10
    assert made.flow.transform.layers[-1].initialized
    assert made().log_prob_bound(x).mean() > before + 10
    gradients = [p.grad for p in made.noise.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


def test_bad_rows_are_named() -> None:
    made = redrawn(MIXED, WIDTH)
    x = ROW.repeat(20, 1)
    x[17, 2] = 5.0
    with pytest.raises(DataError, match=r"x: column 2 must be .*, but row 17 has 5; 1 of 20 rows"):
        pf.fit_mle(made, x, steps=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Categories(1), ValueError, "expected at least two, got 1"),
        (lambda: Quantization([constraints.real]), ValueError, "at least one integer or Cat"),
        (lambda: Quantization(["integer"]), TypeError, "scalar constraint or Categories, got 'i"),
        (lambda: Quantization([constraints.simplex]), TypeError, "or Categories, got Simplex"),
        (lambda: pf.Dequantized(pf.NSF(3), [DIGIT] * 2), ValueError, "flow: for these columns, "),
        (
            lambda: pf.Dequantized(pf.NSF(3), [Categories(3)], pf.NSF(3, context=2)),
            ValueError,
            "noise: for these columns, expected a flow of 3 features and a context of size 3",
        ),
        (
            lambda: pf.Dequantized(pf.NSF(1, support=constraints.positive), [DIGIT]),
            ValueError,
            "flow: expected a flow without a support; give it among the columns",
        ),
    ],
)
def test_what_does_not_fit(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("column", "behind"),
    [
        (constraints.integer, constraints.real),
        (constraints.boolean, constraints.interval(0.0, 2.0)),
        (constraints.integer_interval(-2, 3), constraints.interval(-2.0, 4.0)),
        (constraints.positive_integer, constraints.greater_than_eq(1.0)),
        (torch.distributions.constraints._IntegerLessThan(3), constraints.less_than(4.0)),
    ],
    ids=str,
)
def test_the_numbers_behind_integers(column: Any, behind: Any) -> None:
    assert str(Quantization([column]).to_support.support.cseq) == str([behind])
