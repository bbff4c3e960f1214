"""Flows for tables with integers and categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroflows.distributions import (
    DequantizedDistribution,
    FlowDistribution,
    Quantization,
    StandardNormal,
)
from pyroflows.flows.flow import Flow
from pyroflows.flows.transform import FlowTransform
from pyroflows.nn import RecordedModule


class Dequantized(Flow):
    r"""A flow for rows with integers, categories and continuous columns, scored by a bound.

    A row is a rounded draw of ``flow``, the density of real vectors: the floor of one coordinate
    for each integer, the largest of ``count`` coordinates for each category. The log probability is
    bounded from below by :math:`\log p(v) - \log q(v \mid x)`, where noise :math:`q` leads from a
    row back to the vectors behind it; `fit_mle` raises the bound.

    ``dequantized(context)`` has ``sample``, ``log_prob_bound(value, draws=1)`` and no ``log_prob``.
    One draw of the bound costs an inverse pass of the flow and a forward pass of the noise.

    Parameters
    ----------
    flow
        The density: a flow without a support of its own, whose features are the continuous columns,
        the integers, and ``count`` for each of the `Categories`.
    columns
        What each column holds: a continuous scalar constraint (``constraints.real``,
        ``positive``), a discrete one (``integer_interval(0, 9)``, ``nonnegative_integer``,
        ``boolean``, Pyro's ``integer``), or `pyroflows.distributions.Categories`. By default
        integers all.
    noise
        Conditional flow of the noise, for variational dequantization: its features are the flow's
        without the continuous columns, its context the flow's features and context together. By
        default normal noise, with which integers are dequantized uniformly.

    Raises
    ------
    ValueError
        Where the sizes of flow, columns and noise do not fit.

    References
    ----------
    Theis, van den Oord and Bethge, "A note on the evaluation of generative models", ICLR 2016; Ho,
    Chen, Srinivas, Duan and Abbeel, "Flow++: improving flow-based generative models with
    variational dequantization and architecture design", ICML 2019; Hoogeboom, Nielsen, Jaini, Forré
    and Welling, "Argmax flows and multinomial diffusion: learning categorical distributions",
    NeurIPS 2021.

    Examples
    --------
    >>> from pyro.distributions import constraints
    >>> from pyroflows.distributions import Categories
    >>> columns = [constraints.integer_interval(0, 9), Categories(3), constraints.real]
    >>> flow = Dequantized(pf.NSF(5), columns, noise=pf.NSF(4, context=5))
    >>> flow().sample((7,)).shape
    torch.Size([7, 3])
    >>> flow().log_prob_bound(torch.tensor([9.0, 2.0, -0.5]), draws=10).shape
    torch.Size([])
    """

    def __init__(
        self, flow: Flow, columns: Sequence[Any] | None = None, noise: Flow | None = None
    ) -> None:
        RecordedModule.__init__(self)
        if columns is None:
            columns = [constraints.integer] * flow.event_shape.numel()
        self.quantization = Quantization(columns)
        self.event_shape = torch.Size([len(columns)])
        self.context_size = flow.context_size
        self.flow = flow
        _check("flow", flow, self.quantization.width, flow.context_size)
        features = self.quantization.noise_features
        if noise is not None:
            _check("noise", noise, features, self.quantization.width + flow.context_size)
        self.noise = noise
        self.normal = StandardNormal(features)

    @property
    def transform(self) -> FlowTransform:  # type: ignore[override]
        """The transform of the density."""
        return self.flow.transform

    @property
    def standardizes(self) -> bool:
        """Whether data may be standardised."""
        return self.flow.standardizes

    @property
    def support(self) -> Any:
        """A scalar constraint for each column."""
        return self.quantization.support

    def forward(
        self, context: Tensor | None = None, *, context_is_draw: bool = False
    ) -> DequantizedDistribution:
        """The distribution under a context ``(*batch, context)``."""
        density = self.flow(context, context_is_draw=context_is_draw)

        def noise(x: Tensor) -> FlowDistribution:
            return self._noise(x, context)

        return DequantizedDistribution(density, self.quantization, noise)

    def _noise(self, x: Tensor, context: Tensor | None) -> FlowDistribution:
        context = self.transform.standardized(context)
        given = [] if context is None else [context]
        batch = torch.broadcast_shapes(x.shape[:-1], *(c.shape[:-1] for c in given))
        if self.noise is None:
            return FlowDistribution(self.normal().expand(batch), [])
        row = self.transform.standardization().inv(self.quantization.encode(x))
        return self.noise(torch.cat([part.expand(*batch, -1) for part in (row, *given)], -1))

    def unconstrain(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Rows as real vectors, with noise drawn afresh."""
        with torch.no_grad():
            noise = self._noise(x, context).sample()
            return self.quantization.dequantize(x, noise)[0]

    def initialize_(self, x: Tensor, context: Tensor | None = None) -> None:
        self.flow.initialize_(self.unconstrain(x, context), context)


def _check(name: str, flow: Flow, features: int, context: int) -> None:
    if flow.event_shape != (features,) or flow.context_size != context:
        raise ValueError(
            f"{name}: for these columns, expected a flow of {features} features and a context of "
            f"size {context}, got event shape {tuple(flow.event_shape)} and size "
            f"{flow.context_size}"
        )
    if flow.transform.to_support is not None:
        raise ValueError(f"{name}: expected a flow without a support; give it among the columns")
