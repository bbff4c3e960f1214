"""What the density benchmark compares: our recipes, and the peers' at equal sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyroflows as pf


class Peer(nn.Module):
    """A flow of another package."""

    def __init__(self, flow: nn.Module, score: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.flow = flow
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.flow, x)


def _recipe(name: str, **options: Any) -> Callable[[int, int], pf.Flow]:
    """Ours, with its documented defaults; peers are built to its size."""
    return lambda features, hidden: pf.get_flow(name)(features, **options)


def _sized(name: str, **options: Any) -> Callable[[int, int], pf.Flow]:
    """Ours, of the width that the comparison with the peers asks for."""
    return lambda features, hidden: pf.get_flow(name)(
        features, hidden_features=(hidden, hidden), **options
    )


def _zuko(name: str) -> Callable[[int, int], Peer]:
    def build(features: int, hidden: int) -> Peer:
        # Importing zuko switches torch's argument validation off for everyone.
        before = torch.distributions.Distribution._validate_args
        import zuko

        torch.distributions.Distribution.set_default_validate_args(before)
        recipe = getattr(zuko.flows, name)
        flow = recipe(features, transforms=5, hidden_features=(hidden, hidden))
        return Peer(flow, lambda flow, x: flow().log_prob(x))

    return build


class WithoutContext(nn.Module):
    """A network as nflows calls it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return self.network(x)


def _nflows(features: int, hidden: int) -> Peer:
    """Coupling splines between LU maps, as in its authors' experiments."""
    from nflows import distributions, flows, transforms, utils
    from nflows.nn.nets import MLP

    def network(inputs: int, outputs: int) -> nn.Module:
        return WithoutContext(MLP([inputs], [outputs], [hidden, hidden]))

    layers: list[Any] = []
    for i in range(5):
        mask = utils.create_alternating_binary_mask(features, even=i % 2 == 0)
        layers += [
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, network, num_bins=8, tails="linear", tail_bound=5.0
            ),
            transforms.LULinear(features, identity_init=True),
        ]
    base = distributions.StandardNormal([features])
    flow = flows.Flow(transforms.CompositeTransform(layers), base)
    return Peer(flow, lambda flow, x: flow.log_prob(x))


#: Ours beside the peer of the same kind.
PAIRS = {
    "NSF autoregressive": "zuko NSF",
    "NSF": "nflows NSF",
    "MAF": "zuko MAF",
}
COMPARED: dict[str, Callable[[int, int], nn.Module]] = {
    "NSF autoregressive": _sized("NSF", autoregressive=True),
    "NSF": _sized("NSF"),
    "MAF": _sized("MAF"),
    "zuko NSF": _zuko("NSF"),
    "nflows NSF": _nflows,
    "zuko MAF": _zuko("MAF"),
}
#: For angles; and those of which one fit takes minutes.
LEFT_OUT = ("NCSF", "CNF", "ResidualFlow")
OTHERS: dict[str, Callable[[int, int], nn.Module]] = {
    name: _recipe(name) for name in pf.list_flows() if name not in COMPARED and name not in LEFT_OUT
}
MODELS = {**COMPARED, **OTHERS}
