"""Mixtures of normals as bases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.distributions.bases import Base
from pyroflows.errors import ContextError, check_event
from pyroflows.nn import ResidualMLP
from pyroflows.nn.mlp import Activation
from pyroflows.numerics import bounded_exp


class NormalMixture(TorchDistribution):
    r"""Mixture of diagonal normals, :math:`\sum_k \pi_k \prod_i N(\mu_{ki}, \sigma_{ki}^2)`.

    Its draws have no reparameterised gradients: ``has_rsample`` is False.

    Parameters
    ----------
    logits
        Of the weights, shape ``(*batch, components)``, up to a constant.
    loc, scale
        Shape ``(*batch, components, *event)``.
    event_dims
        Dimensions of an event.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch's own declaration)
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, event_dims: int) -> None:
        self.logits = logits
        self.loc = loc
        self.scale = scale
        event_shape = loc.shape[loc.dim() - event_dims :]
        super().__init__(logits.shape[:-1], event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(
        self, batch_shape: Sequence[int], _instance: NormalMixture | None = None
    ) -> NormalMixture:
        """The same mixture with a larger batch shape: every element draws for itself."""
        batch, event = torch.Size(batch_shape), self.event_shape
        components = self.logits.shape[-1:]
        return NormalMixture(
            self.logits.expand(batch + components),
            self.loc.expand(batch + components + event),
            self.scale.expand(batch + components + event),
            len(event),
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, computed by the logarithm of a sum of exponentials."""
        dims = len(self.event_shape)
        z = (value.unsqueeze(-dims - 1) - self.loc) / self.scale
        each = -z.square() / 2 - self.scale.log() - math.log(2 * math.pi) / 2
        if dims:
            each = each.sum(tuple(range(-dims, 0)))
        return (self.logits.log_softmax(-1) + each).logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draws without gradients, ``(*sample_shape, *batch, *event)``."""
        chosen = dist.Categorical(logits=self.logits, validate_args=False).sample(
            torch.Size(sample_shape)
        )
        dims = len(self.event_shape)
        index = chosen.reshape(*chosen.shape, *(1,) * (dims + 1))
        loc, scale = (
            torch.take_along_dim(
                parameter.expand(*sample_shape, *parameter.shape), index, -dims - 1
            ).squeeze(-dims - 1)
            for parameter in (self.loc, self.scale)
        )
        return loc + scale * torch.randn_like(loc)


class Mixture(Base):
    r"""Mixture of diagonal normals, whose weights, means and scales may depend on a context.

    .. math:: p(z \mid c) = \sum_k \pi_k(c) \prod_i N(z_i;\, \mu_{ki}(c),\, \sigma_{ki}(c)^2)

    For data in clusters, which a single mode must be torn apart to reach. The means start at
    random places (a normal draw, from torch's generator), all weights equal, so that the whole has
    about mean zero and unit variance. Scales are smoothly bounded, so that no component collapses
    onto a point of the data.

    Draws have no reparameterised gradients: densities are fitted and drawn from as with any base,
    and as the guide of an ELBO Pyro takes the (noisier) score function estimator.

    A density costs ``components`` times that of a diagonal normal, and with a context one pass of a
    `pyroflows.nn.ResidualMLP`.

    Parameters
    ----------
    event_shape
        An integer for a vector, or a shape.
    context
        Size of the context (0: none). With one the batch shape is that of the context.
    components
        Number of normals.
    hidden_features, activation
        Of the network, whose output starts at zero.

    Raises
    ------
    ValueError
        For no components, or a negative context.
    ContextError, ShapeError
        For a context that is missing, or of another size.

    References
    ----------
    Bishop, "Mixture density networks", Aston University 1994; Izmailov, Kirichenko, Finzi and
    Wilson, "Semi-supervised learning with normalizing flows", ICML 2020.

    Examples
    --------
    >>> flow = pf.NSF(2, context=3, base=Mixture(2, context=3, components=5))
    >>> flow(torch.zeros(7, 3)).sample((4,)).shape
    torch.Size([4, 7, 2])
    """

    #: Half-width of the interval of log-scales.
    max_log_scale = 7.0

    def __init__(
        self,
        event_shape: int | Sequence[int],
        context: int = 0,
        *,
        components: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(event_shape)
        if components < 1 or context < 0:
            raise ValueError(
                f"expected components >= 1 and context >= 0, got components={components}, "
                f"context={context}"
            )
        shape = (components, *self.event_shape)
        # Half of the variance between the components, half within.
        between = torch.randn(shape) * math.sqrt(0.5) if components > 1 else torch.zeros(shape)
        within = math.log(0.5) / 2 if components > 1 else 0.0
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(between)
        self.log_scale = nn.Parameter(torch.full(shape, within))
        self.context_size = context
        self.network = None
        if context:
            outputs = components + 2 * self.loc.numel()
            self.network = ResidualMLP(0, context, outputs, hidden_features, activation)

    def forward(self, context: Tensor | None = None) -> NormalMixture:
        logits, loc, log_scale = self.logits, self.loc, self.log_scale
        if self.network is not None:
            raw = self.network(*self._inputs(context))
            sizes = [logits.numel(), loc.numel(), log_scale.numel()]
            d_logits, d_loc, d_log_scale = raw.split(sizes, -1)
            logits = logits + d_logits
            loc = loc + d_loc.unflatten(-1, self.loc.shape)
            log_scale = log_scale + d_log_scale.unflatten(-1, self.loc.shape)
        scale = bounded_exp(log_scale, self.max_log_scale)
        return NormalMixture(logits, loc, scale, len(self.event_shape))

    def _inputs(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the network reads: no features, and the context."""
        if context is None:
            raise ContextError(
                f"the mixture expects a context of size {self.context_size}, got none: construct "
                f"the flow with context={self.context_size} as well, and call flow(context)"
            )
        check_event("context", context, (self.context_size,))
        return context[..., :0], context
