"""Guides in Pyro's param store: names, adoption, files, and copies."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.errors import ParamStoreError
from pyroflows.guides import LogJoint
from tests.models import gaussian, gaussian_data

Y = gaussian_data()


def small(features: int) -> pf.Flow:
    return pf.NSF(features, transforms=2, hidden_features=(8,), bins=4, act_norm=True)


def make(**kwargs: Any) -> pf.AutoFlow:
    return pf.AutoFlow(gaussian, small, example_args=(Y,), **kwargs)


def train(guide: Any, steps: int = 5, model: Any = gaussian) -> list[float]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(Y) for _ in range(steps)]


def density(guide: pf.AutoFlow) -> Tensor:
    with torch.no_grad():
        return guide.log_prob({"mean": torch.linspace(-2, 2, 14).reshape(7, 2)})


def moved(guide: pf.AutoFlow) -> bool:
    """Whether training changes the density."""
    before = density(guide)
    train(guide)
    return not torch.allclose(density(guide), before, atol=1e-3)


# --- names ----------------------------------------------------------------------------------------


def test_parameters_exist_right_after_construction() -> None:
    guide = make()
    stored = set(pyro.get_param_store())
    tensors = {*dict(guide.flow.named_parameters()), *dict(guide.flow.named_buffers())}
    assert stored == {f"AutoFlow.flow$$${name}" for name in tensors}
    for name, parameter in guide.flow.named_parameters():
        assert pyro.get_param_store()[f"AutoFlow.flow$$${name}"] is parameter
    train(guide)
    assert set(pyro.get_param_store()) == stored


def test_without_example_arguments_they_exist_from_the_first_call_on() -> None:
    guide = pf.AutoFlow(gaussian, small)
    assert not pyro.get_param_store().keys()
    guide(Y)
    assert "AutoFlow.flow$$$transform.standardization.loc" in pyro.get_param_store()


def test_names_are_explicit_and_stable() -> None:
    first = set(pyro.get_param_store().keys() if make(name="posterior") else ())
    pyro.clear_param_store()
    assert {name.split(".")[0] for name in first} == {"posterior"}
    make(name="posterior")
    assert set(pyro.get_param_store()) == first


def test_a_second_live_guide_has_its_own_name_and_trains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = make()
    train(first)
    kept = density(first)
    with caplog.at_level(logging.WARNING, "pyroflows"):
        second, third = make(), make()
    assert [guide.name for guide in (first, second, third)] == [
        "AutoFlow",
        "AutoFlow_1",
        "AutoFlow_2",
    ]
    assert (
        "'AutoFlow' belongs to another live guide: this one is called 'AutoFlow_1'" in caplog.text
    )
    assert moved(second)
    assert moved(third)
    assert torch.equal(density(first), kept)
    assert moved(first)


def test_two_guides_in_one_guide_do_not_clash() -> None:
    """Their sites have names of their own too."""
    first, second = make(), make()

    def both(y: Tensor) -> None:
        first(y)
        with pyro.poutine.block():
            second(y)

    assert all(torch.isfinite(torch.tensor(train(both))))


def test_a_name_is_free_when_its_guide_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    guide = make()
    train(guide)
    kept = density(guide)
    del guide
    gc.collect()
    with caplog.at_level(logging.WARNING, "pyroflows"):
        heir = make()
    assert heir.name == "AutoFlow"
    assert torch.equal(density(heir), kept)
    assert "parameters taken from the param store" in caplog.text


def test_a_name_is_free_when_the_store_is_cleared(caplog: pytest.LogCaptureFixture) -> None:
    old = make()
    train(old)
    trained = density(old)
    pyro.clear_param_store()
    with caplog.at_level(logging.WARNING, "pyroflows"):
        new = make()
    assert new.name == "AutoFlow"
    assert caplog.text == ""
    assert not torch.allclose(density(new), trained, atol=1e-3)
    # The old one goes on too, under a name of its own.
    old(Y)
    assert old.name == "AutoFlow_1"
    assert torch.equal(density(old), trained)
    assert moved(old)
    assert moved(new)


def test_a_cleared_store_does_not_lose_the_guide() -> None:
    guide = make()
    train(guide)
    kept = density(guide)
    pyro.clear_param_store()
    assert torch.equal(density(guide), kept)
    assert moved(guide)


@pytest.mark.parametrize("shape", ["features", "hidden"])
def test_a_mismatch_raises(shape: str) -> None:
    guide = make()
    kept = copy.deepcopy(guide.flow.state_dict())
    del guide
    gc.collect()

    def model() -> None:
        size = 3 if shape == "features" else 2
        pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    def other(features: int) -> pf.Flow:
        return pf.NSF(features, transforms=2, hidden_features=(9,), bins=4, act_norm=True)

    with pytest.raises(ParamStoreError, match=r"AutoFlow\.flow\$\$\$.*holds shape .*expects"):
        pf.AutoFlow(model, other if shape == "hidden" else small, example_args=())
    for name, value in kept.items():
        stored = pyro.get_param_store()[f"AutoFlow.flow$$${name}"]
        assert torch.equal(stored.to(value.dtype), value)
    assert pf.AutoFlow(model, small, name="other", example_args=()).name == "other"


def test_a_frozen_guide_stays_out_of_training() -> None:
    guide = make()
    train(guide)
    kept = density(guide)
    guide.requires_grad_(False)
    guide(Y)
    assert torch.equal(density(guide), kept)


def test_a_guide_inside_a_module() -> None:
    """A parent gives the names, as PyroModule does for everything else."""

    class Parent(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__(name="parent")
            self.guide = pf.AutoFlow(gaussian, small)

        def forward(self, y: Tensor) -> Any:
            return self.guide(y)

    parent = Parent()
    train(parent)
    assert {name.split("$$$")[0] for name in pyro.get_param_store()} == {"parent.guide.flow"}
    assert moved(parent.guide)


def test_two_parents_of_one_name() -> None:
    def parent() -> Any:
        module = pyro.nn.PyroModule("parent")
        module.guide = pf.AutoFlow(gaussian, small)
        return module

    first, second = parent(), parent()
    first.guide(Y)
    second.guide(Y)
    assert [first.guide.name, second.guide.name] == ["parent.guide", "parent.guide_1"]


# --- files ----------------------------------------------------------------------------------------


RESTORE = """
import sys
import pyro, torch
from tests.test_param_store import density, make
pyro.set_rng_seed(99)
{before}
pyro.get_param_store().load(sys.argv[1])
{after}
torch.save(density(guide), sys.argv[2])
assert guide.name == "AutoFlow"
from tests.test_param_store import moved
assert moved(guide)
"""


@pytest.mark.parametrize("order", ["store first", "guide first"])
def test_the_store_restores_a_guide_in_a_new_process(order: str, tmp_path: Path) -> None:
    """To the bit, with standardisation, permutations and the state of ActNorm."""
    guide = make()
    flow = guide.flow
    flow.transform.initialize_(torch.randn(50, 2))
    train(guide)
    with torch.no_grad():
        flow.transform.standardization.loc.add_(0.37)
        for layer in flow.transform.layers:
            if hasattr(layer, "order"):
                layer.order.copy_(layer.order.flip(0))
                layer.restore.copy_(layer.order.argsort())
    guide(Y)
    pyro.get_param_store().save(tmp_path / "store.pt")

    if order == "store first":
        code = RESTORE.format(before="", after="guide = make()")
    else:
        code = RESTORE.format(before="guide = make()", after="guide.register()")
    paths = [str(tmp_path / "store.pt"), str(tmp_path / "density.pt")]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "parameters taken from the param store" in done.stderr
    assert torch.equal(torch.load(paths[1]), density(guide))


def test_a_state_dict_into_a_fresh_guide() -> None:
    guide = make()
    train(guide)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(density(fresh), density(guide))


# --- copies ---------------------------------------------------------------------------------------


def test_a_deepcopy_after_use_is_a_guide_of_its_own() -> None:
    guide = make()
    train(guide)
    kept = density(guide)
    twin = copy.deepcopy(guide)
    assert torch.equal(density(twin), kept)
    assert moved(twin)
    assert (guide.name, twin.name) == ("AutoFlow", "AutoFlow_1")
    assert torch.equal(density(guide), kept)
    assert moved(guide)
    shared = {p.data_ptr() for p in guide.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared
    assert twin.log_joint(torch.zeros(3, 2), Y).shape == (3,)
    assert twin.original_model is gaussian


def test_a_deepcopy_of_a_guide_of_a_model_with_parameters() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2) * scale, scale).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    guide = pf.AutoFlow(model, small, example_args=(Y,))
    train(guide, model=model)
    guide.log_joint(torch.zeros(2, 2), Y)
    twin = copy.deepcopy(guide)
    train(twin, model=model)
    assert torch.equal(
        pickle.loads(pickle.dumps(guide)).unpack(torch.zeros(2))["mean"], torch.zeros(2)
    )


def test_a_pickle_after_use_comes_back_without_its_model() -> None:
    guide = make()
    train(guide)
    again = pickle.loads(pickle.dumps(guide))
    assert torch.equal(density(again), density(guide))
    assert again.sample(3)["mean"].shape == (3, 2)
    with pytest.raises(RuntimeError, match=r"unpickled.*pyroflows\.load"):
        again.log_joint(torch.zeros(2, 2), Y)
    again.register()
    assert again.name == "AutoFlow_1"


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_carry_no_data(how: str) -> None:
    """Neither the example arguments nor the last batch, nor anything of their size."""

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    y = torch.randn(100_000, 2)
    guide = pf.AutoFlow(model, small, example_args=(y,))
    SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).step(y)
    guide.log_joint(torch.zeros(2, 2), y)
    data = pickle.dumps(copy.deepcopy(guide) if how == "deepcopy" else guide)
    state = sum(t.numel() * t.element_size() for t in guide.state_dict().values())
    assert len(data) < 10 * state + 50_000 < y.numel() * 4


def test_module_local_parameters_need_no_store() -> None:
    with pyro.settings.context(module_local_params=True):
        guide = make()
        before = density(guide)
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            Trace_ELBO().differentiable_loss(gaussian, guide, Y).backward()
            optimizer.step()
        assert not torch.allclose(density(guide), before, atol=1e-3)
        assert not [name for name in pyro.get_param_store() if "AutoFlow" in name]


def test_log_joint_is_shared_by_copies() -> None:
    """What was found out about the model need not be found out again."""
    guide = make()
    guide.log_joint(torch.zeros(2, 2), Y)
    assert isinstance(guide._log_joint, LogJoint)
    assert copy.deepcopy(guide)._log_joint is guide._log_joint


def test_plain_optimisers_train_a_guide() -> None:
    guide = make()
    before = density(guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        pf.training.NegativeELBO(guide, draws=8)((Y,)).backward()
        optimizer.step()
    assert not torch.allclose(density(guide), before, atol=1e-3)
    assert isinstance(guide, nn.Module)
