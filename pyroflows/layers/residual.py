"""Residual layers: the identity plus a contraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from pyroflows.layers.base import Layer, check_sizes
from pyroflows.layers.planar import OnePass, check_one_pass
from pyroflows.nn import Conditioner, LipschitzMLP
from pyroflows.transforms import InverseTransform, ResidualTransform, Transform

#: Features up to which ``"auto"`` takes the exact log-determinant.
EXACT_FEATURES = 64


class _Contraction:
    """A network of one output per feature, with its context in hand, as a function."""

    def __init__(self, conditioner: Conditioner) -> None:
        self.conditioner = conditioner

    def __call__(self, x: Tensor) -> Tensor:
        return self.conditioner(x)[0]

    def detach_params(self, keep_context: bool = False) -> _Contraction:
        return _Contraction(self.conditioner.detach_params(keep_context))


class ResidualLayer(Layer):
    r"""Residual map, :math:`y = x + g(x, c)` with a network :math:`g` that contracts.

    One direction is closed-form: a network pass for the value, and for the log-determinant one
    vector-Jacobian product for each feature, or some 18 one after another where it is estimated.
    The other direction solves a fixed point: some ten passes, each with a Jacobian (up to 64
    features), or up to hundreds of plain ones. Starts as the identity.

    Parameters
    ----------
    features, context
        Sizes of the event and of the context (0: none).
    one_pass
        The closed-form direction: ``"inverse"`` for densities of data, ``"forward"`` for guides.
    log_det
        ``"exact"``, ``"unbiased"`` (densities are random estimates, in nats), or ``"auto"``: exact
        up to 64 features. The weights of one serve the other.
    lipschitz
        Bound of the network's Lipschitz constant, below 1.
    hidden_features
        Of the `pyroflows.nn.LipschitzMLP`.

    Raises
    ------
    ValueError
        For sizes that are not positive, a bound that is not between 0 and 1, or another word.

    References
    ----------
    Chen, Behrmann, Duvenaud and Jacobsen, "Residual flows for invertible generative modeling",
    NeurIPS 2019.

    Examples
    --------
    >>> ResidualLayer(2, one_pass="forward")()(torch.ones(2))
    tensor([1., 1.], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        one_pass: OnePass = "inverse",
        log_det: Literal["auto", "exact", "unbiased"] = "auto",
        lipschitz: float = 0.97,
        hidden_features: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        check_sizes(features, context)
        check_one_pass(one_pass)
        if log_det not in ("auto", "exact", "unbiased"):
            raise ValueError(f"log_det: expected 'auto', 'exact' or 'unbiased', got {log_det!r}")
        if not 0 < lipschitz < 1:
            raise ValueError(f"lipschitz: expected a number between 0 and 1, got {lipschitz}")
        if log_det == "auto":
            log_det = "exact" if features <= EXACT_FEATURES else "unbiased"
        self.one_pass = one_pass
        self.log_det = log_det
        self.lipschitz = lipschitz
        self.network = LipschitzMLP(features, context, hidden_features, lipschitz)

    def forward(self, context: Tensor | None = None) -> Transform:
        function = _Contraction(Conditioner(self.network, 1, context))
        transform = ResidualTransform(function, self.lipschitz, self.log_det)
        return transform if self.one_pass == "forward" else InverseTransform(transform)
