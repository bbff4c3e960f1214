"""Neural likelihood estimation: a flow for the likelihood of a model that only simulates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.diagnostics import Simulations, simulate
from pyroflows.diagnostics.simulation import only
from pyroflows.errors import ShapeError
from pyroflows.flows import NSF, Flow
from pyroflows.guides.reading import Model, Reading, named, read_model
from pyroflows.training.mle import fit_mle
from pyroflows.training.npe import check_sites
from pyroflows.training.processes import seeded
from pyroflows.training.result import Fit

#: Rows of one simulation that are trained on, at most: they share its latents.
ROWS = 4


@dataclass(frozen=True)
class Task:
    """Which site of a model is to have a flow for its density, given which latents.

    Attributes
    ----------
    model
        The model.
    latents
        Its latent sites, all global.
    observed
        The site of the data.
    rows
        The plate of independent rows, none where the flow is of the whole data.
    reading
        The sites of one call of the model.
    """

    model: Model
    latents: tuple[str, ...]
    observed: str
    rows: tuple[str, ...]
    reading: Reading

    def context(self, values: Mapping[str, Tensor]) -> Tensor:
        """The unconstrained latents side by side, ``(*batch, size)``."""
        parts = []
        for name in self.latents:
            fn = self.reading.sites[name]["fn"]
            batch = values[name].shape[: values[name].dim() - fn.event_dim]
            parts.append(biject_to(fn.support).inv(values[name]).reshape(*batch, -1))
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)

    def data(self, value: Tensor, leading: int) -> Tensor:
        """Data as vectors, ``(*leading, features)``, or with the rows ``(*leading, n, features)``.

        Raises
        ------
        ShapeError
            For data of another shape than the model's, but for the number of rows.
        """
        own: list[int | str] = list(self.reading.sites[self.observed]["fn"].shape())
        event_dim = self.reading.sites[self.observed]["fn"].event_dim
        for row in self.rows:
            own[self.reading.frames(self.observed)[row].dim - event_dim] = "rows"
        got = list(value.shape[leading:])
        if len(got) != len(own) or any(e not in (g, "rows") for e, g in zip(own, got, strict=True)):
            raise ShapeError(
                f"site {self.observed!r}: expected data of shape ({', '.join(map(str, own))}), got "
                f"{tuple(got)}"
            )
        aligned = self.reading.data(self.observed, self.rows, value)
        return aligned.flatten(leading + len(self.rows))

    def with_flow(self, flow: Flow, data: Tensor) -> Model:
        """The model up to its last latent, then the flow, observed at these data."""
        flow = copy.deepcopy(flow).requires_grad_(False)
        value = self.data(data, 0).to(flow.dtype)
        prior = only(self.model, self.latents)
        frames = [self.reading.frames(self.observed)[row] for row in self.rows]

        def surrogate(*args: Any, **kwargs: Any) -> None:
            nodes: Any = poutine.trace(prior).get_trace(*args, **kwargs).nodes
            context = self.context({name: nodes[name]["value"] for name in self.latents})
            with ExitStack() as stack:
                for frame in frames:
                    stack.enter_context(pyro.plate(frame.name, len(value), dim=frame.dim))
                pyro.sample(self.observed, flow(context.to(flow.dtype)), obs=value)

        return surrogate


@dataclass
class NLEFit(Fit):
    """Result of `pyroflows.fit_nle`; the checked losses are those of held-out simulations.

    Attributes
    ----------
    flow
        The density of the data, or of a row of them, as vectors; its context are the unconstrained
        latents side by side.
    simulations
        All simulations; their values are by site.
    """

    flow: Flow = field(kw_only=True, repr=False)
    simulations: Simulations = field(kw_only=True)
    task: Task = field(kw_only=True, repr=False)

    _quantity = "negative log likelihood (nats)"
    _checked = "validation"

    def __str__(self) -> str:
        return f"{self._summary()}\n{self.simulations}"

    def model(self, data: Tensor) -> Model:
        """The model with the flow in the simulator's place, observed at these data.

        It takes the model's arguments and has its latents and their priors: sample it with
        `pyroflows.run_mcmc` or Pyro's NUTS, or give it a guide. The flow is a copy and constant.

        Parameters
        ----------
        data
            Value of the observed site; of any number of rows where these are independent.

        Raises
        ------
        ShapeError
            For data of another shape.
        """
        return self.task.with_flow(self.flow, torch.as_tensor(data))


def fit_nle(
    model: Model,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    observed: str,
    rows: str | None = None,
    flow: Callable[[int, int], Flow] = NSF,
    simulations: int | Simulations = 10_000,
    vectorized: bool | None = None,
    workers: int = 0,
    max_failed: float = 0.1,
    progress: bool | None = None,
    seed: int | None = None,
    **options: Any,
) -> NLEFit:
    r"""Fit a flow to the likelihood of a simulator (NLE), for MCMC over its latents.

    .. math:: \min_q\; -E_{p(u)\,p(y \mid u)}\left[\log q(y \mid u)\right]

    ``fit.model(y)`` is the model with the flow in the simulator's place, for `pyroflows.run_mcmc`,
    Pyro's NUTS, or a guide. Beside `fit_npe`, which gives the posterior of any data at once, it
    costs MCMC for each observation, and in return learns one row of independent ones and scores
    any number of them, and takes simulations from any proposal: see the example. Every step costs
    one inverse pass, every gradient of MCMC too.

    Parameters
    ----------
    model
        The model, whose data are drawn or simulated by ``pyro.deterministic``. Its latents are
        continuous, and outside plates.
    *args
        The model's arguments. Every other keyword than ``model_kwargs`` is this function's.
    model_kwargs
        The model's keyword arguments.
    observed
        The site of the data.
    rows
        A plate around that site whose rows are independent draws from one distribution, given the
        latents; the flow is then that of one row.
    flow
        From the number of the data's features and the size of the context to a flow.
    simulations
        Number of simulations, or simulations made by `pyroflows.simulate`, from whatever proposal.
    vectorized, workers, max_failed
        Of the simulation, see `pyroflows.simulate`.
    progress
        Whether to show a bar with the loss in nats; None for only in interactive use.
    seed
        Seed of everything random; the global state is left alone.
    **options
        Of the training, see `pyroflows.fit_mle`: ``dtype``, ``device``, ``compile`` and so on.

    Raises
    ------
    ValueError
        For a site or plate that the model lacks, or discrete data.
    NotImplementedError
        For latents inside plates.
    DataError
        For simulations that lack a site.

    References
    ----------
    Papamakarios, Sterratt and Murray, "Sequential neural likelihood: fast likelihood-free
    inference with autoregressive flows", AISTATS 2019.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.deterministic("y", z + 0.5 * torch.randn(z.shape), event_dim=0)
    >>> fit = pf.fit_nle(model, observed="y", simulations=500, vectorized=True, steps=100, seed=0)
    >>> guide = pf.AutoFlow(fit.model(torch.tensor(1.0)))
    >>> draws = guide.sample(50) if pf.fit_svi(guide, steps=50, seed=0).psis else {}

    More simulations where the posterior is, in a second round:

    >>> more = pf.simulate(
    ...     model, sites=["z", "y"], count=50, given=draws, vectorized=True, seed=0
    ... )
    >>> both = fit.simulations.joined(more)
    >>> again = pf.fit_nle(model, observed="y", simulations=both, steps=100, seed=0)
    """
    kwargs = dict(model_kwargs or {})
    with seeded(seed):
        task = _task(model, read_model(model, args, kwargs, None), observed, rows)
        sites = [*task.latents, observed]
        if isinstance(simulations, int):
            how: dict[str, Any] = {"vectorized": vectorized, "workers": workers}
            how.update(max_failed=max_failed, model_kwargs=kwargs)
            simulations = simulate(model, *args, sites=sites, count=simulations, **how)
        check_sites(simulations, sites)
        context = task.context(simulations.values)
        y = task.data(simulations.values[observed], 1).to(context)
        if task.rows:
            y = y[:, :ROWS]
            context = context.unsqueeze(1).expand(*y.shape[:2], -1).flatten(0, 1)
            y = y.flatten(0, 1)
        density = flow(y.shape[-1], context.shape[-1]).to(context)
        fit = fit_mle(density, y, context, progress=progress, **options)
    return NLEFit(
        fit.history,
        fit.stop_reason,
        fit.seconds,
        compiled=fit.compiled,
        flow=density,
        simulations=simulations,
        task=task,
    )


def _task(model: Model, reading: Reading, observed: str, rows: str | None) -> Task:
    """What is asked for, if the model has it."""
    if observed not in reading.sites:
        raise ValueError(
            f"observed: the model has no site {observed!r}; it has {named(reading.sites)}"
        )
    site, frames = reading.sites[observed], reading.frames(observed)
    is_drawn = not site["infer"].get("_deterministic")
    if is_drawn and site["fn"].support.is_discrete:
        raise ValueError(
            f"site {observed!r}: its values are discrete, and a flow has a density. Add uniform "
            "noise to them in the model, by pyro.deterministic(name, count + torch.rand(...))."
        )
    if rows is not None and rows not in frames:
        raise ValueError(f"rows: site {observed!r} is in the plates {named(frames)}, got {rows!r}")
    latents = tuple(
        name for name, node in reading.sites.items() if name != observed and not node["is_observed"]
    )
    if not latents:
        raise ValueError("the model has no latent sites: there is nothing to infer")
    local = [name for name in latents if reading.frames(name)]
    if local:
        raise NotImplementedError(
            f"site {local[0]!r} is in the plates {named(reading.frames(local[0]))}: write latents "
            "of a fixed number as one site, with .expand([n]).to_event(1)"
        )
    return Task(model, latents, observed, () if rows is None else (rows,), reading)
