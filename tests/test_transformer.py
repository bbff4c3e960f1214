"""The causal transformer: its wiring, its two ways of evaluation, and the flow made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.layers import TransformerLayer
from pyroflows.nn import CausalTransformer
from pyroflows.testing import check_close, jacobian, redraw_
from pyroflows.transforms import RationalQuadratic

SMALL = {"width": 8, "heads": 2}


def network(features: int, context: int = 0, **options: Any) -> CausalTransformer:
    net = CausalTransformer(features, context, count=2, **SMALL, **options).double()
    redraw_(net, 1.0)
    return net


@pytest.mark.parametrize("order", [None, [2, 0, 4, 1, 3]])
def test_outputs_depend_on_the_features_before_and_on_all_of_them(order: Any) -> None:
    net = network(5, order=order)
    x = torch.randn(3, 5, dtype=torch.float64)
    slopes = jacobian(net, x, 1).unflatten(-2, (2, 5)).abs().amax((0, 1))
    rank = net.order.argsort()
    before = rank[:, None] > rank[None, :]
    assert (slopes[~before] == 0).all()
    assert (slopes[before] > 1e-6).all()


def test_every_output_depends_on_the_context() -> None:
    net = network(3, 2)
    x = torch.randn(3, dtype=torch.float64)
    slopes = jacobian(lambda c: net(x, c), torch.randn(2, dtype=torch.float64), 1)
    assert (slopes.abs() > 1e-6).all()


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("features", [1, 2, 7])
def test_unrolled_as_at_once(features: int, context: int) -> None:
    net = network(features, context, order=list(range(features))[::-1], blocks=3)
    x = torch.randn(6, features, dtype=torch.float64)
    c = torch.randn(5, 1, 3, dtype=torch.float64) if context else None
    batch, order, steps = net.unroll(x, c)
    columns = x.index_select(-1, order).expand(*batch, features).reshape(-1, features)
    out = [next(steps), *(steps.send(column) for column in columns.unbind(-1)[:-1])]
    got = torch.stack(out, -1)[..., order.argsort()].movedim(0, 1).flatten(1)
    assert batch == ((5, 6) if context else (6,))
    check_close("unrolled", got.reshape(*batch, -1), net(x, c).expand(*batch, -1), 1e-10)


def test_a_token_is_computed_once_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow direction costs the arithmetic of one pass, not one pass per feature."""
    tokens: list[int] = []
    plain = torch.nn.functional.linear

    def counting(x: Tensor, *args: Any) -> Tensor:
        tokens.append(x[..., 0].numel())
        return plain(x, *args)

    transform = TransformerLayer(9, blocks=2, **SMALL)()
    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    transform.inv(torch.zeros(9))
    one_pass, tokens[:] = sum(tokens), []
    transform(torch.zeros(9))
    assert sum(tokens) == one_pass == 9 * (2 * 4 + 1)


def test_256_features_are_drawn_finite_in_float32() -> None:
    flow = pf.TransformerAR(256, transforms=2, width=16, heads=2, blocks=1)
    redraw_(flow, 1.0)
    x = flow().sample((8,))
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert flow().log_prob(x).isfinite().all()
    assert flow().log_prob(1e4 * torch.ones(256)).isfinite()


def test_parameters_grow_with_the_features_only_in_proportion() -> None:
    sizes = [sum(p.numel() for p in TransformerLayer(n).parameters()) for n in (100, 200, 300)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 100 * 2 * 64


def test_a_value_far_out_leaves_room_for_the_others() -> None:
    """Beside a value of 1e6 the next one still counts."""
    net = network(3)
    far = torch.tensor([1e6, 1.0, 0.0], dtype=torch.float64)
    other = torch.tensor([1e6, -1.0, 0.0], dtype=torch.float64)
    assert (net(far) - net(other)).abs().max() > 1e-3


def test_splines_learn_a_skewed_density() -> None:
    x = torch.randn(512, 2)
    x[:, 1] = x[:, 0] ** 2 + 0.1 * x[:, 1]
    flow = pf.TransformerAR(
        2, transforms=2, univariate=RationalQuadratic(), width=16, heads=2, blocks=1
    )
    before = -flow().log_prob(x).mean()
    fit = pf.fit_mle(flow, x, steps=200, lr=5e-3, batch_size=128, seed=0)
    # The truth has an entropy of about 0.53 nats, the best Gaussian 3.6.
    assert before > 3.0
    assert fit.history.best[1] < 1.5


def test_saved_and_loaded(tmp_path: Path) -> None:
    flow = pf.TransformerAR(3, 2, univariate=RationalQuadratic(4), mixing="lu", **SMALL)
    redraw_(flow, 0.5)
    pf.save(flow, tmp_path / "flow.pf")
    x, c = torch.randn(4, 3), torch.randn(4, 2)
    loaded = pf.load(tmp_path / "flow.pf")
    assert torch.equal(loaded(c).log_prob(x), flow(c).log_prob(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 4}, "heads that divide the width; got width=10, heads=4"),
        ({"blocks": 0}, "positive width, heads and blocks"),
        ({"one_pass": "both"}, "one_pass: expected 'forward' or 'inverse', got 'both'"),
        ({"order": [0, 0, 1]}, "order: expected a permutation of 3 features"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerLayer(3, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")
def test_compiled_density() -> None:
    flow = pf.TransformerAR(5, transforms=2, **SMALL).double()
    redraw_(flow, 0.5)
    x = torch.randn(16, 5, dtype=torch.float64)
    validation = torch.distributions.Distribution._validate_args
    compiled = torch.compile(lambda v: flow().log_prob(v), fullgraph=True)
    got = compiled(x)
    # Dynamo switches it off for good.
    torch.distributions.Distribution.set_default_validate_args(validation)
    check_close("density", got, flow().log_prob(x), 1e-10)
