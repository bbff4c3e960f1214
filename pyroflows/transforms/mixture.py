"""Distribution functions of logistic mixtures, on the logit scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyroflows.numerics import soft_clamp
from pyroflows.transforms.base import ComposedTransform, Transform
from pyroflows.transforms.increasing import IncreasingTransform
from pyroflows.transforms.univariate import Affine

# Components start between -SPREAD and SPREAD: near enough to the identity, and no two alike.
SPREAD = 1.0
# Components are wider than exp(-LOG_SCALE) and narrower than exp(LOG_SCALE).
LOG_SCALE = 4.0
# The scale of a logistic distribution with unit deviation.
LOGISTIC_SCALE = math.sqrt(3) / math.pi


class MixtureLogisticTransform(IncreasingTransform):
    r"""Distribution function of a mixture of logistics, as log-odds.

    .. math:: y = \operatorname{logit} \sum_k \pi_k\, \sigma\!\left(\frac{x - \mu_k}{s_k}\right)

    Far out it is a straight line, whose slope is that of the widest component. All is computed from
    logarithms, so that nothing overflows or cancels there.

    Parameters
    ----------
    logits, means, log_scales
        The components, shape ``(components, ...)``; the weights are the softmax of ``logits``.

    Examples
    --------
    >>> zero = torch.zeros(1, 1)
    >>> MixtureLogisticTransform(zero, zero + 1, zero)(torch.tensor([-1e4, 3.0]))
    tensor([-1.0001e+04,  2.0000e+00])
    """

    def __init__(self, logits: Tensor, means: Tensor, log_scales: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.means = means
        self.log_scales = log_scales

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Components last, to meet points of any batch shape.
        logits, means, log_scales = (
            t.movedim(0, -1) for t in (self.logits, self.means, self.log_scales)
        )
        scaled = (x.unsqueeze(-1) - means) * (-log_scales).exp()
        below, above = logsigmoid(scaled), logsigmoid(-scaled)
        log_weights = logits.log_softmax(-1)
        lower, upper = log_weights + below, log_weights + above
        log_cdf, log_survival = lower.logsumexp(-1), upper.logsumexp(-1)
        # Of the logit, the slope is that of log F plus that of -log(1 - F), both positive.
        slopes = torch.cat(
            [
                lower - log_cdf.unsqueeze(-1) + above - log_scales,
                upper - log_survival.unsqueeze(-1) + below - log_scales,
            ],
            dim=-1,
        )
        return log_cdf - log_survival, slopes.logsumexp(-1)


def _mixture(raw: Tensor) -> MixtureLogisticTransform:
    """From raw parameters ``(3 * components, ...)``."""
    logits, means, log_scales = raw.chunk(3)
    means, log_scales = means + _anchors(means), soft_clamp(log_scales, LOG_SCALE)
    return MixtureLogisticTransform(logits, means, log_scales)


def _anchors(means: Tensor) -> Tensor:
    """Where the means are for raw parameters of zero, ``(components, 1, ...)``."""
    count = len(means)
    places = [SPREAD * (2 * k + 1 - count) / count for k in range(count)]
    anchors = torch.tensor(places, dtype=means.dtype, device=means.device)
    return anchors.reshape(count, *(1,) * (means.dim() - 1))


@dataclass(frozen=True)
class MixtureLogistic:
    r"""Recipe of a logistic mixture's distribution function, its log-odds and an affine map.

    .. math::

        y = e^{a} \operatorname{logit} \sum_k \pi_k\, \sigma\!\left(\frac{x - \mu_k}{s_k}\right) + b

    It has ``3 * components + 2`` raw parameters per feature. Zero raw parameters give nearly the
    identity: the components start side by side, for equal ones would stay equal for ever. The
    inverse is found as a root.

    Parameters
    ----------
    components
        Number of logistic distributions.

    References
    ----------
    Ho, Chen, Srinivas, Duan and Abbeel, "Flow++: improving flow-based generative models with
    variational dequantization and architecture design", ICML 2019.

    Examples
    --------
    >>> recipe = MixtureLogistic(components=4)
    >>> y = recipe(torch.zeros(recipe.count, 3))(torch.tensor([-1.0, 0.0, 1e4]))
    """

    components: int = 8
    affine: ClassVar[Affine] = Affine()

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components: expected at least one, got {self.components}")

    @property
    def count(self) -> int:
        return 3 * self.components + self.affine.count

    def __call__(self, params: Tensor) -> Transform:
        raw, affine = params.tensor_split([3 * self.components])
        return ComposedTransform([_mixture(raw), self.affine(affine)])

    def gaussianizing(self, rows: Tensor) -> Tensor:
        """Raw parameters with which rows ``(N, features)`` become about standard normal.

        One component has the mean and the deviation of all rows: the widest decides the tails, and
        steeper ones would throw what lies beyond the rows farther out with every layer. Each of the
        others has those of an equal share of the sorted rows, and no less than the bandwidth of a
        kernel estimate. The affine map takes the logistic distribution to unit variance.
        """
        means, scales = rows.mean(0, keepdim=True), rows.std(0, correction=0, keepdim=True)
        shares = self.components - 1
        if shares:
            places = torch.linspace(0, len(rows) - 1, 32 * shares, device=rows.device)
            groups = rows.sort(0)[0][places.round().long()].reshape(shares, 32, -1)
            local = groups.std(1).maximum(len(rows) ** -0.2 * scales)
            means, scales = torch.cat([means, groups.mean(1)]), torch.cat([scales, local])
        log_scales = (scales * LOGISTIC_SCALE).log()
        raw = torch.zeros_like(means[:1]).repeat(self.count, 1)
        _, raw_means, raw_log_scales = raw[: 3 * self.components].chunk(3)
        raw_means.copy_(means - _anchors(raw_means))
        raw_log_scales.copy_(_soft_clamp_inverse(log_scales, LOG_SCALE))
        raw[-1] = _soft_clamp_inverse(
            torch.full_like(raw[-1], LOGISTIC_SCALE).log(), self.affine.max_log_scale
        )
        return raw


def _soft_clamp_inverse(y: Tensor, bound: float) -> Tensor:
    """The argument of `soft_clamp` that gives ``y``, or a value near the bound."""
    stretch = math.pi / (2 * bound)
    return torch.tan(y.clamp(-0.95 * bound, 0.95 * bound) * stretch) / stretch


@dataclass(frozen=True)
class DeepSigmoidal:
    r"""Recipe of a deep sigmoidal map: sums of sigmoids and logits in turn.

    .. math::

        h_0 = x, \qquad h_l = \operatorname{logit} \sum_k
        \pi_{lk}\, \sigma\!\left(\frac{h_{l-1} - \mu_{lk}}{s_{lk}}\right), \qquad y = h_L

    It has ``3 * units * depth`` raw parameters per feature; zeros give nearly the identity. A
    universal approximator of increasing functions, with straight tails. The inverse is found as one
    root for each layer.

    Parameters
    ----------
    units
        Sigmoids in each layer.
    depth
        Number :math:`L` of layers.

    References
    ----------
    Huang, Krueger, Lacoste and Courville, "Neural autoregressive flows", ICML 2018.
    """

    units: int = 8
    depth: int = 1

    def __post_init__(self) -> None:
        if self.units < 1 or self.depth < 1:
            raise ValueError(
                f"expected at least one unit and one layer, got units={self.units}, "
                f"depth={self.depth}"
            )

    @property
    def count(self) -> int:
        return 3 * self.units * self.depth

    def __call__(self, params: Tensor) -> Transform:
        return ComposedTransform([_mixture(raw) for raw in params.split(3 * self.units)])
