"""A base with several fixed modes, for posteriors that have as many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroflows.distributions.bases import Base, UnitNormal
from pyroflows.numerics.concrete import is_plain


class FixedMixture(TorchDistribution):
    r"""Mixture of normals with constant parameters, :math:`\sum_k \pi_k N(\mu_k, L_k L_k^\top)`.

    As the parameters have no gradients, a draw with any component is a reparameterised draw.

    Parameters
    ----------
    log_weights
        :math:`\log \pi`, shape ``(modes,)``.
    loc
        :math:`\mu`, shape ``(modes, features)``.
    factor
        :math:`L`, lower triangular, shape ``(modes, features, features)``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch's own declaration)
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        log_weights: Tensor,
        loc: Tensor,
        factor: Tensor,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.log_weights = log_weights
        self.loc = loc
        self.factor = factor
        super().__init__(torch.Size(batch_shape), loc.shape[-1:], validate_args=False)

    def expand(
        self, batch_shape: Sequence[int], _instance: FixedMixture | None = None
    ) -> FixedMixture:
        """The same mixture with a larger batch shape: every element draws for itself."""
        return FixedMixture(self.log_weights, self.loc, self.factor, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats; one triangular solve for each mode."""
        away = (value.unsqueeze(-2) - self.loc).reshape(-1, *self.loc.shape).transpose(0, 1)
        z = torch.linalg.solve_triangular(self.factor.mT, away, upper=True, left=False)
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        constant = 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)
        each = -0.5 * z.square().sum(-1) - log_det - constant
        total = (each + self.log_weights.unsqueeze(-1)).logsumexp(0)
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return total.reshape(value.shape[:-1]).expand(batch)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch, features)``; one product for each mode."""
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(shape + self.event_shape, dtype=self.loc.dtype, device=self.loc.device)
        chosen = dist.Categorical(logits=self.log_weights, validate_args=False).sample(shape)
        draws = torch.zeros_like(noise)
        for number, (loc, factor) in enumerate(zip(self.loc, self.factor, strict=True)):
            of_mode = (chosen == number).unsqueeze(-1)
            draws = torch.where(of_mode, noise @ factor.mT + loc, draws)
        return draws


class Modes(Base):
    r"""Mixture of normals at fixed places, from which a flow starts that has several modes.

    .. math:: p(z) = \sum_k \pi_k\, N(z;\, \mu_k, L_k L_k^\top)

    A flow from a single normal joins separated modes by filaments, and one that is trained by the
    reverse divergence finds only one of them. Here `set_` places the modes once, as buffers, and
    the layers shape each. Until then it is the standard normal. `pyroflows.fit_svi` sets it to the
    modes that it finds.

    With several modes a density costs a triangular solve and a draw a product for each.

    Parameters
    ----------
    features
        Size of the event.
    most
        Most modes.

    Examples
    --------
    >>> base = Modes(2)
    >>> factor = torch.eye(2).expand(2, 2, 2)
    >>> base.set_(torch.tensor([0.25, 0.75]), torch.tensor([[-5.0, 0.0], [5.0, 0.0]]), factor)
    >>> base().log_prob(torch.tensor([5.0, 0.0]))
    tensor(-2.1256)
    """

    log_weights: Tensor
    loc: Tensor
    factor: Tensor

    def __init__(self, features: int, most: int = 6) -> None:
        super().__init__(features)
        if features < 1 or most < 2:
            raise ValueError(
                f"expected features >= 1 and most >= 2, got features={features}, most={most}"
            )
        log_weights = torch.full((most,), -math.inf)
        log_weights[0] = 0.0
        self.register_buffer("log_weights", log_weights)
        self.register_buffer("loc", torch.zeros(most, features))
        self.register_buffer("factor", torch.eye(features).repeat(most, 1, 1))
        self._known: tuple[Tensor | None, int, int] = None, 0, 0

    @torch.no_grad()
    def set_(self, weights: Tensor, loc: Tensor, factor: Tensor) -> None:
        """Place two modes or more, of positive weights."""
        count = len(weights)
        if not 2 <= count <= len(self.log_weights) or not (weights > 0).all():
            raise ValueError(
                f"weights: expected 2 to {len(self.log_weights)} positive numbers, got {weights}"
            )
        self.log_weights.fill_(-math.inf)
        self.log_weights[:count] = (weights / weights.sum()).log()
        self.loc[:count] = loc
        self.factor[:count] = factor

    def _used(self) -> int:
        """How many modes are set."""
        weights = self.log_weights
        if not is_plain(weights) or weights.is_inference():
            return len(weights)
        # Read once for every change, as a GPU would have to be waited for.
        known, version, used = self._known
        if known is not weights or version != weights._version:
            used = sum(map(math.isfinite, weights.tolist()))
            self._known = weights, weights._version, used
        return used

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        used = self._used()
        if used == 1:
            zero = torch.zeros_like(self.loc[0])
            return UnitNormal(zero, zero + 1, validate_args=False).to_event(1)
        return FixedMixture(self.log_weights[:used], self.loc[:used], self.factor[:used])
