"""Base distributions as modules: they move, change dtype, train and are saved with their flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroflows.nn import RecordedModule


class Base(RecordedModule):
    """A module that gives a base distribution, ``forward(context) -> Distribution``.

    Parameters
    ----------
    event_shape
        An integer for a vector, or a shape.
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        if isinstance(event_shape, int):
            event_shape = (event_shape,)
        self.event_shape = torch.Size(event_shape)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution, with the module's event shape.

        Its batch shape is ``()``, or that of the context ``(*batch, context)``, which a flow gives
        as its layers get it: standardised, where a fit has set the flow's standardisation.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(context)")


class StandardNormal(Base):
    """Independent normals with mean 0 and variance 1; no parameters.

    Examples
    --------
    >>> StandardNormal(3)().event_shape
    torch.Size([3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return UnitNormal(self.loc, self.scale, validate_args=False).to_event(len(self.event_shape))


class UnitNormal(dist.Normal):
    """A normal of mean 0 and variance 1, in a third of the operations: small flows notice."""

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * value.square() - 0.5 * math.log(2 * math.pi)


class DiagonalNormal(Base):
    """Independent normals with learned mean and scale; starts at mean 0 and variance 1.

    Examples
    --------
    >>> sum(p.numel() for p in DiagonalNormal(3).parameters())
    6
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        normal = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False)
        return normal.to_event(len(self.event_shape))


class FullNormal(Base):
    r"""Normal with learned mean and covariance :math:`L L^\top`; starts as the standard normal.

    :math:`L` is lower triangular with diagonal :math:`e^{d} > 0`. A density costs one triangular
    solve, a draw one product. Before layers that mix linearly (`pyroflows.layers.LULinear`) it adds
    nothing; alone it is the normal that a flow must beat.

    Parameters
    ----------
    features
        Size of the event, a vector.

    Examples
    --------
    >>> FullNormal(3)().covariance_matrix.shape
    torch.Size([3, 3])
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        if len(self.event_shape) != 1:
            raise ValueError(f"features: expected the size of a vector, got {features}")
        features = self.event_shape[0]
        self.loc = nn.Parameter(torch.zeros(features))
        self.factor = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        scale_tril = self.factor.tril(-1) + self.log_diagonal.exp().diag()
        return dist.MultivariateNormal(self.loc, scale_tril=scale_tril, validate_args=False)


class Laplace(Base):
    """Independent Laplace distributions with mean 0 and scale 1; no parameters.

    Sharper in the middle and heavier in the tails (exponential) than the normal. Its log density
    has a kink at 0.

    Examples
    --------
    >>> Laplace(2)().log_prob(torch.zeros(2)).exp()
    tensor(0.2500)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        laplace = dist.Laplace(self.loc, self.scale, validate_args=False)
        return laplace.to_event(len(self.event_shape))


class UniformBox(Base):
    """Uniform distribution on a box, its boundary included; no parameters.

    Outside of the box the log density is ``-inf``, so a flow over it scores ``-inf`` whatever its
    inverse maps there, and has no gradient to bring it back: for layers whose inverse ends in the
    box, or for sampling.

    Parameters
    ----------
    event_shape
        An integer for a vector, or a shape.
    low, high
        Ends of the box, numbers or tensors that broadcast to the event.

    Raises
    ------
    ValueError
        Unless ``low`` is below ``high`` everywhere.

    Examples
    --------
    >>> UniformBox(2, 0.0, 4.0)().log_prob(torch.tensor([[1.0, 4.0], [1.0, 5.0]]))
    tensor([-2.7726,    -inf])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, event_shape: int | Sequence[int], low: Tensor | float, high: Tensor | float
    ) -> None:
        super().__init__(event_shape)
        for name, end in (("low", low), ("high", high)):
            end = torch.as_tensor(end, dtype=torch.get_default_dtype())
            self.register_buffer(name, end.expand(self.event_shape).clone())
        if not (self.low < self.high).all():
            raise ValueError(f"expected low < high, got low={low} and high={high}")

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        box = _Box(self.low, self.high, validate_args=False)
        return box.to_event(len(self.event_shape))


class _Box(dist.Uniform):
    """With its upper end, and with NaN for NaN."""

    def log_prob(self, value: Tensor) -> Tensor:
        inside = (value >= self.low) & (value <= self.high)
        log_prob = torch.where(inside, -(self.high - self.low).log(), -torch.inf)
        return torch.where(value.isnan(), value, log_prob)


class StudentT(Base):
    r"""Independent Student-t distributions with learned degrees of freedom per dimension.

    Heavier tails than the normal, for data and posteriors that have them.

    Parameters
    ----------
    event_shape
        An integer for a vector, or a shape.
    df
        Degrees of freedom to start from, more than ``min_df``.
    learn_df
        Whether they are learned.

    Examples
    --------
    >>> StudentT(2, df=5.0)().base_dist.df
    tensor([5., 5.], grad_fn=<AddBackward0>)
    """

    #: Below one degree of freedom not even the mean exists, and fits do not come back.
    min_df = 1.0
    loc: Tensor
    scale: Tensor

    def __init__(
        self, event_shape: int | Sequence[int], df: float = 10.0, learn_df: bool = True
    ) -> None:
        super().__init__(event_shape)
        if df <= self.min_df:
            raise ValueError(f"df: expected more than {self.min_df}, got {df}")
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))
        log_excess = torch.full(self.event_shape, math.log(df - self.min_df))
        self.log_excess_df = nn.Parameter(log_excess, requires_grad=learn_df)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        df = self.min_df + self.log_excess_df.exp()
        return _student_t(df, self.loc, self.scale).to_event(len(self.event_shape))


def _student_t(df: Tensor, loc: Tensor, scale: Tensor) -> dist.StudentT:
    """Without the check of values that torch's constructor makes on its inner chi-square.

    Meta tensors have no values, a compiled graph would break, and a GPU would have to wait.
    """
    student = dist.StudentT.__new__(dist.StudentT)
    student.df, student.loc, student.scale = df, loc, scale
    student._chi2 = dist.Chi2(df, validate_args=False)
    torch.distributions.Distribution.__init__(student, df.shape, validate_args=False)
    return student
