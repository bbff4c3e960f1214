"""Coupling flows: one network pass in either direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from pyroflows.distributions import Base
from pyroflows.flows.autoregressive import autoregressive_layers
from pyroflows.flows.flow import Flow
from pyroflows.flows.stack import Mixing, mixed
from pyroflows.flows.supports import inner_features
from pyroflows.layers import ActNorm, CouplingLayer, Inverse, Layer
from pyroflows.nn.mlp import Activation
from pyroflows.numerics import binary_code
from pyroflows.transforms import Additive, Affine, LinearRational, RationalQuadratic, Univariate

SPLINES: dict[str, type[RationalQuadratic | LinearRational]] = {
    "quadratic": RationalQuadratic,
    "linear": LinearRational,
}


def coupling_layers(
    features: int,
    context: int,
    transforms: int,
    univariate: Univariate,
    hidden_features: Sequence[int],
    activation: Activation,
) -> list[Layer]:
    """Couplings whose masks follow the binary digits of the features' indices."""
    return [
        CouplingLayer(
            features,
            context,
            mask=binary_code(features, i),
            univariate=univariate,
            hidden_features=hidden_features,
            activation=activation,
        )
        for i in range(transforms)
    ]


def scoring_layers(
    features: int,
    context: int,
    transforms: int,
    univariate: Univariate,
    hidden_features: Sequence[int],
    activation: Activation,
    autoregressive: bool,
) -> list[Layer]:
    """Autoregressive layers or couplings that evaluate the map from data to base."""
    build = autoregressive_layers if autoregressive else coupling_layers
    layers = build(features, context, transforms, univariate, hidden_features, activation)
    return layers if autoregressive else [Inverse(layer) for layer in layers]


class NICE(Flow):
    r"""Additive couplings and a diagonal scaling: volume preserving but for the scaling.

    Forward and inverse cost one pass of each of the ``transforms`` networks. Starts as the
    identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of couplings.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.ResidualMLP`.
    mixing
        What follows each coupling: ``"lu"``, a learned dense affine map; ``"orthogonal"`` or
        ``"householder"``, a learned rotation; ``"permutation"``, a fixed random order; or None.
    act_norm
        Whether an `ActNorm` follows each coupling.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Dinh, Krueger and Bengio, "NICE: non-linear independent components estimation", ICLR 2015.

    Examples
    --------
    >>> NICE(3)().log_prob(torch.zeros(3))
    tensor(-2.7568, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        mixing: Mixing = None,
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        layers = coupling_layers(
            features, context, transforms, Additive(), hidden_features, activation
        )
        layers = [*mixed(layers, features, mixing, act_norm), ActNorm(features)]
        super().__init__(layers, features, context, base, support)


class RealNVP(Flow):
    r"""Affine couplings with smoothly bounded log-scales.

    Forward and inverse cost one pass of each of the ``transforms`` networks. Starts as the
    identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of couplings.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.ResidualMLP`.
    max_log_scale
        Smooth bound of each layer's log-scale, see `pyroflows.transforms.Affine`.
    mixing
        What follows each coupling: ``"lu"``, a learned dense affine map; ``"orthogonal"`` or
        ``"householder"``, a learned rotation; ``"permutation"``, a fixed random order; or None.
    act_norm
        Whether an `ActNorm` follows each coupling.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017.

    Examples
    --------
    >>> flow = RealNVP(2, context=3)
    >>> flow(torch.zeros(5, 3)).sample((4,)).shape
    torch.Size([4, 5, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        max_log_scale: float = 2.0,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        affine = Affine(max_log_scale)
        layers = coupling_layers(features, context, transforms, affine, hidden_features, activation)
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)


class NSF(Flow):
    r"""Neural spline flow: monotone splines in couplings or autoregressively.

    As couplings, forward and inverse cost one pass of each of the ``transforms`` networks; the
    splines lead from data to base, so that densities need no root of a quadratic equation.
    Autoregressively the inverse (the density) costs one pass and the forward direction goes feature
    by feature. Starts as the identity; beyond ``bound`` the splines are the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    transforms
        Number of spline layers.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.ResidualMLP` and `pyroflows.nn.MaskedResidualMLP`.
    bins
        Bins of each spline.
    bound
        Half-width of the splines' box, in standardised units.
    spline
        ``"quadratic"`` for rational-quadratic splines, ``"linear"`` for linear rational ones, which
        need no square root in the inverse; see `pyroflows.transforms.LinearRational`.
    autoregressive
        Whether every layer maps all features in order, instead of one part given the other.
    mixing
        What follows each layer: ``"lu"``, a learned dense affine map; ``"orthogonal"`` or
        ``"householder"``, a learned rotation; ``"permutation"``, a fixed random order; or None.
    act_norm
        Whether an `ActNorm` follows each layer.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Durkan, Bekasov, Murray and Papamakarios, "Neural spline flows", NeurIPS 2019; Dolatabadi,
    Erfani and Leckie, "Invertible generative modeling using linear rational splines", AISTATS 2020.

    Examples
    --------
    >>> NSF(2)().log_prob(torch.zeros(2))
    tensor(-1.8379, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        transforms: int = 5,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        bins: int = 8,
        bound: float = 4.0,
        spline: Literal["quadratic", "linear"] = "quadratic",
        autoregressive: bool = False,
        mixing: Mixing = "lu",
        act_norm: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        if spline not in SPLINES:
            raise ValueError(f"spline: expected 'quadratic' or 'linear', got {spline!r}")
        univariate = SPLINES[spline](bins, bound)
        layers: list[Layer] = scoring_layers(
            features,
            context,
            transforms,
            univariate,
            hidden_features,
            activation,
            autoregressive,
        )
        layers = mixed(layers, features, mixing, act_norm)
        super().__init__(layers, features, context, base, support)
