"""Each property check fails the module that breaks its property, and says how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from pyroflows import testing
from pyroflows.errors import ShapeError
from pyroflows.testing import CheckError
from pyroflows.transforms import DiagonalAffineTransform

F64 = torch.float64


class Faulty(DiagonalAffineTransform):
    """An affine map with one fault."""

    def __init__(self, owner: FaultyLayer, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__(shift, log_scale)
        # A context gives the shift a batch of its own.
        self.event_dims = 1
        self.domain = self.codomain = torch.distributions.constraints.real_vector
        self.owner = owner

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = super().call_and_ladj(x)
        return y, ladj * 2 if self.owner.fault == "ladj" else ladj

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        ladj = super().log_abs_det_jacobian(x, y)
        return ladj + 1 if self.owner.fault == "fused" else ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        fault = self.owner.fault
        if fault == "tails":
            y = y.exp().log()
        elif fault == "nan":
            y = y.nan_to_num(0.0)
        elif fault == "vmap" and (y > 100).any():
            y = -y
        elif fault == "gradients":
            y = y + y.detach() - y.detach().clone() + (y - y.detach())
        elif fault == "batching" and y.dim() > 1:
            y = y - y.mean(0)
        elif fault == "dtype":
            y = y + self.owner.unseen
        elif fault == "defaults":
            y = y + torch.zeros(3)
        elif fault == "memory":
            self.owner.last = y.detach()
        x, ladj = super().inverse_and_ladj(y)
        return (x + 1e-3 if fault == "inverse" else x), ladj


class FaultyLayer(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.last: Tensor | None = None
        self.shift, self.log_scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.unseen = torch.randn(3, dtype=F64)

    def forward(self, context: Tensor | None = None) -> Faulty:
        if context is not None and self.fault == "context" and context.dim() > 1:
            context = context.flip(0)
        shift = self.shift if context is None else self.shift + context
        if self.fault in ("state", "meta"):
            shift = shift + self.unseen
        log_scale = self.log_scale.detach() if self.fault == "unused" else self.log_scale
        return Faulty(self, shift, log_scale)


def transformed(check: Callable[..., None]) -> Callable[..., None]:
    return lambda layer, value: check(layer(), value)


CHECKS: dict[str, Callable[..., None]] = {
    "ladj": transformed(testing.check_jacobian),
    "inverse": transformed(testing.check_round_trip),
    "fused": transformed(testing.check_fused),
    "tails": testing.check_tails,
    "nan": testing.check_nan,
    "vmap": testing.check_vmap_grad,
    "gradients": testing.check_gradients,
    "batching": testing.check_batching,
    "context": lambda layer, value: testing.check_context(layer, value, value[:5]),
    "dtype": testing.check_dtype,
    "defaults": testing.check_defaults,
    "memory": testing.check_copies,
    "meta": testing.check_meta,
    "unused": testing.check_every_parameter,
    "state": lambda layer, value: testing.check_state(layer, FaultyLayer("state").double(), value),
}


@pytest.mark.parametrize("fault", CHECKS)
def test_check_passes_what_is_right_and_fails_what_is_not(fault: str) -> None:
    value = torch.randn(6, 3, dtype=F64)
    sound = FaultyLayer("none").double()
    if fault != "state":
        CHECKS[fault](sound, value)
    with pytest.raises((CheckError, RuntimeError)):
        CHECKS[fault](FaultyLayer(fault).double(), value)


def test_every_check_is_tried_here() -> None:
    names = {name for name in testing.__all__ if name.startswith("check_")}
    source = Path(__file__).read_text()
    assert [name for name in names if f"testing.{name}" not in source] == []


def test_what_cannot_matter_is_named() -> None:
    layer, value = FaultyLayer("unused").double(), torch.randn(6, 3, dtype=F64)
    with pytest.raises(
        CheckError, match=r"in 1 of 2 parameters: log_scale \(FaultyLayer.log_scale"
    ):
        testing.check_every_parameter(layer, value)
    testing.check_every_parameter(layer, value, idle=("FaultyLayer.log_scale",))


def test_failure_says_where_and_how_much() -> None:
    got, expected = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([1.0, 2.0, 3.5])
    with pytest.raises(CheckError) as caught:
        testing.check_close("what", got, expected, 0.1)
    message = str(caught.value)
    assert "what: 2 of 3 entries differ, shape (3,), torch.float32" in message
    assert "flat index 1: got nan, expected 2" in message
    assert "NaNs: got 1, expected 0" in message
    with pytest.raises(CheckError, match=r"expected \(3,\) of torch.float32, got \(2,\) of"):
        testing.check_close("what", got[:2], expected)
    testing.check_close("equal infinities and NaNs", got / 0, got / 0)


def test_mass_of_something_else_than_a_density() -> None:
    class Double(Normal):
        def log_prob(self, value: Tensor) -> Any:
            return super().log_prob(value) + 0.01

    with pytest.raises(CheckError, match="mass"):
        testing.check_mass(Double(torch.zeros(2), 1.0).to_event(1))
    with pytest.raises(ShapeError, match="one or two features"):
        testing.check_mass(Normal(torch.zeros(3), 1.0).to_event(1))


def test_redraw_uses_the_fan_in() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(400, 50)
            self.matrix = nn.Parameter(torch.zeros(100, 25))
            self.scalar = nn.Parameter(torch.zeros(()))

    torch.manual_seed(0)
    module = Mixed()
    testing.redraw_(module, 0.5)
    for tensor, fan_in in (
        (module.linear.weight, 400),
        (module.linear.bias, 400),
        (module.matrix, 25),
    ):
        assert tensor.std().item() == pytest.approx(0.5 / fan_in**0.5, rel=0.3)
    assert module.scalar.item() != 0
    torch.manual_seed(0)
    double = Mixed().double()
    testing.redraw_(double, 0.5)
    torch.testing.assert_close(double.matrix.float(), module.matrix)


@pytest.mark.parametrize("name", testing.SAMPLERS)
def test_two_dimensional_rows_are_finite_and_reproducible(name: str) -> None:
    rows = testing.two_dimensional(name, 2000, seed=1)
    assert rows.shape == (2000, 2)
    assert rows.isfinite().all()
    assert (rows.std(0) > 0.1).all()
    torch.manual_seed(7)
    torch.testing.assert_close(testing.two_dimensional(name, 2000, seed=1), rows, rtol=0, atol=0)
    assert not rows.equal(testing.two_dimensional(name, 2000, seed=2))


def test_unknown_density() -> None:
    with pytest.raises(ValueError, match=r"expected one of moons, .*, got 'moon'"):
        testing.two_dimensional("moon", 5)
