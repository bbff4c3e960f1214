"""`torch.compile` of densities, against eager float64: values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyroflows.distributions import StudentT
from pyroflows.testing import check_close, redraw_
from tests.recipes import NAMES, small

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in NAMES} | {
    "NSF-autoregressive": ("NSF", {"autoregressive": True}),
    "NSF-linear": ("NSF", {"spline": "linear"}),
    "student-t": ("NSF", {"base": StudentT(3)}),
    "act-norm": ("MAF", {"act_norm": True}),
}
# Both dtypes take twice the time: in float32, one of each kind of map.
IN_FLOAT32 = ("NSF", "MAF", "RealNVP", "IAF", "FlowPP", "student-t", "act-norm")

# The compiler's own modules use what torch has deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning"),
]


@pytest.fixture(autouse=True)
def argument_validation() -> Iterator[None]:
    """Dynamo switches the validation of all distributions off, for good."""
    before = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


def with_gradients(density: Any, flow: nn.Module, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    score = density(*leaves)
    wanted = [*leaves, *flow.parameters()]
    return [score, *torch.autograd.grad(score.sum(), wanted, materialize_grads=True)]


def compare(flow: Any, inputs: list[Tensor], density: Any, dtype: torch.dtype) -> None:
    """``density(flow)`` compiled in a dtype against itself, eager, in float64."""
    double = copy.deepcopy(flow).double()
    expected = with_gradients(density(double), double, *[t.double() for t in inputs])
    module = copy.deepcopy(flow).to(dtype)
    torch.compiler.reset()
    compiled = torch.compile(density(module), fullgraph=True)
    got = with_gradients(compiled, module, *[t.to(dtype) for t in inputs])
    names = ["density", *(f"gradient {i}" for i in range(len(got)))]
    rounding = 1e-10 if dtype == torch.float64 else 1e-4
    for name, a, b in zip(names, got, expected, strict=False):
        check_close(name, a.double(), b, rounding * (1 + b.detach().abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_compiled_density(case: str) -> None:
    name, options = CASES[case]
    flow = small(name, 3, **options)
    redraw_(flow, 0.3)
    # Points within and beyond a spline's box.
    x = torch.randn(64, 3, dtype=torch.float64) * 3
    if name == "NCSF":
        x = x.remainder(2 * math.pi) - math.pi
    for dtype in (torch.float64, *((torch.float32,) if case in IN_FLOAT32 else ())):
        compare(flow, [x], lambda f: lambda v: f().log_prob(v), dtype)


@pytest.mark.parametrize("name", ["NSF", "MAF"])
def test_compiled_density_given_a_context(name: str) -> None:
    flow = small(name, 3, 2)
    redraw_(flow, 0.3)
    inputs = [torch.randn(8, 3, dtype=torch.float64), torch.randn(5, 1, 2, dtype=torch.float64)]
    compare(flow, inputs, lambda f: lambda v, c: f(c).log_prob(v), torch.float64)


def test_compiled_draws_have_the_eager_scores() -> None:
    flow = small("NSF", 3).double()
    redraw_(flow, 0.3)
    torch.compiler.reset()
    x, score = torch.compile(lambda: flow().rsample_and_log_prob((16,)), fullgraph=True)()
    check_close("score", score, flow().log_prob(x), 1e-10)


@pytest.mark.parametrize("options", [{}, {"autoregressive": True}])
def test_compiled_scores_without_gradients(options: dict[str, Any]) -> None:
    """Where nobody asks for gradients the compiler sees other operations, and larger products."""
    flow = small("NSF", 3, **options | {"hidden_features": (128, 128)})
    redraw_(flow, 0.3)
    x = torch.randn(1024, 3) * 3
    torch.compiler.reset()
    compiled = torch.compile(lambda x: flow().log_prob(x), fullgraph=True)
    with torch.no_grad():
        check_close("score", compiled(x).double(), flow.double()().log_prob(x.double()), 1e-3)


def test_compiled_scores_under_vmap() -> None:
    flow = small("NSF", 3, hidden_features=(128, 128))
    redraw_(flow, 0.3)
    x = torch.randn(2, 1024, 3)
    torch.compiler.reset()
    compiled = torch.compile(torch.func.vmap(lambda x: flow().log_prob(x)), fullgraph=True)
    with torch.no_grad():
        check_close("score", compiled(x), flow().log_prob(x), 1e-3)
