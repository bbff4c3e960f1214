"""Files: what is saved comes back to the bit, and nothing else is accepted."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.distributions import DiagonalNormal, StudentT
from pyroflows.errors import SavedFileError
from pyroflows.flows.description import digest
from pyroflows.guides import AutoFlow
from pyroflows.layers import (
    ActNorm,
    AutoregressiveLayer,
    CouplingLayer,
    Layer,
    LULinear,
    Permutation,
)
from pyroflows.transforms import Affine, RationalQuadratic

SMALL = {"transforms": 2, "hidden_features": (8, 8)}


def hand_made() -> pf.Flow:
    spline = RationalQuadratic(bins=4, bound=3.0)
    mask = torch.tensor([True, False, True])
    layers: list[Layer] = [
        CouplingLayer(3, mask=mask, univariate=spline, activation=nn.Tanh),
        Permutation(3, [2, 0, 1]),
        AutoregressiveLayer(3, one_pass="forward", order=range(3), univariate=Affine(1.5)),
        ActNorm(3),
        LULinear(3),
    ]
    return pf.Flow(iter(layers), 3, base=DiagonalNormal(3))


def tied_weights() -> pf.Flow:
    flow = pf.RealNVP(4, **SMALL)
    first, _, second, _ = flow.transform.layers
    second.network.layers[0].weight = first.network.layers[0].weight
    return flow


def one_layer_twice() -> pf.Flow:
    layer = CouplingLayer(2, hidden_features=(8,))
    return pf.Flow([layer, Permutation(2), layer], 2)


FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "NICE": lambda: pf.NICE(3, **SMALL),
    "RealNVP": lambda: pf.RealNVP(3, 2, **SMALL),
    "RealNVP, one feature": lambda: pf.RealNVP(1, **SMALL),
    "MAF": lambda: pf.MAF(3, 2, **SMALL),
    "IAF": lambda: pf.IAF(3, **SMALL),
    "NSF": lambda: pf.NSF(3, bins=4, bound=4.0, act_norm=True, **SMALL),
    "NSF, autoregressive": lambda: pf.NSF(3, autoregressive=True, mixing=None, **SMALL),
    "activation": lambda: pf.MAF(2, activation=nn.ELU, **SMALL),
    "partial": lambda: pf.MAF(2, activation=partial(nn.LeakyReLU, 0.3, inplace=False), **SMALL),
    "base": lambda: pf.MAF(2, base=StudentT((2,), df=4.0, learn_df=False), **SMALL),
    "numpy": lambda: pf.NSF(2, bins=np.int64(4), bound=np.float32(3.0), hidden_features=[4]),
    "by hand": hand_made,
    "tied weights": tied_weights,
    "one layer twice": one_layer_twice,
}


def redraw(flow: pf.Flow) -> pf.Flow:
    """Away from the identity, where every tensor matters to the density."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in flow.named_buffers():
            if "standardization" in name:
                buffer.add_(torch.rand_like(buffer))
    return flow


def density(flow: pf.Flow, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=flow.dtype).to(flow.device)

    context = noise(7, flow.context_size) if flow.context_size else None
    with torch.no_grad():
        return flow(context).log_prob(2 * noise(7, *flow.event_shape))


def rewrite(path: Path, **changes: Any) -> None:
    """The same tensors under an edited description."""
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(
        tensors, path, {"pyroflows": json.dumps({**record(path), **changes})}
    )


def record(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["pyroflows"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saved.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    pf.save(redraw(pf.RealNVP(2, **SMALL)), path)
    return path


# --- flows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_comes_back(name: str, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    flow = redraw(FLOWS[name]()).to(device, dtype)
    before = copy.deepcopy(flow.state_dict())
    pf.save(flow, path)
    torch.manual_seed(5)
    again = pf.load(path, map_location=device)

    assert type(again) is type(flow)
    assert again.dtype == dtype
    assert again.device.type == device.type
    assert torch.equal(density(again), density(flow))
    state = again.state_dict()
    assert list(state) == list(before)
    for key, value in before.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    assert not {t.data_ptr() for t in state.values()} & {t.data_ptr() for t in before.values()}


@pytest.mark.parametrize("name", ["NSF", "by hand", "tied weights", "one layer twice"])
def test_a_loaded_flow_saves_to_the_same_bytes(name: str, path: Path) -> None:
    flow = redraw(FLOWS[name]())
    pf.save(flow, path)
    content = path.read_bytes()
    pf.save(flow, path)
    assert path.read_bytes() == content
    pf.save(pf.load(path), path)
    assert path.read_bytes() == content


def test_positions_and_names_of_arguments_are_one(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pf.save(pf.MAF(2, 1, **SMALL), path)
    torch.manual_seed(0)
    pf.save(pf.MAF(context=1, features=2, **SMALL), tmp_path / "other")
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_defaults_are_written_down(path: Path) -> None:
    """A later version with other defaults must read what this one wrote."""
    pf.save(pf.NSF(2), path)
    described = record(path)["flow"]["arguments"]
    assert set(described) == set(inspect.signature(pf.NSF.__init__).parameters) - {"self"}
    assert described["bound"] == 4.0
    assert described["activation"] == {"torch.nn": "SiLU"}


def test_float64_and_low_precision_come_back(path: Path) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        flow = redraw(pf.RealNVP(2, **SMALL)).to(dtype)
        pf.save(flow, path)
        again = pf.load(path)
        assert again.dtype == dtype
        assert again.transform.layers[0].order.dtype == torch.int64
        state = again.state_dict()
        assert all(torch.equal(state[name], value) for name, value in flow.state_dict().items())


def test_flags_come_back(path: Path) -> None:
    flow = pf.NSF(2, act_norm=True, **SMALL)
    flow.transform.layers[0].requires_grad_(False)
    flow.eval()
    flow.transform.layers[1].train()
    flow.transform.initialize_(torch.randn(20, 2))
    pf.save(flow, path)
    again = pf.load(path)
    for (name, mine), (other, its) in zip(
        flow.named_parameters(), again.named_parameters(), strict=True
    ):
        assert (name, mine.requires_grad) == (other, its.requires_grad)
    assert [m.training for m in flow.modules()] == [m.training for m in again.modules()]
    assert not again.training
    assert again.transform.layers[2].initialized


@pytest.mark.parametrize("make", [tied_weights, one_layer_twice])
def test_what_was_shared_stays_shared(make: Callable[[], pf.Flow], path: Path) -> None:
    flow = make()
    pf.save(flow, path)
    again = pf.load(path)
    assert len(list(again.parameters())) == len(list(flow.parameters()))
    again = redraw(again)
    pf.save(again, path)
    assert torch.equal(density(pf.load(path)), density(again))


def test_a_view_of_another_tensor_is_saved(path: Path) -> None:
    flow = pf.RealNVP(2, **SMALL)
    flow.base.scale = flow.base.loc.view(2).add_(1)
    flow.base.loc = torch.ones(1).expand(2)
    flow.transform.layers[1].factors.data = torch.randn(2, 2).T
    pf.save(flow, path)
    assert torch.equal(density(pf.load(path)), density(flow))


def test_a_flow_registered_with_pyro_is_saved(path: Path) -> None:
    flow = redraw(pf.RealNVP(2, **SMALL))
    pyro.module("flow", flow)
    pf.save(flow, path)
    assert torch.equal(density(pf.load(path)), density(flow))


def test_a_loaded_flow_trains_and_copies(saved: Path) -> None:
    flow = pf.load(saved)
    pickle.loads(pickle.dumps(copy.deepcopy(flow)))
    optimizer = torch.optim.Adam(flow.parameters(), 0.01)
    before = density(flow)
    (-flow().log_prob(torch.randn(50, 2)).mean()).backward()
    optimizer.step()
    assert not torch.equal(density(flow), before)
    assert torch.equal(density(pf.load(saved)), before)


def test_neither_defaults_nor_random_state_matter(saved: Path) -> None:
    before = density(pf.load(saved))
    flow = pf.load(saved)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        again = pf.load(saved)
        pf.save(flow, saved)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.dtype == torch.float32
    assert torch.equal(density(again), before)


@pytest.mark.parametrize("where", ["cpu", torch.device("cpu"), torch.device("meta")])
def test_map_location_takes_names_and_devices(saved: Path, where: Any) -> None:
    assert pf.load(saved, map_location=where).device == torch.device(where)


def test_a_path_may_be_a_string_or_a_link(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved)
    pf.save(pf.load(str(link)), str(link))
    assert link.is_symlink()
    assert torch.equal(density(pf.load(link)), density(pf.load(saved)))


def test_the_file_is_written_whole_or_not_at_all(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = saved.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        pf.save(pf.NICE(5), saved)
    assert saved.read_bytes() == content
    assert os.listdir(saved.parent) == [saved.name]


def test_the_file_has_the_permissions_of_a_new_file(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- what cannot be saved -------------------------------------------------------------------------


class Mine(pf.RealNVP):
    pass


class OwnLayer(LULinear):
    pass


class OwnActivation(nn.Tanh):
    pass


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Mine(2, **SMALL), r"^Mine: expected .* a public class of pyroflows, got Mine\("),
        (lambda: pf.MAF(2, activation=lambda: nn.Softplus(2.0)), r"MAF\.activation: .*<lambda>"),
        (lambda: pf.MAF(2, activation=OwnActivation), r"MAF\.activation: .*OwnActivation"),
        (lambda: pf.Flow([LULinear(2), OwnLayer(2)], 2), r"Flow\.layers\[1\]: .*OwnLayer"),
        (
            lambda: pf.Flow([CouplingLayer(2, univariate=Affine(float("inf")))], 2),
            r"layers\[0\]\.univariate\.max_log_scale: expected a finite number.*inf",
        ),
        (lambda: nn.Linear(2, 2), "expected a Flow or an AutoFlow, got Linear"),
    ],
)
def test_what_no_file_could_describe_is_refused(
    make: Callable[[], Any], match: str, path: Path
) -> None:
    with pytest.raises(TypeError, match=match):
        pf.save(make(), path)
    assert not path.exists()


def test_a_flow_changed_after_construction_is_refused(path: Path) -> None:
    flow = pf.RealNVP(2, **SMALL)
    flow.transform.layers.append(LULinear(2))
    with pytest.raises(TypeError, match=r"no longer describe it .*layers.4.* does not belong"):
        pf.save(flow, path)
    flow = pf.RealNVP(2, **SMALL)
    flow.transform.layers[0].network.activation = nn.Tanh()
    with pytest.raises(TypeError, match=r"network\.activation is now a Tanh"):
        pf.save(flow, path)
    flow = pf.RealNVP(2, **SMALL)
    flow.transform.layers[1].double()
    with pytest.raises(TypeError, match=r"expected shape .* of torch\.float32, got .*float64"):
        pf.save(flow, path)


def test_a_flow_without_values_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        pf.save(pf.RealNVP(2, **SMALL).to("meta"), path)


# --- files that are not ours, or no longer --------------------------------------------------------


def test_a_missing_file_is_missing(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=path.name):
        pf.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"\x80\x04K*." * 10, bytes(100), b"\xff" * 100]
)
def test_another_kind_of_file_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(SavedFileError, match=f"{path.name}: expected a safetensors file written"):
        pf.load(path)


def test_a_pickle_is_refused_unread(path: Path) -> None:
    torch.save(pf.RealNVP(2).state_dict(), path)
    with pytest.raises(SavedFileError, match="of another kind"):
        pf.load(path)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(kept: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(SavedFileError, match="truncated"):
        pf.load(saved)


def test_no_flipped_bit_goes_unseen(saved: Path) -> None:
    content = saved.read_bytes()
    for i in range(0, len(content), len(content) // 100):
        flipped = bytes([content[i] ^ 1])
        saved.write_bytes(content[:i] + flipped + content[i + 1 :])
        with pytest.raises(SavedFileError):
            pf.load(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_weights_are_refused(metadata: Any, path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(SavedFileError, match=r"without its description.*load_file"):
        pf.load(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "expected 'format_version' of type int, got None"),
        ("{}", "expected 'format_version' of type int, got None"),
        ('{"format_version": 0}', "expected 1 or more"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_description_is_refused(text: str, match: str, path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, {"pyroflows": text})
    with pytest.raises(SavedFileError, match=match):
        pf.load(path)


def test_a_newer_format_is_refused(saved: Path) -> None:
    rewrite(saved, format_version=2, pyroflows_version="7.0")
    with pytest.raises(SavedFileError, match=r"version 2, written by pyroflows 7\.0.*up to 1\. Up"):
        pf.load(saved)


def described(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class": name, "arguments": arguments}


NESTED: Any = {"tuple": []}
for _ in range(400):
    NESTED = {"tuple": [NESTED]}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "model"}, "kind: expected 'flow', 'guide' or 'amortized', got 'model'"),
        ({"dtype": "int64"}, "dtype: expected one of float16"),
        ({"dtype": None}, "expected 'dtype' of type str, got None"),
        ({"flow": 3}, "expected 'flow' of type dict, got 3"),
        ({"flow": described("os.system")}, "flow: expected a class that .* got 'os.system'"),
        ({"flow": described("FlowTransform")}, "expected a class that"),
        ({"flow": described("NSF")}, "flow: NSF: cannot be built .*features"),
        ({"flow": described("NSF", features=-1)}, "NSF: cannot be built"),
        ({"flow": described("StandardNormal", event_shape=2)}, "expected a flow, got StandardN"),
        ({"flow": {"class": "NSF", "arguments": [2]}}, "expected 'arguments' of type dict"),
        ({"flow": described("NSF", features={"tuple": 2})}, "expected 'tuple' of type list"),
        ({"flow": described("NSF", features=NESTED)}, "nested too deeply|cannot be built"),
        ({"flow": described("NSF", features={"exec": "x"})}, "expected 'class' of type str"),
        (
            {"flow": described("NSF", features=2, activation={"torch.nn": "Parameter"})},
            r"flow\.activation: 'Parameter' is not a module class of torch\.nn",
        ),
        (
            {"flow": described("NSF", features={"tensor": [2], "dtype": "load"})},
            "'load' is not a torch dtype",
        ),
        (
            {"flow": described("NSF", features={"tensor": "x", "dtype": "int64"})},
            "cannot be built from",
        ),
        ({"frozen": ["base.nothing"]}, "frozen: RealNVP has no 'base.nothing'"),
        ({"frozen": [[]]}, "frozen: expected names"),
        ({"training": False}, "the content is not what was saved"),
        ({"sha256": 0}, "expected 'sha256' of type str, got 0"),
        ({"training": 1}, "expected 'training' of type bool, got 1"),
        ({"training_differs": ["nothing"]}, "training_differs: RealNVP has no 'nothing'"),
        ({"tied": [["base.loc", "nothing"]]}, "cannot be one tensor"),
        ({"tied": [["base.loc", "transform.layers.0.order"]]}, "cannot be one tensor"),
        ({"tied": [["base.loc", "base.scale"], ["base.scale"]]}, "expected each name once"),
        ({"tied": [[{}]]}, "tied: expected names"),
        ({"tied": [["base.loc", "base.scale"]]}, "base.scale does not belong"),
    ],
)
def test_an_edited_description_is_refused(changes: dict[str, Any], match: str, saved: Path) -> None:
    rewrite(saved, **changes)
    with pytest.raises(SavedFileError, match=match):
        pf.load(saved)


def test_every_part_of_the_description_is_required(saved: Path) -> None:
    whole = record(saved)
    for key in whole.keys() - {"pyroflows_version"}:
        rewrite(saved, **{**whole, key: None})
        with pytest.raises(SavedFileError, match=f"'{key}'"):
            pf.load(saved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("base.loc"), r"not the \d+ of the RealNVP .*1 problem.*base.loc is miss"),
        (lambda t: t.update(more=torch.zeros(1)), "more does not belong there"),
        (lambda t: t.update({"base.loc": torch.zeros(3)}), r"shape \(2,\) of .* got shape \(3,\)"),
        (lambda t: t["base.loc"].add_(1e-7), "the content is not what was saved"),
        (lambda t: t.update({"base.loc": torch.zeros(2).double()}), "got shape .* torch.float64"),
        (
            lambda t: [t.pop(k) for k in list(t) if k != "base.loc"],
            r"25 problem\(s\): base\.scale is",
        ),
    ],
)
def test_other_tensors_are_refused(
    change: Callable[[dict[str, Tensor]], Any], match: str, saved: Path
) -> None:
    text = json.dumps(record(saved))
    tensors = safetensors.torch.load_file(saved)
    change(tensors)
    safetensors.torch.save_file(tensors, saved, {"pyroflows": text})
    with pytest.raises(SavedFileError, match=match):
        pf.load(saved)


def test_a_flow_takes_no_model(saved: Path) -> None:
    for arguments in ({"model": model}, {"example_args": (3,)}, {"example_kwargs": {"y": 3}}):
        with pytest.raises(ValueError, match=r"holds a flow: .*AutoFlow\(model, load\(path\)\)"):
            pf.load(saved, **arguments)


# --- guides ---------------------------------------------------------------------------------------


def model(y: Tensor | None = None, dim: int = 2, name: str = "scale") -> None:
    like = torch.zeros(()) if y is None else y
    loc = pyro.sample("loc", dist.Normal(like.new_zeros(dim), 10.0).to_event(1))
    scale = pyro.sample(name, dist.HalfNormal(like.new_ones(())))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(loc.mean(), scale), obs=y)


def swapped(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(y.new_ones(())))
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 10.0).to_event(1))
    pyro.sample("y", dist.Normal(loc.mean(), scale).expand([4]).to_event(1), obs=y)


Y = torch.tensor([1.0, 2.0, 3.0, 4.0])


def no_arguments() -> None:
    model(Y)


def make_guide() -> AutoFlow:
    guide = AutoFlow(model, partial(pf.NSF, **SMALL), name="guide", example_args=(Y,))
    redraw(guide.flow)
    return guide


@pytest.fixture
def guide() -> AutoFlow:
    """Alive for the whole test, and with it the name; a test that ends it makes its own."""
    return make_guide()


def train(guide: AutoFlow, *args: Any) -> None:
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step(*args)


def posterior(guide: AutoFlow) -> Tensor:
    points = torch.linspace(-2, 2, 15, dtype=guide.flow.dtype, device=guide.flow.device)
    with torch.no_grad():
        return guide.get_posterior().log_prob(points.reshape(5, 3))


def test_a_guide_comes_back_in_the_same_session(guide: AutoFlow, path: Path) -> None:
    train(guide, Y)
    guide.flow.transform.layers[0].requires_grad_(False)
    guide.eval()
    pf.save(guide, path)
    expected = posterior(guide)
    state = torch.get_rng_state()
    again = pf.load(path, model=model, example_args=(Y,))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.name == "guide_1", "the first guide still lives"
    assert again.latent_shapes == guide.latent_shapes == {"loc": (2,), "scale": ()}
    assert torch.equal(posterior(again), expected)
    assert not again.training
    assert not again.flow.training
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in guide.parameters()
    ]
    frozen = "guide_1.flow$$$transform.layers.0.network"
    assert not [name for name in pyro.get_param_store() if name.startswith(frozen)]
    again(Y)
    assert torch.equal(posterior(again), expected)
    train(again, Y)
    assert not torch.equal(posterior(again), expected)
    assert torch.equal(posterior(guide), expected)


def test_the_file_wins_over_the_param_store(path: Path) -> None:
    guide = make_guide()
    expected = posterior(guide)
    pf.save(guide, path)
    train(guide, Y)
    del guide
    again = pf.load(path, model=model, example_args=(Y,))
    assert again.name == "guide"
    assert torch.equal(posterior(again), expected)
    again(Y)
    assert torch.equal(posterior(again), expected)
    store = pyro.get_param_store()
    assert {id(p) for p in again.parameters()} <= {id(store[k].unconstrained()) for k in store}


def test_a_param_store_of_another_shape_is_replaced(path: Path) -> None:
    guide = make_guide()
    pf.save(guide, path)
    expected = posterior(guide)
    del guide
    pyro.clear_param_store()
    other = AutoFlow(model, partial(pf.NSF, transforms=2), name="guide", example_args=(Y,))
    assert other.name == "guide"
    del other
    again = pf.load(path, model=model, example_args=(Y,))
    assert torch.equal(posterior(again), expected)


def test_a_loaded_guide_copies_and_saves_again(path: Path) -> None:
    guide = make_guide()
    pf.save(guide, path)
    content = path.read_bytes()
    expected = posterior(guide)
    del guide
    again = pf.load(path, model=model, example_kwargs={"y": Y})
    pf.save(again, path)
    assert path.read_bytes() == content
    assert torch.equal(posterior(copy.deepcopy(again)), expected)


def test_a_guide_of_the_default_flow_and_no_arguments_comes_back(path: Path) -> None:
    guide = AutoFlow(no_arguments, example_args=())
    pf.save(guide, path)
    again = pf.load(path, model=no_arguments)
    assert torch.equal(posterior(again), posterior(guide))


def test_a_float64_guide_comes_back(path: Path) -> None:
    y = Y.double()
    guide = AutoFlow(model, partial(pf.NSF, **SMALL), example_args=(y,))
    redraw(guide.flow)
    pf.save(guide, path)
    again = pf.load(path, model=model, example_args=(y,))
    assert again.flow.dtype == torch.float64
    assert torch.equal(posterior(again), posterior(guide))
    with pytest.raises(SavedFileError, match=r"saved in torch\.float64, .* are torch\.float32"):
        pf.load(path, model=model, example_args=(Y,))


def test_an_identity_standardisation_stays(guide: AutoFlow, path: Path) -> None:
    guide.flow.transform.standardization.set_(0.0, 1.0)
    pf.save(guide, path)
    again = pf.load(path, model=model, example_args=(Y,))
    assert again.flow.transform.standardization.is_identity()


def test_a_guide_lives_where_its_model_does(
    guide: AutoFlow, path: Path, device: torch.device
) -> None:
    pf.save(guide, path)
    y = Y.to(device)
    again = pf.load(path, model=model, map_location=device, example_args=(y,))
    assert again.flow.device.type == device.type
    with pytest.raises(ValueError, match="map_location: the model's latents are on"):
        pf.load(path, model=model, map_location="meta", example_args=(y,))


FRESH = """
import sys
import torch
import pyroflows as pf
from tests.test_io import Y, density, model, posterior
flow = pf.load(sys.argv[1])
guide = pf.load(sys.argv[2], model=model, example_args=(Y,))
torch.save([density(flow), posterior(guide)], sys.argv[3])
print(guide.name)
"""


def test_a_fresh_process_finds_the_same_densities(guide: AutoFlow, tmp_path: Path) -> None:
    flow = redraw(hand_made())
    files = [str(tmp_path / name) for name in ("flow", "guide", "densities")]
    pf.save(flow, files[0])
    pf.save(guide, files[1])
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *files],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == "guide\n", done.stderr
    found = torch.load(files[2], weights_only=True)
    assert torch.equal(found[0], density(flow))
    assert torch.equal(found[1], posterior(guide))


def test_a_guide_needs_its_model_and_arguments(guide: AutoFlow, path: Path) -> None:
    def strict(y: Tensor) -> None:
        model(y)

    pf.save(guide, path)
    with pytest.raises(ValueError, match="holds a guide, and models are not saved: pass the model"):
        pf.load(path)
    for arguments in ({}, {"example_args": (Y, Y)}, {"example_kwargs": {"z": Y}}):
        with pytest.raises(ValueError, match=r"model takes \(y: .*example_args.* do not fit"):
            pf.load(path, model=strict, **arguments)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (partial(model, dim=3), r"site 'loc': .* shape \(2,\), the model has \(3,\)"),
        (partial(model, name="sigma"), r"site 'scale': .* shape \(\), the model has no such site"),
        (swapped, r"order \['loc', 'scale'\], .* \['scale', 'loc'\]"),
    ],
)
def test_another_model_is_refused(
    other: Callable[..., None], match: str, guide: AutoFlow, path: Path
) -> None:
    pf.save(guide, path)
    store = pyro.get_param_store()
    before = {name: store[name] for name in store}
    with pytest.raises(SavedFileError, match=match):
        pf.load(path, model=other, example_args=(Y,))
    assert list(store) == list(before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"guide": None}, "expected 'guide' of type dict"),
        ({"guide": {"name": "a"}}, "expected 'latent_shapes' of type list"),
        ({"guide": {"name": 3, "latent_shapes": []}}, "expected 'name' of type str, got 3"),
        ({"guide": {"name": "a", "latent_shapes": ["loc"]}}, r"expected \[site, shape\], got loc"),
    ],
)
def test_a_damaged_guide_is_refused(
    changes: dict[str, Any], match: str, guide: AutoFlow, path: Path
) -> None:
    pf.save(guide, path)
    forged = digest({**record(path), **changes}, safetensors.torch.load_file(path))
    rewrite(path, **changes, sha256=forged)
    with pytest.raises(SavedFileError, match=match):
        pf.load(path, model=model, example_args=(Y,))


class OwnGuide(AutoFlow):
    pass


def test_guides_that_cannot_be_saved(path: Path) -> None:
    with pytest.raises(TypeError, match=r"got OwnGuide.*save\(guide.flow, path\)"):
        pf.save(OwnGuide(model, name="own", example_args=(Y,)), path)
    with pytest.raises(ValueError, match="does not know its model's latents yet"):
        pf.save(AutoFlow(model, name="early"), path)
