"""Flow matching: continuous flows without solving anything in training."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyroflows.flows import Flow
from pyroflows.layers import ContinuousLayer
from pyroflows.training.devices import Device
from pyroflows.training.result import FlowMatchingFit
from pyroflows.training.rows import fit_rows

Coupling = Literal["independent", "optimal"]

#: Base draws for each held-out row.
CHECK_DRAWS = 8
#: Rows that are paired at once: the time of an assignment grows with their cube.
_PAIRED = 256


class FlowMatchingLoss(nn.Module):
    r"""Mean square between a velocity and the straight way from a base draw to a row.

    .. math::

        \frac{1}{N D} \sum_n \left\| v(t_n, x_n, c_n) - (x_n^1 - x_n^0) \right\|^2, \qquad
        x_n = (1 - t_n)\, x_n^0 + t_n\, x_n^1

    with rows :math:`x^1` in the flow's own standardised units, base draws :math:`x^0`, and times
    spread evenly over the unit interval. Costs one network pass. Its minimiser is the velocity that
    carries the base to the data, though the loss itself does not fall to zero.

    Parameters
    ----------
    flow
        A `pyroflows.CNF`, or a flow of one `pyroflows.layers.ContinuousLayer`.
    coupling
        ``"independent"``, or ``"optimal"`` to pair base draws and rows, 256 at a time, by the least
        total squared distance (an assignment, by scipy): straighter ways, which take a solver fewer
        steps. Not with a context, from which the base draws would no longer be independent.
    draws
        Base draws for each row.

    References
    ----------
    Lipman, Chen, Ben-Hamu, Nickel and Le, "Flow matching for generative modeling", ICLR 2023; Tong
    et al., "Improving and generalizing flow-based generative models with minibatch optimal
    transport", TMLR 2024.
    """

    def __init__(self, flow: Flow, coupling: Coupling = "independent", draws: int = 1) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        layers = list(flow.transform.layers)
        if len(layers) != 1 or not isinstance(layers[0], ContinuousLayer):
            raise TypeError(
                "flow: expected a CNF, or a flow of one ContinuousLayer, got "
                f"{type(flow).__name__} of {[type(layer).__name__ for layer in layers]}. "
                "Fit other flows with fit_mle."
            )
        if coupling not in ("independent", "optimal"):
            raise ValueError(f"coupling: expected 'independent' or 'optimal', got {coupling!r}")
        if coupling == "optimal" and flow.context_size:
            raise ValueError(
                "coupling: with a context 'optimal' would pair base draws by their context and fit "
                "another density; use 'independent'"
            )
        self.layer = layers[0]
        self.coupling = coupling
        self.draws = draws
        # In a list, so that what is trained are the layer's parameters alone.
        self._flow = [flow]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Rows ``(N, features)`` and contexts ``(N, context)`` to a scalar."""
        (flow,) = self._flow
        transform = flow.transform
        x = x.repeat(self.draws, 1)
        context = None if context is None else context.repeat(self.draws, 1)
        with torch.no_grad():
            inner = transform.standardized(context)
            end = transform.standardization().inv(transform.unconstrain(x, context))
            start = flow.base(inner).expand(x.shape[:1]).sample()
            if self.coupling == "optimal":
                parts = zip(end.split(_PAIRED), start.split(_PAIRED), strict=True)
                start = torch.cat([draws[_assignment(rows, draws)] for rows, draws in parts])
            steps = torch.arange(len(x), dtype=x.dtype, device=x.device)
            t = ((steps + torch.rand_like(steps[:1])) / len(x)).unsqueeze(-1)
        velocity = self.layer.velocity(inner)(t, torch.lerp(start, end, t))
        return (velocity - (end - start)).square().mean()


def _assignment(rows: Tensor, draws: Tensor) -> Tensor:
    """For each row the index of its draw, at the least sum of squared distances."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "coupling: 'optimal' needs scipy; run pip install scipy, or choose 'independent'."
        ) from error
    costs = torch.cdist(rows, draws).square().cpu().numpy()
    return torch.as_tensor(linear_sum_assignment(costs)[1], device=rows.device)


def fit_flow_matching(
    flow: Flow,
    x: Any,
    context: Any = None,
    *,
    coupling: Coupling = "independent",
    validation: float | Any = 0.1,
    steps: int = 5000,
    batch_size: int = 256,
    lr: float = 5e-3,
    clip_norm: float = 5.0,
    patience: int | None = None,
    standardize: bool = True,
    device: Device = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    seed: int | None = None,
) -> FlowMatchingFit:
    r"""Fit a continuous flow by conditional flow matching: no ODE is solved.

    .. math:: \min_\theta\; \mathbb E \left\| v_\theta(t, x_t, c) - (x_1 - x_0) \right\|^2

    A step costs one network pass and its gradient, where maximum likelihood takes one for every
    stage of the solver and every product of the trace. The loss is no likelihood: compare fits by
    ``flow(context).log_prob(x)`` on held-out rows. A few steps of `pyroflows.fit_mle` afterwards
    bring what is left. A base distribution with parameters stays as it is.

    Parameters
    ----------
    flow
        A `pyroflows.CNF`; fitted in place.
    x, context
        As in `pyroflows.fit_mle`.
    coupling
        How base draws and rows are paired: ``"independent"``, or ``"optimal"`` for straighter
        ways (needs scipy; not with a context).
    validation
        As in `pyroflows.fit_mle`. A held-out row meets eight base draws, the same at every check.
    patience
        By default none: the loss says little about small gains, and the end of the schedule, where
        the learning rate falls to zero, brings many of them.
    steps, batch_size, lr, clip_norm, standardize, device, dtype, progress, seed
        As in `pyroflows.fit_mle`; steps are cheap here, and the loss takes a large learning rate.

    Returns
    -------
    FlowMatchingFit
        History, stop reason, seconds, ``plot()``.

    Raises
    ------
    TypeError
        For a flow that is not continuous.
    DataError, ShapeError, ContextError
        For data that are not finite or too few, or of another shape.

    References
    ----------
    Lipman, Chen, Ben-Hamu, Nickel and Le, "Flow matching for generative modeling", ICLR 2023; Tong
    et al., "Improving and generalizing flow-based generative models with minibatch optimal
    transport", TMLR 2024.

    Examples
    --------
    >>> x = torch.randn(200, 2) @ torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> flow = pf.CNF(2, hidden_features=(8,), solver="rk4")
    >>> fit = pf.fit_flow_matching(flow, x, steps=20, seed=0)
    >>> fit.stop_reason
    'all steps were done'
    """
    history, reason, seconds, _ = fit_rows(
        flow,
        FlowMatchingLoss(flow, coupling),
        x,
        context,
        validation=validation,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        clip_norm=clip_norm,
        patience=patience,
        standardize=standardize,
        device=device,
        dtype=dtype,
        progress=progress,
        seed=seed,
        check_loss=FlowMatchingLoss(flow, coupling, CHECK_DRAWS),
        title=f"{type(flow).__name__} by flow matching",
        unit="loss",
    )
    return FlowMatchingFit(history, reason, seconds)
