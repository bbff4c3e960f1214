"""A flow as a Pyro distribution: fused passes, one remembered draw, path gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import detach
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import transforms as torch_transforms

from pyroflows.distributions.registration import check_registered
from pyroflows.errors import check_dtype, check_event
from pyroflows.numerics import sum_rightmost
from pyroflows.transforms import ComposedTransform
from pyroflows.transforms.base import constant


class _Draw(NamedTuple):
    value: Tensor
    version: int
    log_prob: Tensor


def _base_log_prob(base_dist: Distribution, z: Tensor) -> Tensor:
    """As ``base_dist.log_prob(z)``, where torch's sums over events fail for an empty batch."""
    if 0 not in z.shape and 0 not in base_dist.batch_shape:
        return base_dist.log_prob(z)
    dims = len(base_dist.event_shape)
    batch = torch.broadcast_shapes(z.shape[: z.dim() - dims], base_dist.batch_shape)
    return sum_rightmost(z, dims).expand(batch) if 0 in batch else base_dist.log_prob(z)


class FlowDistribution(TransformedDistribution):
    r"""Distribution of :math:`x = f(z)` with :math:`z` from a base, scored and drawn in one pass.

    .. math:: \log p(x) = \log p_z(f^{-1}(x)) + \log\left|\det \partial f^{-1} / \partial x\right|

    ``log_prob`` costs one inverse pass, ``rsample_and_log_prob`` and ``rsample`` one forward pass.

    A draw made by ``rsample`` while gradients are recorded is remembered by this object with its
    score, and ``log_prob`` of that very tensor, not modified since, is free: Pyro's ELBOs ask for
    just that. The remembered score carries the total derivative with respect to the parameters,
    through the value too; ``log_prob(x.clone())`` scores the draw like any other value. Nothing
    else is remembered.

    As the guide of an ELBO the distribution gives the path gradient ("sticking the landing"), see
    `score_parts`.

    Parameters
    ----------
    base_dist
        Distribution of :math:`z`.
    transforms
        Transforms from base to data.
    module
        The `pyroflows.Flow` that owns the parameters; inside SVI they must be registered with Pyro.
    context_is_draw
        Whether the context is itself a draw of the guide. Path gradients then keep the way through
        it; otherwise they treat the context as a constant, as an encoder's output should be.

    Raises
    ------
    ShapeError, TypeError
        For values of another event shape or dtype. Values are not checked: NaN gives NaN.
    UnregisteredParametersError
        Inside SVI, where trainable parameters are not in the param store.

    References
    ----------
    Roeder, Wu and Duvenaud, "Sticking the landing", NeurIPS 2017.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> from pyroflows.transforms import LUTransform
    >>> z = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    >>> lu = LUTransform(torch.zeros(2, 2), torch.tensor([0.0, 1.0]), torch.zeros(2))
    >>> FlowDistribution(z, [lu]).log_prob(torch.zeros(2))
    tensor(-2.8379)
    """

    def __init__(
        self,
        base_dist: Distribution,
        transforms: Sequence[torch_transforms.Transform],
        *,
        module: Any = None,
        context_is_draw: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        # Values are never validated: a NaN must come out as NaN, and shapes are checked here.
        super().__init__(base_dist, list(transforms), validate_args=False)
        self._transform = ComposedTransform(self.transforms)
        self.module = module
        self.context_is_draw = context_is_draw
        self._draw: _Draw | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draw": None}

    # --- passes -------------------------------------------------------------------------------

    def _extra_dims(self) -> int:
        """Event dimensions that the transforms treat as batch."""
        return len(self.event_shape) - int(self._transform.codomain.event_dim)

    def _forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._transform.call_and_ladj(z)
        return x, _base_log_prob(self.base_dist, z) - sum_rightmost(ladj, self._extra_dims())

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = torch.Size()
    ) -> tuple[Tensor, Tensor]:
        """Draws ``(*sample_shape, *batch, *event)`` and their scores in nats, from one pass.

        `NotImplementedError` if gradients are on and the base has no reparameterised draws.
        """
        self._check_registered()
        if not self.has_rsample and torch.is_grad_enabled():
            raise NotImplementedError(
                f"rsample: the base, a {type(self.base_dist).__name__}, has no reparameterised "
                "draws. Use sample(), or torch.no_grad() where no gradients are needed; "
                "pyro.sample and Pyro's ELBOs choose the score function estimator by themselves."
            )
        draw = self.base_dist.rsample if self.has_rsample else self.base_dist.sample
        return self._forward(draw(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Reparameterised draws, ``(*sample_shape, *batch, *event)``, from one forward pass."""
        value, log_prob = self.rsample_and_log_prob(sample_shape)
        if torch.is_grad_enabled():
            self._draw = _Draw(value, value._version, log_prob)
        return value

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draws without gradients, ``(*sample_shape, *batch, *event)``; nothing is remembered."""
        self._check_registered()
        with torch.no_grad():
            return self._transform(self.base_dist.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, one inverse pass; shape of the batch of value and distribution."""
        draw = self._draw
        if draw is not None and value is draw.value and value._version == draw.version:
            return draw.log_prob
        check_event("value", value, self.event_shape)
        if self.module is not None:
            check_dtype("value", value, self.module.dtype)
        self._check_registered()
        z, ladj = self._transform.inverse_and_ladj(value)
        return _base_log_prob(self.base_dist, z) + sum_rightmost(ladj, self._extra_dims())

    # --- gradients ----------------------------------------------------------------------------

    def detach_params(self) -> FlowDistribution:
        """The same distribution with parameters and context as constants.

        Gradients still flow through the value that it scores, and, where ``context_is_draw``,
        through the context.
        """
        transforms = [constant(t, self.context_is_draw) for t in self.transforms]
        return self._with(detach(self.base_dist), transforms, module=None)

    def score_parts(self, x: Tensor) -> ScoreParts:
        """The parts of an ELBO's gradient, with the path derivative as entropy term.

        The entropy term has the value ``log q(x)`` and the gradient of ``log q`` at constant
        parameters, which leaves out a score of mean zero. Pyro's Trace and TraceGraph ELBOs and
        the non-analytic terms of TraceMeanField use it; RenyiELBO and TraceEnum take ``log_prob``
        and so the total derivative. Costs one inverse pass beside the remembered score.
        """
        log_prob = self.log_prob(x)
        if not (self.has_rsample and x.requires_grad and torch.is_grad_enabled()):
            return super().score_parts(x)
        if torch.jit._trace.is_tracing():
            # Functional calls do not survive tracing: take the parameters' part away instead, and
            # with it the context's, which has mean zero too.
            params_only = self.log_prob(x.detach())
            entropy = log_prob - (params_only - params_only.detach())
        else:
            entropy = self.detach_params().log_prob(x)
        # Pyro tells by the number 0 that there is no score function term.
        return ScoreParts(log_prob, 0, entropy)  # type: ignore[arg-type]

    # --- shapes -------------------------------------------------------------------------------

    def _with(
        self,
        base_dist: Distribution,
        transforms: Sequence[torch_transforms.Transform],
        module: Any,
    ) -> FlowDistribution:
        new = FlowDistribution(
            base_dist, transforms, module=module, context_is_draw=self.context_is_draw
        )
        return new if new.batch_shape == self.batch_shape else new.expand(self.batch_shape)

    def expand(
        self, batch_shape: Sequence[int], _instance: FlowDistribution | None = None
    ) -> FlowDistribution:
        """The same distribution with a larger batch shape: every element draws its own noise."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        new._transform = self._transform
        new.module = self.module
        new.context_is_draw = self.context_is_draw
        new._draw = None
        return super().expand(torch.Size(batch_shape), _instance=new)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> FlowDistribution:
        """Batch dimensions from the right as event dimensions; still a flow distribution."""
        dims = reinterpreted_batch_ndims
        if dims is None:
            dims = len(self.batch_shape)
        if not 0 <= dims <= len(self.batch_shape):
            raise ValueError(
                f"to_event: expected 0 to {len(self.batch_shape)} batch dimensions, got {dims}"
            )
        if dims == 0:
            return self
        transform = torch_transforms.IndependentTransform(self._transform, dims)
        return FlowDistribution(
            self.base_dist.to_event(dims),
            [transform],
            module=self.module,
            context_is_draw=self.context_is_draw,
        )

    def mask(self, mask: Any) -> Any:
        """Masked by a boolean or a boolean tensor; ``True`` is the distribution itself."""
        # Pyro's wrapper would hide `score_parts` where there is nothing to mask.
        return self if mask is True else super().mask(mask)

    def _check_registered(self) -> None:
        if self.module is not None:
            check_registered(self.module)
