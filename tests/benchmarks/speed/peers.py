"""The same flow in the words of other packages."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as pyro_transforms
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn

from tests.benchmarks.models import WithoutContext
from tests.benchmarks.speed.architecture import (
    BINS,
    BOUND,
    Architecture,
    Contender,
    OfDistribution,
    OfFlow,
)


class Zuko(OfDistribution):
    def distribution(self) -> Any:
        from pyro.contrib.zuko import ZukoToPyro

        return ZukoToPyro(self.flow())


def zuko(a: Architecture) -> Contender:
    # Importing zuko switches torch's argument validation off for everyone.
    before = torch.distributions.Distribution._validate_args
    import zuko
    from zuko.lazy import LazyInverse

    torch.distributions.Distribution.set_default_validate_args(before)
    options: Any = {"transforms": a.layers, "hidden_features": a.widths}
    if a.spline:
        univariate = zuko.transforms.MonotonicRQSTransform
        options |= {"univariate": univariate, "shapes": [(BINS,), (BINS,), (BINS - 1,)]}
    if a.kind == "coupling":
        return Zuko(zuko.flows.NICE(a.features, **options))
    flow = zuko.flows.MAF(a.features, **options)
    if a.kind == "guide":
        flow = zuko.flows.Flow([LazyInverse(t) for t in flow.transform.transforms], flow.base)
    return Zuko(flow)


class OfPyro(Contender):
    """Pyro's transforms, whose caches must be cleared after every use."""

    loc: Tensor

    def __init__(self, parts: list[Any], forward: bool, features: int) -> None:
        super().__init__()
        self.parts = parts
        self.modules_of_parts = nn.ModuleList(p for p in parts if isinstance(p, nn.Module))
        # Its autoregressive transforms take one pass forward: a density turns them round.
        self.chain = parts if forward else [part.inv for part in parts]
        self.register_buffer("loc", torch.zeros(features))

    def distribution(self) -> Any:
        base = dist.Normal(self.loc, 1.0).to_event(1)
        return dist.TransformedDistribution(base, self.chain)

    def log_prob(self, x: Tensor) -> Tensor:
        score = self.distribution().log_prob(x)
        self.forget()
        return score

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        made = self.distribution()
        x = made.rsample((number,))
        score = made.log_prob(x)
        self.forget()
        return x, score

    def sample(self, number: int) -> Tensor:
        with torch.no_grad():
            x = self.distribution().sample((number,))
        self.forget()
        return x

    def forget(self) -> None:
        # What TransformedDistribution.clear_cache does, which does not reach inside an inverse.
        for part in self.parts:
            part._cached_x_y = None, None


def pyro_alone(a: Architecture) -> Contender:
    """Its spline couplings are linear rational: 6 bins have as many parameters as 8 quadratic."""
    half = a.features // 2
    parts: list[Any] = []
    for i in range(a.layers):
        if a.kind != "coupling":
            outputs = [BINS, BINS, BINS - 1] if a.spline else [1, 1]
            network = AutoRegressiveNN(a.features, list(a.widths), param_dims=outputs)
            parts.append(
                pyro_transforms.SplineAutoregressive(a.features, network, BINS, BOUND, "quadratic")
                if a.spline
                else pyro_transforms.AffineAutoregressive(network)
            )
        elif a.spline:
            outputs = [half * n for n in (6, 6, 5, 6)]
            network = DenseNN(a.features - half, list(a.widths), outputs)
            parts.append(
                pyro_transforms.SplineCoupling(
                    a.features, a.features - half, network, 6, BOUND, identity=True
                )
            )
        else:
            network = DenseNN(a.features - half, list(a.widths), [half, half])
            parts.append(pyro_transforms.AffineCoupling(a.features - half, network))
        if i + 1 < a.layers:
            parts.append(pyro_transforms.Permute(torch.arange(a.features).flip(0)))
    return OfPyro(parts, a.kind != "density", a.features)


class NFlows(OfFlow):
    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        return self.flow.sample_and_log_prob(number)

    def sample(self, number: int) -> Tensor:
        with torch.no_grad():
            return self.flow.sample(number)


def nflows(a: Architecture) -> Contender:
    from nflows import distributions, flows, transforms, utils
    from nflows.nn.nets import MLP

    def network(inputs: int, outputs: int) -> nn.Module:
        return WithoutContext(MLP([inputs], [outputs], list(a.widths)))

    spline: Any = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    masked: Any = {"hidden_features": a.hidden, "num_blocks": 1, "use_residual_blocks": False}
    layers: list[Any] = []
    for i in range(a.layers):
        if a.kind == "coupling":
            mask = utils.create_alternating_binary_mask(a.features, even=i % 2 == 0)
            layers.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(mask, network, **spline)
                if a.spline
                else transforms.AffineCouplingTransform(mask, network)
            )
            continue
        layer: Any = (
            transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                a.features, **masked, **spline
            )
            if a.spline
            else transforms.MaskedAffineAutoregressiveTransform(a.features, **masked)
        )
        layers.append(transforms.InverseTransform(layer) if a.kind == "guide" else layer)
        layers.append(transforms.ReversePermutation(a.features))
    base = distributions.StandardNormal([a.features])
    return NFlows(flows.Flow(transforms.CompositeTransform(layers), base))


class NormFlows(OfFlow):
    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        return self.flow.sample(number)

    def sample(self, number: int) -> Tensor:
        with torch.no_grad():
            return self.flow.sample(number)[0]


def normflows(a: Architecture) -> Contender:
    import normflows as nf

    def network(inputs: int, outputs: int) -> nn.Module:
        return WithoutContext(nf.nets.MLP([inputs, *a.widths, outputs]))

    layers: list[Any] = []
    for i in range(a.layers):
        if a.kind == "coupling" and a.spline:
            layer = nf.flows.CoupledRationalQuadraticSpline(
                a.features, 1, 1, num_bins=BINS, tail_bound=BOUND, reverse_mask=bool(i % 2)
            )
            # The wrapper's network is residual, and it has splines of the other half too.
            layer.prqct = nf.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(
                nf.utils.masks.create_alternating_binary_mask(a.features, even=i % 2 == 0),
                network,
                BINS,
                "linear",
                BOUND,
            )
        elif a.kind == "coupling":
            half = a.features // 2
            layer = nf.flows.AffineCouplingBlock(nf.nets.MLP([half, *a.widths, 2 * half]))
        elif a.spline:
            layer = nf.flows.AutoregressiveRationalQuadraticSpline(
                a.features, 1, a.hidden, num_bins=BINS, tail_bound=BOUND
            )
            module = nf.flows.neural_spline.autoregressive
            layer.mprqat = module.MaskedPiecewiseRationalQuadraticAutoregressive(
                a.features,
                a.hidden,
                num_bins=BINS,
                tails="linear",
                tail_bound=BOUND,
                num_blocks=1,
                use_residual_blocks=False,
            )
        else:
            layer = nf.flows.MaskedAffineAutoregressive(
                a.features, a.hidden, num_blocks=1, use_residual_blocks=False
            )
            if a.kind == "density":
                layer = nf.flows.Reverse(layer)
        layers.append(layer)
        if a.kind != "coupling" or not a.spline:
            layers.append(nf.flows.Permute(a.features, mode="swap"))
    base = nf.distributions.DiagGaussian(a.features, trainable=False)
    return NormFlows(nf.NormalizingFlow(base, layers))


class TorchFlows(OfFlow):
    """Scored by its bijection: the log-determinants that its ``sample`` adds have a wrong sign.

    Those of an inverse found feature by feature are taken at points that are half inverted.
    """

    def __init__(self, flow: Any, in_turn: bool) -> None:
        super().__init__(flow)
        self.in_turn = in_turn

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        z = self.flow.base_sample((number,))
        x, log_det = self.flow.bijection.inverse(z)
        if self.in_turn:
            log_det = -self.flow.bijection.forward(x)[1]
        return x, self.flow.base_log_prob(z) - log_det

    def sample(self, number: int) -> Tensor:
        return self.flow.sample(number, no_grad=True)


def torchflows(a: Architecture) -> Contender:
    """Without the actnorm and the elementwise maps of its architectures."""
    from torchflows.bijections.base import BijectiveComposition
    from torchflows.bijections.finite.autoregressive import layers
    from torchflows.bijections.finite.matrix.permutation import ReversePermutationMatrix
    from torchflows.flows import Flow

    names = {
        "coupling": "{}Coupling",
        "density": "{}ForwardMaskedAutoregressive",
        "guide": "{}InverseMaskedAutoregressive",
    }
    layer = getattr(layers, names[a.kind].format("RQS" if a.spline else "Affine"))
    options: Any = {"conditioner_kwargs": {"n_hidden": a.hidden, "n_layers": 3}}
    if a.spline:
        options["transformer_kwargs"] = {"n_bins": BINS, "boundary": BOUND}
    shape = (a.features,)
    parts: list[Any] = []
    for _ in range(a.layers):
        made = layer(shape, **options)
        network = made.conditioner_transform.sequential
        for i, part in enumerate(network):
            if isinstance(part, nn.Tanh):
                network[i] = nn.ReLU()
        parts += [ReversePermutationMatrix(shape), made]
    return TorchFlows(Flow(BijectiveComposition(parts)), in_turn=a.kind == "density")
