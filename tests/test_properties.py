"""Every property over every case of the table in `tests/cases`."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Distribution
from torch.distributions import Transform as TorchTransform

import pyroflows as pf
from pyroflows import testing
from tests.cases import CASES, ELSEWHERE, FLOWS, Case

ROOT = Path(__file__).parents[1]
SCALES = [None, 0.3, 1.0]
# For checks whose cost grows with every feature, and which five features pass or fail alike.
FEW_FEATURES = [case for case in CASES if case.event_shape != (64,)]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-{c.name}")
few_features = pytest.mark.parametrize("case", FEW_FEATURES, ids=lambda c: f"{c.kind}-{c.name}")
every_scale = pytest.mark.parametrize("scale", SCALES, ids=["init", "scale0.3", "scale1"])


def transform_of(made: TorchTransform | Distribution) -> Any:
    return made if isinstance(made, TorchTransform) else made.transforms[0]


# --- the table is complete --------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["transforms", "layers", "distributions", "flows", "nn", "numerics"]
)
def test_every_public_name_has_a_case(part: str) -> None:
    public = {f"{part}.{name}" for name in importlib.import_module(f"pyroflows.{part}").__all__}
    covered = {name for case in CASES for name in case.covers}
    assert public - covered - set(ELSEWHERE) == set()
    stale = {name for name in covered | set(ELSEWHERE) if name.startswith(f"{part}.")} - public
    assert stale == set()


def test_every_name_of_the_package_is_tested() -> None:
    """Guides, fits and files have no case: a test file of their own must name them."""
    covered = {name for case in CASES for name in case.covers}
    files = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    text = "\n".join(path.read_text() for path in files)
    names = [n for n in pf.__all__ if not inspect.ismodule(getattr(pf, n)) and n != "__version__"]
    assert [n for n in names if f"pyroflows.{n}" not in covered and n not in text] == []


@pytest.mark.parametrize(("name", "file"), ELSEWHERE.items(), ids=ELSEWHERE)
def test_what_is_tested_elsewhere_is_tested_there(name: str, file: str) -> None:
    assert name.split(".")[1] in (ROOT / file).read_text()


# --- the map ----------------------------------------------------------------------------------


@every_case
@every_scale
def test_round_trip(case: Case, scale: float | None, device: torch.device) -> None:
    made = case.make(scale, device=device)(case.contexts(device=device))
    x, y = case.points(device=device), case.data(device=device)
    testing.check_round_trip(transform_of(made), x, case.tolerance, y)


@every_case
@every_scale
def test_log_determinant(case: Case, scale: float | None, device: torch.device) -> None:
    made = case.make(scale, device=device)(case.contexts(device=device))
    x, y = case.points(device=device), case.data(device=device)
    testing.check_jacobian(transform_of(made), x, case.tolerance, y)


@every_case
def test_fused_passes(case: Case, device: torch.device) -> None:
    made = case.make(0.3, device=device)(case.contexts(device=device))
    x, y = case.points(device=device), case.data(device=device)
    testing.check_fused(transform_of(made), x, case.tolerance, y)


@every_case
def test_identity_at_the_start(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    transform = transform_of(case.make(None, dtype, device)(case.contexts(3, dtype, device)))
    x = case.points(3, dtype, device)
    y, ladj = transform.call_and_ladj(x)
    if not case.identity:
        assert not torch.equal(y, x)
        return
    rounding = 100 * torch.finfo(dtype).eps
    testing.check_close("value", y, x, testing.tools.relative(rounding, x))
    testing.check_close("ladj", ladj, torch.zeros_like(ladj), rounding)


@every_case
def test_slow_direction_is_declared(case: Case) -> None:
    transform = transform_of(case.make()(case.contexts()))
    assert transform.sequential_forward == (case.slow == "forward")
    assert transform.sequential_inverse == (case.slow == "inverse")
    assert transform.inv.sequential_forward == transform.sequential_inverse


# --- the density ------------------------------------------------------------------------------


@every_case
def test_batching(case: Case, device: torch.device) -> None:
    module = case.make(0.3, device=device)
    testing.check_batching(module, case.data(device=device), case.contexts(device=device))


@pytest.mark.parametrize("case", [c for c in CASES if c.context], ids=lambda c: c.name)
def test_context_broadcasting(case: Case, device: torch.device) -> None:
    """(5, 1, 3) contexts against (6, 4) values, for one."""
    context = case.contexts(5, device=device)
    testing.check_context(case.make(0.3, device=device), case.data(6, device=device), context)


@every_case
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
@every_scale
def test_tails(
    case: Case, scale: float | None, precision: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(4)
    size = torch.Size(case.event_shape)
    signs = torch.randn(4, *size, generator=generator).sign()
    alone = torch.zeros(4, *size)
    alone.view(4, -1)[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    directions = torch.cat([signs, alone]).to(device, precision)
    module = case.make(scale, precision, device)
    context = case.contexts(8, precision, device)
    testing.check_tails(module, directions, context, case.magnitudes, case.support)


@few_features
def test_nan(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    module = case.make(0.3, dtype, device)
    testing.check_nan(module, case.data(3, dtype, device), case.contexts(3, dtype, device))


@pytest.mark.parametrize(
    "case",
    [c for c in FLOWS if c.event_shape in ((1,), (2,)) and not c.context],
    ids=lambda c: c.name,
)
def test_mass(case: Case, device: torch.device) -> None:
    with torch.no_grad():
        flow = case.make(0.3, device=device)()
        testing.check_mass(flow, support=case.base_support)


@pytest.mark.parametrize(
    "case", [c for c in FLOWS if c.event_shape in ((1,), (2,)) and c.context], ids=lambda c: c.name
)
def test_mass_given_a_context(case: Case, device: torch.device) -> None:
    context = case.contexts(1, device=device)
    assert context is not None
    flow = case.make(0.3, device=device)(context[0])
    testing.check_mass(flow, support=case.base_support)


# --- dtype, device, state ---------------------------------------------------------------------


CHECKS: list[Callable[..., None]] = [
    testing.check_dtype,
    testing.check_defaults,
    testing.check_meta,
    testing.check_copies,
]


@every_case
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_dtype_device_and_copies(
    case: Case, check: Callable[..., None], dtype: torch.dtype, device: torch.device
) -> None:
    module = case.make(0.3, dtype, device)
    check(module, case.data(3, dtype, device), case.contexts(3, dtype, device))


@every_case
def test_state(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Also where the other module was used before: nothing is remembered."""
    module, other = case.make(0.3, dtype, device), case.make(None, dtype, device)
    torch.manual_seed(1)
    testing.redraw_(other, 1.0)
    value, context = case.data(3, dtype, device), case.contexts(3, dtype, device)
    testing.check_state(module, other, value, context)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.vmap], ids=lambda c: f"{c.kind}-{c.name}")
def test_vmap_and_grad(case: Case, device: torch.device) -> None:
    module = case.make(0.3, device=device)
    testing.check_vmap_grad(module, case.data(device=device), case.contexts(device=device))


@few_features
def test_gradients(case: Case) -> None:
    testing.check_gradients(case.make(0.3), case.generic(2), case.contexts(2))


# Where there is one feature, or one component, nothing is there to be learned between them.
ALONE = (
    "FullNormal.factor",
    "Householder.vectors",
    "LULinear.factors",
    "MaskedLinear.weight",
    "Mixture.logits",
    "OrthogonalLinear.weight",
)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.kind != "transform"], ids=lambda c: f"{c.kind}-{c.name}"
)
def test_every_parameter_matters(case: Case) -> None:
    idle = ALONE if case.event_shape[0] == 1 or case.name == "mixture-one" else ()
    module = case.make(0.3)
    testing.check_every_parameter(module, case.data(64), case.contexts(64), idle)


# --- precision --------------------------------------------------------------------------------


# Without noise; layers that take seconds are fewer.
EXACT: dict[str, dict[str, Any]] = {
    "CNF": {"trace": "exact"},
    "ResidualFlow": {"log_det": "exact"},
    "TransformerAR": {"transforms": 2},
}
# Polynomials add terms of either sign: up to 1.7e-4 was seen, of log densities beyond 100.
COARSER = {"BPF": 3e-4, "SOSPF": 3e-4}
ALL_RECIPES = [(name, {}) for name in pf.list_flows()] + [("NSF", {"autoregressive": True})]


def five_layers(name: str, features: int, options: dict[str, Any]) -> Any:
    """Of the default size."""
    torch.manual_seed(0)
    recipe = pf.get_flow(name)
    if "transforms" in inspect.signature(recipe).parameters:
        options = {"transforms": 5, **options}
    return recipe(features, **{**options, **EXACT.get(name, {})})


@pytest.mark.parametrize("features", [1, 2, 5, 64])
@pytest.mark.parametrize(
    ("name", "options"), ALL_RECIPES, ids=["-".join([name, *o]) for name, o in ALL_RECIPES]
)
@pytest.mark.parametrize("scale", [None, 0.3], ids=["init", "scale0.3"])
def test_float32(name: str, options: dict[str, Any], features: int, scale: float | None) -> None:
    """Five layers of the default size, on standard normal points: within 1e-4 of float64.

    Not at scale 1: log densities of -1e10 and beyond leave no such digits.
    """
    flow = five_layers(name, features, options)
    if scale is not None:
        testing.redraw_(flow, scale)
    x = torch.randn(256, features)
    if name == "NCSF":
        x = x.remainder(2 * math.pi) - math.pi
    with torch.no_grad():
        single = flow().log_prob(x).double()
        double = flow.double()().log_prob(x.double())
    testing.check_close("float32", single, double, COARSER.get(name, 1e-4))
