"""Flows on constrained supports, and flows composed of foreign parts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import biject_to

import pyroflows as pf
from pyroflows import layers as pfl
from pyroflows import testing
from pyroflows.errors import ContextError, DataError, SavedFileError
from pyroflows.flows.description import decode, encode
from pyroflows.flows.supports import check_support
from pyroflows.transforms import IntervalTransform, StickBreakingTransform, call_and_ladj

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": (8,)}
MIXED = [constraints.positive, constraints.real, constraints.interval(0.1, 0.7)]
SUPPORTS = [
    constraints.positive,
    constraints.nonnegative,
    constraints.unit_interval,
    constraints.interval(-1.0, 3.0),
    constraints.half_open_interval(0.0, 2.0),
    constraints.greater_than(torch.tensor([0.0, 1.0, 2.0])),
    constraints.less_than(0.3),
    constraints.independent(constraints.positive, 1),
    constraints.softplus_positive,
    constraints.simplex,
    constraints.ordered_vector,
    constraints.real,
    MIXED,
]
every_support = pytest.mark.parametrize("support", SUPPORTS, ids=str)
INTERVALS = [
    constraints.positive,
    constraints.unit_interval,
    constraints.interval(-1.0, 3.0),
    constraints.less_than(0.3),
]


def redrawn(recipe: Any, *args: Any, **options: Any) -> pf.Flow:
    torch.manual_seed(0)
    flow: pf.Flow = recipe(*args, **{**SMALL, **options}).double()
    testing.redraw_(flow, 0.5)
    return flow


# --- maps -------------------------------------------------------------------------------------


@every_support
def test_the_map_is_torchs_but_for_its_digits(support: Any) -> None:
    """Where torch's own are accurate; decreasing maps of torch's are increasing here."""
    torch.manual_seed(0)
    x = torch.randn(50, 2 if support is constraints.simplex else 3, dtype=torch.float64)
    torchs = biject_to(constraints.stack(support, -1) if isinstance(support, list) else support)
    theirs = -x if str(support).startswith("LessThan") else x
    y, ladj = call_and_ladj(pfl.ToSupport(support)(), x)
    testing.check_close("value", y, torchs(theirs), 1e-12)
    totals = [
        part.reshape(50, -1).sum(-1) for part in (ladj, torchs.log_abs_det_jacobian(theirs, y))
    ]
    testing.check_close("ladj", *totals, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_determinants_keep_their_digits_in_the_tails(dtype: torch.dtype) -> None:
    """sigmoid'(x) = exp(-|x|) far out, where torch's 1 - sigmoid has lost every digit."""
    x = torch.tensor([-80.0, -40.0, 40.0, 80.0, 1e4], dtype=dtype)
    ladj = IntervalTransform(constraints.unit_interval).call_and_ladj(x)[1]
    testing.check_close("forward", ladj, -x.abs())
    y = torch.tensor([1e-30, 1e-20, 1e-7], dtype=dtype)
    z, ladj = IntervalTransform(constraints.unit_interval).inverse_and_ladj(y)
    exact = y.double().log() - (-y.double()).log1p()
    testing.check_close("value", z.double(), exact, 1e-5 if dtype == torch.float32 else 1e-13)
    testing.check_close("inverse", ladj, -y.log() - (-y).log1p(), 1e-5)


def test_an_interval_keeps_the_digits_of_both_ends() -> None:
    """Near 0 as the upper end of [-1, 0], numbers are as fine as near 0 as the lower one."""
    lower, upper = (
        IntervalTransform(constraints.interval(*ends)) for ends in ((0.0, 1.0), (-1.0, 0.0))
    )
    x = torch.tensor([-60.0, -30.0])
    testing.check_close("ends", upper(-x), -lower(x))
    testing.check_close("back", upper.inv(-lower(x)), -x, 1e-5)


@pytest.mark.parametrize("support", INTERVALS, ids=str)
def test_draws_stay_inside_however_far_out(support: Any) -> None:
    transform = IntervalTransform(support)
    x = torch.tensor([-1e4, -200.0, -20.0, 20.0, 80.0])
    y = transform(x)
    assert support.check(y).all()
    assert transform.inv(y).isfinite().all()
    assert transform.inverse_and_ladj(y)[1].isfinite().all()


def test_stick_breaking_is_exact_where_shares_are_tiny() -> None:
    transform = StickBreakingTransform()
    x = torch.tensor([[-30.0, 25.0, -20.0], [0.1, -0.2, 0.3], [-60.0, -60.0, 0.0]]).double()
    y, ladj = transform.call_and_ladj(x)
    testing.check_close("sum", y.sum(-1), torch.ones(3).double(), 1e-12)
    testing.check_close("round trip", transform.inv(y), x, 1e-9)
    first = testing.jacobian(lambda v: transform(v)[..., :-1], x, 1)
    testing.check_close("ladj", ladj, first.slogdet()[1], 1e-8)
    testing.check_close("inverse", transform.inverse_and_ladj(y)[1], -ladj, 1e-9)
    single = transform.call_and_ladj(x.float())[1].double()
    testing.check_close("float32", single, ladj, 1e-4)
    assert transform.inverse_and_ladj(torch.tensor([0.0, 0.5, 0.5]))[0].isfinite().all()


def test_a_dirichlet_by_its_own_density() -> None:
    """The log-determinant against a known density: a standard logistic gives Dirichlet(1, 1)."""
    y = torch.tensor([[0.3, 0.7], [1e-5, 1 - 1e-5]], dtype=torch.float64)
    x, ladj = StickBreakingTransform().inverse_and_ladj(y)
    log_density = (-x - 2 * torch.nn.functional.softplus(-x)).sum(-1) + ladj
    testing.check_close("uniform", log_density, torch.zeros(2).double(), 1e-10)


# --- flows ------------------------------------------------------------------------------------


@every_support
@pytest.mark.parametrize("recipe", [pf.NICE, pf.RealNVP, pf.NSF, pf.MAF, pf.IAF])
def test_recipes_live_on_a_support(recipe: Any, support: Any) -> None:
    flow = redrawn(recipe, 3, support=support)
    q = flow()
    x = q.sample((20,))
    assert flow.event_shape == q.event_shape == (3,)
    check_support("x", x, flow.support)
    draws, log_prob = q.rsample_and_log_prob((7,))
    testing.check_close("density of draws", q.log_prob(draws.clone()), log_prob, 1e-8)
    inner = flow.base(None).log_prob(flow.inv(x))
    ladj = flow.transform.inverse_and_ladj(x)[1]
    testing.check_close("change of variables", q.log_prob(x), inner + ladj, 1e-10)


@every_support
def test_the_support_is_told(support: Any) -> None:
    flow = pf.NSF(3, support=support, **SMALL)
    told = flow().support
    assert told.event_dim == 1 or support is constraints.real
    assert str(told) == str(flow.transform.codomain) == str(flow.support)


def test_matrices_from_vectors() -> None:
    flow = redrawn(pf.NSF, 3, support=constraints.corr_cholesky)
    x = flow().sample((5,))
    assert x.shape == (5, 3, 3)
    assert constraints.corr_cholesky.check(x).all()
    assert flow().log_prob(x).isfinite().all()


def test_the_simplex_by_its_mass() -> None:
    q = redrawn(pf.NSF, 2, support=constraints.simplex)()
    share = torch.linspace(1e-6, 1 - 1e-6, 200_001).double()
    mass = torch.trapezoid(q.log_prob(torch.stack([share, 1 - share], -1)).exp().detach(), share)
    assert abs(mass.item() - 1) < 1e-3


def test_values_outside_have_no_density() -> None:
    q = redrawn(pf.NSF, 3, support=MIXED)()
    x = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.0, 0.5], [1.0, 0.0, 0.8], [math.nan, 0.0, 0.5]])
    x = x.double().requires_grad_()
    got = q.log_prob(x)
    assert got.tolist()[1:3] == [-math.inf, -math.inf]
    assert got[0].isfinite()
    assert got[3].isnan()
    (gradient,) = torch.autograd.grad(got[0], x)
    assert gradient[:3].isfinite().all()


@pytest.mark.parametrize("support", [constraints.positive, constraints.simplex], ids=str)
def test_vectors_outside_have_no_density(support: Any) -> None:
    q = redrawn(pf.NSF, 2, support=support)()
    x = torch.tensor([[-0.1, 1.1], [math.nan, 0.5], [-1.0, math.nan]]).double()
    got = q.log_prob(x)
    assert got[0] == -math.inf
    assert got[1:].isnan().all()


def test_the_end_of_a_closed_support_is_scored_as_the_number_beside_it() -> None:
    q = pf.NSF(1, support=constraints.unit_interval, **SMALL)()
    ends = torch.tensor([[0.0], [1.0]])
    beside = torch.tensor([[torch.finfo().tiny], [1 - torch.finfo().eps]])
    testing.check_close("ends", q.log_prob(ends), q.log_prob(beside))
    assert pf.NSF(1, support=constraints.positive, **SMALL)().log_prob(ends[:1]) == -math.inf


def test_bounds_keep_the_digits_that_single_precision_has_not() -> None:
    """A flow made in float32 and converted still ends at 0.1."""
    flow = pf.NSF(1, support=constraints.interval(0.1, 0.7), **SMALL).double()
    assert flow().log_prob(torch.tensor([0.1 + 1e-12], dtype=torch.float64)).isfinite()
    vector = torch.tensor([0.1], dtype=torch.float64)
    support = constraints.interval(vector, vector + 1)
    again = pf.NSF(1, support=support, **SMALL).double()
    assert again().log_prob(torch.tensor([0.1 + 1e-12], dtype=torch.float64)).isfinite()


def test_conditional_flows_and_plates() -> None:
    flow = pf.NSF(3, context=2, support=MIXED, **SMALL)

    def model(x: torch.Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(torch.zeros(len(x), 2)), obs=x)

    x = flow(torch.zeros(4, 2)).sample()
    trace = pyro.poutine.trace(model).get_trace(x)
    expected = flow(torch.zeros(4, 2)).log_prob(x).sum()
    testing.check_close("joint", trace.log_prob_sum(), expected, 1e-5)
    pyro.clear_param_store()


# --- fits -------------------------------------------------------------------------------------


def test_a_fit_standardises_behind_the_support() -> None:
    torch.manual_seed(0)
    x = (torch.randn(2000, 2) * torch.tensor([0.5, 2.0]) + torch.tensor([3.0, -1.0])).exp()
    flow = pf.RealNVP(2, support=constraints.positive, act_norm=True, **SMALL)
    pf.fit_mle(flow, x, steps=2, validation=0, seed=0)
    standardization = flow.transform.standardization
    testing.check_close("loc", standardization.loc, x.log().mean(0), 1e-4)
    testing.check_close("scale", standardization.scale, x.log().std(0, correction=0), 1e-4)
    assert flow.transform.layers[-1].initialized


def test_a_fit_reaches_the_entropy_of_a_beta_distribution() -> None:
    torch.manual_seed(0)
    beta = dist.Beta(torch.tensor(2.0), torch.tensor(5.0))
    x = beta.sample((4000, 1))
    flow = pf.NSF(1, support=constraints.unit_interval, **SMALL)
    pf.fit_mle(flow, x, steps=400, lr=5e-3, seed=0)
    fresh = beta.sample((10_000, 1))
    gap = beta.log_prob(fresh).sum(-1) - flow().log_prob(fresh)
    assert gap.mean().item() < 0.02


BAD = [
    (MIXED, 2, 0.9, "x: column 2 must be in [0.1, 0.7], but row 17 has 0.9; 2 of 50 rows"),
    (MIXED, 0, -0.3, "x: column 0 must be greater than 0.0, but row 17 has -0.3; 2 of 50 rows"),
    (constraints.positive, 1, -0.3, "x: column 1 must be greater than 0.0, but row 17 has -0.3"),
    (constraints.nonnegative, 1, -0.3, "x: column 1 must be at least 0.0, but row 17 has -0.3"),
    (constraints.less_than(1.0), 1, 2.0, "x: column 1 must be less than 1.0, but row 17 has 2"),
    (constraints.half_open_interval(0.0, 1.0), 1, 1.0, "must be in [0.0, 1.0), but row 17 has 1;"),
    (constraints.simplex, 1, -0.3, "x: must be in the support Simplex(), but row 17 has [0."),
]


@pytest.mark.parametrize(("support", "column", "value", "message"), BAD, ids=str)
@pytest.mark.parametrize("as_loader", [False, True], ids=["rows", "loader"])
def test_bad_data_are_named_before_anything_changes(
    support: Any, column: int, value: float, message: str, as_loader: bool
) -> None:
    flow = pf.RealNVP(3, support=support, act_norm=True, **SMALL)
    torch.manual_seed(0)
    x: Any = flow().sample((50,))
    x[[17, 30], column] = value
    before = copy.deepcopy(flow.state_dict())
    if as_loader:
        message = message.replace("x:", "batch 0: x:")
        x = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=50)
    with pytest.raises(DataError) as caught:
        pf.fit_mle(flow, x, steps=2)
    assert message in str(caught.value)
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_bad_validation_rows_are_named_too() -> None:
    flow = pf.NSF(1, support=constraints.positive, **SMALL)
    with pytest.raises(DataError, match=r"validation x: column 0 must be greater than 0.0"):
        pf.fit_mle(flow, torch.rand(20, 1) + 0.1, validation=-torch.rand(5, 1), steps=2)


def test_values_at_the_end_are_warned_of() -> None:
    flow = pf.NSF(2, support=constraints.unit_interval, **SMALL)
    x = torch.rand(50, 2)
    x[3, 0], x[3, 1], x[7, 1] = 0.0, 1.0, 1.0
    with pytest.warns(UserWarning, match="2 rows of x have values at the end of their support"):
        pf.fit_mle(flow, x, steps=2, validation=0)


# --- construction -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (constraints.positive_definite, ValueError, "biject_to knows, got PositiveDefinite"),
        (constraints.nonnegative_integer, ValueError, "Discrete data need pyroflows.Dequantized"),
        ("positive", TypeError, "expected a constraint or a list of them, got 'positive'"),
        (["real"] * 3, TypeError, "expected a constraint or a list of them, got 'real'"),
        ([constraints.real] * 2, ValueError, "expected a constraint for each of 3 features, got 2"),
        ([constraints.simplex] * 3, ValueError, "expected a scalar constraint per column"),
        (constraints.interval(2.0, 1.0), ValueError, "expected lower < upper"),
        (constraints.interval(torch.zeros(2, 2), 1.0), ValueError, "numbers or vectors"),
        (constraints.stack([constraints.real] * 3, -2), ValueError, "scalar constraint per column"),
    ],
    ids=str,
)
def test_impossible_supports(support: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        pf.NSF(3, support=support)
    assert message in str(caught.value)


def test_no_simplex_of_one() -> None:
    with pytest.raises(ValueError, match="no real vectors behind 1 features of Simplex"):
        pf.NSF(1, support=constraints.simplex)


def test_an_interval_map_wants_an_interval() -> None:
    with pytest.raises(ValueError, match="expected an interval of numbers, got Simplex"):
        IntervalTransform(constraints.simplex)


@every_support
def test_files_know_supports(support: Any, tmp_path: Path) -> None:
    flow = pf.NSF(3, support=support, **SMALL)
    pf.save(flow, tmp_path / "flow.safetensors")
    again = pf.load(tmp_path / "flow.safetensors")
    x = flow().sample((5,))
    testing.check_close("density", again().log_prob(x), flow().log_prob(x))
    assert str(again.support) == str(flow.support)


def test_constraints_in_files() -> None:
    for name in constraints.__all__:
        public = getattr(constraints, name)
        if isinstance(public, constraints.Constraint) and not constraints.is_dependent(public):
            again = decode(encode(public, "support"), "support")
            assert (type(again), vars(again)) == (type(public), vars(public))
    with pytest.raises(SavedFileError, match="'os' is no constraint"):
        decode({"constraint": "os", "arguments": []}, "support")
    with pytest.raises(TypeError, match="a constraint or a public class"):
        encode(constraints.multinomial(3), "support")


@every_support
def test_copies_and_pickles(support: Any) -> None:
    flow = pf.NSF(3, support=support, **SMALL)
    x = flow().sample((5,))
    testing.check_close("copy", copy.deepcopy(flow)().log_prob(x), flow().log_prob(x))
    testing.check_copies(flow, x)


# --- composition ------------------------------------------------------------------------------


def test_foreign_bijections_stand_in_a_stack() -> None:
    torch.manual_seed(0)
    spline = dist.transforms.Spline(2, count_bins=4)
    flow = pf.Flow(
        [
            pfl.CouplingLayer(2, hidden_features=(8,)),
            spline,
            [pfl.LULinear(2), dist.transforms.ExpTransform()],
            dist.transforms.AffineTransform(1.0, 2.0),
        ],
        2,
    )
    names = {name for name, _ in flow.named_parameters()}
    assert "transform.layers.1.transform.unnormalized_widths" in names
    x = flow().sample((9,))
    assert (x > 1).all()
    flow().log_prob(x).sum().backward()
    assert spline.unnormalized_widths.grad.abs().sum() > 0
    testing.check_copies(flow, x)


def test_hand_made_constraints_are_standardised_behind_as_well() -> None:
    x = (torch.randn(500, 2) * 0.1 + 3).exp()
    flow = pf.Flow([pfl.CouplingLayer(2, hidden_features=(8,)), biject_to(constraints.positive)], 2)
    pf.fit_mle(flow, x, steps=2, validation=0)
    testing.check_close("loc", flow.transform.standardization.loc, x.log().mean(0), 1e-4)


def test_conditional_parts_get_the_context() -> None:
    torch.manual_seed(0)
    inner = pf.NSF(2, context=3, **SMALL)
    testing.redraw_(inner, 0.5)
    plain = pf.NSF(2, **SMALL)
    pyros = dist.transforms.conditional_spline(2, 3, [8])
    flow = pf.Flow([inner.transform, plain.transform, pyros], 2, context=3)
    context = torch.randn(4, 3)
    x = flow(context).sample()
    assert flow(context).log_prob(x).isfinite().all()
    assert not torch.equal(flow(context).log_prob(x), flow(context + 1).log_prob(x))


def test_inverse_exchanges_the_directions() -> None:
    layer = pfl.AutoregressiveLayer(3, 2, hidden_features=(8,))
    testing.redraw_(layer, 0.5)
    context, x = torch.randn(4, 2), torch.randn(4, 3)
    inverse = pfl.Inverse(layer)
    testing.check_close("forward", inverse(context)(x), layer(context).inv(x), 1e-6)
    assert inverse(context).sequential_inverse
    assert not inverse(context).sequential_forward
    twice = pfl.Inverse(inverse)(context)
    testing.check_close("twice", twice(x), layer(context)(x), 1e-6)


def test_a_nested_sequence_is_the_flat_one() -> None:
    torch.manual_seed(0)
    parts = [pfl.CouplingLayer(3, hidden_features=(8,)), pfl.ActNorm(3), pfl.LULinear(3)]
    for part in parts:
        testing.redraw_(part, 0.5)
    flat = pf.Flow(parts, 3)
    nested = pf.Flow([pfl.Sequential([parts[0], pfl.Sequential(parts[1:])])], 3)
    x = torch.randn(5, 3)
    testing.check_close("density", nested().log_prob(x), flat().log_prob(x), 1e-6)
    pf.fit_mle(nested, torch.randn(50, 3), steps=2, validation=0)
    assert parts[1].initialized
    testing.check_close("empty", pfl.Sequential([])()(x), x)


def test_a_flow_runs_backwards() -> None:
    flow = redrawn(pf.NSF, 3, support=MIXED)
    x = flow().sample((5,))
    testing.check_close("inv", flow.inv(x), flow.transform.inv(x))
    testing.check_close("inv.inv", flow.inv.inv(flow.inv(x)), x, 1e-8)
    conditional = pf.NSF(2, context=1, **SMALL)
    with pytest.raises(ContextError, match=r"flow\.transform\.condition"):
        conditional.inv(torch.zeros(2))


@pytest.mark.parametrize(
    ("layers", "shape", "context", "error", "message"),
    [
        ([pfl.CouplingLayer(3)], 2, 0, ValueError, "layer 0 (CouplingLayer): made for 3 features"),
        ([[pfl.ActNorm(2), pfl.LULinear(3)]], 2, 0, ValueError, "layer 1 (LULinear): made for 3"),
        ([pfl.Inverse(pfl.LULinear(3))], 2, 0, ValueError, "made for 3 features"),
        ([pfl.CouplingLayer(2, 4)], 2, 3, ValueError, "made for a context of size 4, but"),
        ([pfl.CouplingLayer(2)], (), 0, ValueError, "maps events of 1 dimensions"),
        ([biject_to(constraints.simplex)], (), 0, ValueError, "maps events of 1 dimensions"),
        ([biject_to(constraints.corr_cholesky)], 4, 0, ValueError, "cannot map events of shape (4"),
        (
            [dist.transforms.AffineTransform(torch.zeros(3), 1.0)],
            1,
            0,
            ValueError,
            "maps events of shape (3,), but events of shape (1,)",
        ),
        ([torch.nn.Linear(2, 2)], 2, 0, TypeError, "torch or Pyro bijections, got Linear"),
        ([dist.transforms.AbsTransform()], 2, 0, TypeError, "bijections, got AbsTransform"),
        ([pf.NSF(2)], 2, 0, TypeError, "Of another flow, give flow.transform."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit(
    layers: Any, shape: Any, context: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        pf.Flow(layers, shape, context)
    assert message in str(caught.value)
