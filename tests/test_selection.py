"""Names of flows, the instant recommendation, and the selection on data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows import flows
from pyroflows.errors import DataError, FitError, ShapeError
from pyroflows.flows import Candidate, FlowInfo
from pyroflows.flows.catalogue import CATALOGUE
from pyroflows.flows.recommend import shortlist
from pyroflows.training import Selection


def correlated(rows: int) -> Tensor:
    return torch.randn(rows, 2) @ torch.tensor([[1.0, 3.0], [0.0, 0.1]])


SMALL = {"transforms": 1, "hidden_features": (4,)}
#: Without mixing, one coupling of its second feature: it cannot learn the first one's scale.
POOR = Candidate("NICE", SMALL)
GOOD = Candidate("MAF", SMALL)


# --- the catalogue ------------------------------------------------------------------------------


def test_every_recipe_is_in_the_catalogue() -> None:
    public = {getattr(flows, name) for name in flows.__all__}
    recipes = {v for v in public if isinstance(v, type) and issubclass(v, flows.Flow)}
    # Those that are made of layers, or of another flow, are not taken by name.
    recipes -= {flows.Flow, flows.Dequantized}
    assert {info.recipe for info in CATALOGUE} == recipes
    assert all(
        isinstance(info, FlowInfo) and info.recipe.__name__ in pf.__all__ for info in CATALOGUE
    )


@pytest.mark.parametrize("name", pf.list_flows())
def test_get_flow(name: str) -> None:
    assert pf.get_flow(name) is getattr(pf, name)
    assert pf.get_flow(name.upper()) is pf.get_flow(name.lower()) is pf.get_flow(name)


@pytest.mark.parametrize(("name", "near"), [("nfs", "NSF"), ("RealNPV", "RealNVP"), ("mfa", "MAF")])
def test_an_unknown_name_lists_the_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}'\. Did you mean .*{near}"):
        pf.get_flow(name)


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(ValueError, match="There are NSF, MAF, RealNVP"):
        pf.get_flow("!!!!")


# --- recommend ----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 2, 6, 64, 1000])
@pytest.mark.parametrize("rows", [50, 2_000, 1_000_000])
def test_recommended_densities_can_be_built_and_scored(features: int, rows: int) -> None:
    for candidate in [pf.recommend(features, rows), *shortlist(features, rows)]:
        flow = candidate.build(features)
        assert flow().log_prob(torch.zeros(features)).isfinite()
        assert sum(p.numel() for p in flow.parameters()) < 20_000_000


@pytest.mark.parametrize("features", [1, 10, 2000])
def test_recommended_guides_draw_in_one_pass(features: int) -> None:
    flow = pf.recommend(features, purpose="guide").build(features)
    assert not flow.transform.sequential_forward
    assert not flow.transform.sequential_inverse
    assert flow().rsample_and_log_prob((2,))[1].isfinite().all()


def test_a_candidate_says_what_it_is() -> None:
    candidate = Candidate("NSF", {"bins": 4}, "because")
    assert str(candidate) == "NSF(features, bins=4): because"
    assert candidate.build(2, 3, bins=2).context_size == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10), "features: expected at least 1, got 0"),
        ((2,), "rows: expected at least 1 row to fit a density to, got None"),
        ((2, 0), "rows: expected at least 1 row"),
        ((2, 10, "prior"), "purpose: expected 'density' or 'guide', got 'prior'"),
    ],
)
def test_recommend_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pf.recommend(*arguments)  # type: ignore[arg-type]


# --- select -------------------------------------------------------------------------------------


def test_selection_finds_the_better_flow() -> None:
    choice = pf.select(correlated(600), candidates=[POOR, GOOD, "RealNVP"], budget=450)
    assert isinstance(choice, Selection)
    assert choice.name == choice.table[0].candidate.name != "NICE"
    assert {e.candidate.name for e in choice.table} == {"NICE", "MAF", "RealNVP"}
    winner, *others = choice.table
    assert winner.difference == winner.error == 0
    assert all(e.difference < 0 < e.error for e in others)
    # Two rounds of 225 steps: 75 for each of three, then 112 for each of two.
    assert [e.steps for e in choice.table] == [187, 187, 75]
    poor = next(e for e in choice.table if e.candidate is POOR)
    expected = poor.scores.mean() - winner.scores.mean()
    assert poor.difference == pytest.approx(expected.item())
    assert "NICE(features, transforms=1, hidden_features=(4,))" in str(choice)


def test_the_winner_is_fitted_and_scored_on_rows_it_has_not_seen() -> None:
    x = correlated(500)
    choice = pf.select(x, candidates=[GOOD], budget=300, held_out=0.4)
    assert len(choice.table[0].scores) == 200
    with torch.no_grad():
        assert choice.flow().log_prob(correlated(2000)).mean() == pytest.approx(
            choice.table[0].nats, abs=0.2
        )


def test_selection_is_reproducible_and_leaves_the_random_state_alone() -> None:
    x = correlated(200)
    torch.manual_seed(5)
    first = pf.select(x, candidates=[POOR, GOOD], budget=40, seed=1)
    drawn = torch.rand(1)
    second = pf.select(x, candidates=[POOR, GOOD], budget=40, seed=1)
    other = pf.select(x, candidates=[POOR, GOOD], budget=40, seed=2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(first.table[0].scores, second.table[0].scores)
    assert not torch.equal(first.table[0].scores, other.table[0].scores)


def test_arrays_may_be_read_only() -> None:
    x = correlated(100).numpy()
    x.setflags(write=False)
    assert pf.select(x, candidates=[GOOD], budget=2).name == "MAF"


def test_conditional_selection() -> None:
    context = torch.randn(400, 1)
    x = torch.cat([context, -context], -1) + 0.1 * torch.randn(400, 2)
    choice = pf.select(x, context, candidates=[GOOD, "RealNVP"], budget=100)
    assert choice.flow.context_size == 1
    assert choice.flow(context).batch_shape == (400,)


def test_a_candidate_whose_fit_fails_leaves_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail_for_nice(flow: pf.Flow, *args: object, **options: object) -> object:
        if isinstance(flow, pf.NICE):
            raise FitError("its loss is not finite")
        return pf.fit_mle(flow, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("pyroflows.training.selection.fit_mle", fail_for_nice)
    choice = pf.select(correlated(200), candidates=[POOR, GOOD], budget=20)
    assert choice.name == "MAF"
    assert choice.table[1].problem == "its loss is not finite"
    assert "its loss is not finite" in str(choice)
    with pytest.raises(FitError, match="every candidate failed: NICE: its loss is not finite"):
        pf.select(correlated(200), candidates=[POOR], budget=20)


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (100, {"held_out": 0.0}, ValueError, "held_out: expected a share between 0 and 1"),
        (100, {"budget": 1}, ValueError, "budget: expected at least 2 steps for 2 candidates"),
        (100, {"candidates": []}, ValueError, "candidates: expected at least one"),
        (100, {"candidates": ["NFS"]}, ValueError, "Did you mean NSF"),
        (20, {}, DataError, "at least 10 rows on either side of the split, got 20"),
    ],
)
def test_select_refuses(
    rows: int, options: dict[str, object], error: type[Exception], message: str
) -> None:
    options = {"candidates": [POOR, GOOD], "budget": 20, **options}
    with pytest.raises(error, match=message):
        pf.select(correlated(rows), **options)  # type: ignore[arg-type]


def test_select_wants_rows() -> None:
    with pytest.raises(ShapeError, match=r"expected rows \(N, features\), got shape \(5,\)"):
        pf.select(torch.zeros(5))
    with pytest.raises(DataError, match="row 3"):
        pf.select(torch.ones(50, 2).index_fill(0, torch.tensor(3), torch.nan), candidates=[GOOD])
