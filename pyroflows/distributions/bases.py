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
        """The distribution, with batch shape ``()`` and the module's event shape."""
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
        normal = dist.Normal(self.loc, self.scale, validate_args=False)
        return normal.to_event(len(self.event_shape))


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
