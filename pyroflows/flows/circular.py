"""A flow on angles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from pyroflows.distributions import Base, UniformBox
from pyroflows.flows.flow import Flow
from pyroflows.layers import CouplingLayer
from pyroflows.nn.mlp import Activation
from pyroflows.numerics import binary_code
from pyroflows.transforms import CircularRationalQuadratic


class NCSF(Flow):
    r"""Neural circular spline flow: densities of angles, on the torus :math:`[-\pi, \pi]^d`.

    Couplings of rational-quadratic splines on the circle, each with a learned rotation. The
    conditioners see the angles' cosines and sines, so that the density is periodic in every angle:
    the same at :math:`-\pi` and :math:`\pi`, and continuous across. Outside of the box it is zero;
    angles measured otherwise have to be brought into it first. Draws lie in the box. Angles are
    never standardised.

    Forward and inverse cost one pass of each of the ``transforms`` networks. Starts as the identity
    on a uniform base.

    Parameters
    ----------
    features, context
        Number of angles and size of the context (0: none).
    transforms
        Number of couplings.
    hidden_features, activation
        Of the conditioners, see `pyroflows.nn.PeriodicMLP`.
    bins
        Bins of each spline.
    base
        Base distribution, on the same box; by default the uniform one.

    References
    ----------
    Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan and Cranmer, "Normalizing flows on
    tori and spheres", ICML 2020.

    Examples
    --------
    >>> flow = NCSF(2)
    >>> flow().log_prob(torch.tensor([[0.0, torch.pi], [0.0, 3.5]]))
    tensor([-3.6758,    -inf], grad_fn=<AddBackward0>)
    >>> bool((flow().sample((100,)).abs() <= torch.pi).all())
    True
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
        base: Base | None = None,
    ) -> None:
        layers = [
            CouplingLayer(
                features,
                context,
                mask=binary_code(features, i),
                univariate=CircularRationalQuadratic(bins),
                hidden_features=hidden_features,
                activation=activation,
                periodic=True,
            )
            for i in range(transforms)
        ]
        base = UniformBox(features, -math.pi, math.pi) if base is None else base
        super().__init__(layers, features, context, base)
