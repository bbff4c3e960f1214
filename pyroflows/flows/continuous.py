"""Continuous normalizing flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from pyroflows.distributions import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.supports import inner_features
from pyroflows.layers import ContinuousLayer
from pyroflows.nn.mlp import Activation
from pyroflows.numerics.ode import Solver
from pyroflows.transforms.continuous import Noise


class CNF(Flow):
    r"""Continuous normalizing flow (FFJORD): points follow a network's velocity.

    .. math:: \dot x = v(t, x, c), \qquad t \in [0, 1]

    Fitted by maximum likelihood (`pyroflows.fit_mle`), or without solving anything by flow matching
    (`pyroflows.fit_flow_matching`), which is many times cheaper. Either direction costs as many
    network passes as the solver takes stages (some 40 to 200), each with one vector-Jacobian
    product for every feature, or with a single one where the trace is estimated; draws alone take
    none. Values and log-determinants are exact to the solver's tolerance. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    hidden_features, activation
        Of the velocity, see `pyroflows.layers.ContinuousLayer`.
    trace
        ``"exact"``, ``"hutchinson"`` (densities are unbiased in nats, but random), or ``"auto"``:
        exact up to 16 features. The weights of one serve the other.
    noise
        Of the estimate: ``"rademacher"`` or ``"gaussian"``.
    solver
        ``"dopri5"`` or ``"dopri8"`` (adaptive, by torchdiffeq: ``pip install 'pyroflows[ode]'``),
        or ``"rk4"`` on a fixed grid, which ``torch.func.vmap`` and ``torch.compile`` can follow.
    tolerance
        Of an adaptive solver; by default 1e-5 in float32 and 1e-8 in float64.
    steps
        Of the fixed grid.
    adjoint
        Whether gradients integrate the adjoint equation instead of going through the solver's
        steps: less memory, more time, first derivatives only.
    base
        Base distribution; by default the standard normal.
    support
        Constraint on the data, or one for each column; see `Flow`.

    References
    ----------
    Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary differential equations", NeurIPS
    2018; Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud, "FFJORD: free-form continuous
    dynamics for scalable reversible generative models", ICLR 2019.

    Examples
    --------
    >>> flow = CNF(2, context=3, solver="rk4")
    >>> flow(torch.zeros(5, 3)).sample((4,)).shape
    torch.Size([4, 5, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.Tanh,
        trace: Literal["auto", "exact", "hutchinson"] = "auto",
        noise: Noise = "rademacher",
        solver: Solver = "dopri5",
        tolerance: float | None = None,
        steps: int = 20,
        adjoint: bool = False,
        base: Base | None = None,
        support: Any = None,
    ) -> None:
        features = inner_features(features, support)
        layer = ContinuousLayer(
            features,
            context,
            hidden_features=hidden_features,
            activation=activation,
            trace=trace,
            noise=noise,
            solver=solver,
            tolerance=tolerance,
            steps=steps,
            adjoint=adjoint,
        )
        super().__init__([layer], features, context, base, support)
