"""Export a guide or an MCMC run to ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import import_module, metadata
from typing import Any, Literal

import numpy as np

from pyroflows.diagnostics.draws import draw_posterior
from pyroflows.diagnostics.groups import Array, Exporter, Group, without_model
from pyroflows.diagnostics.predictions import isolated
from pyroflows.diagnostics.psis import PSIS

Backend = Literal["auto", "arviz", "arviz-base"]

_NO_MODEL = (
    "The MCMC kernel has no model, so that only posterior and sample_stats are exported. "
    "Give the model as model=... for the other groups."
)


def to_arviz(
    fitted: Any,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    report: PSIS | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    prior: bool = True,
    neutra: Any = None,
    model: Callable[..., Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    seed: int | None = None,
    backend: Backend = "auto",
) -> Any:
    """Export a fitted guide, or an MCMC run, to ArviZ.

    Groups
        - ``posterior``: latent sites under the model's own names, in the model's own (constrained)
          units, then deterministic sites, which appear nowhere else but in ``prior``.
        - ``sample_stats``: of a guide, ``lp`` = log p(latents, data), ``log_q`` and
          ``log_weight`` = lp - log_q, all of the unconstrained latents; of MCMC, ``diverging``,
          and the acceptance rate of each chain as an attribute.
        - ``log_likelihood``: log density of each observed datum given the draw. It is not
          summed over plates, nor scaled by `poutine.scale` or subsampling; an entry that the model
          masks is 0, as it adds nothing. `pyro.factor` is not an observation and is left out.
        - ``posterior_predictive``: new values of the observed sites and of sites that have no
          draws (the y of ``model(x, y=None)``; discrete sites that were summed out).
        - ``prior``, ``prior_predictive``: draws of the model forwards, as many as ``num_samples``.
        - ``observed_data``, and ``constant_data``: tensors and arrays among the model's arguments,
          by the names of its parameters, that are not observed values.

    A group that cannot be had is left out with a warning that says why: ``log_likelihood`` of sites
    that run after a summed-out discrete site, ``prior`` with an improper prior. A plate that is
    subsampled exports one minibatch, the same for all draws; the plate's coordinates say which.
    ``lp`` and ``log_weight`` are left out where the model scores the same draws differently twice.

    Parameters
    ----------
    fitted
        A guide (`AutoFlow`) or a `pyro.infer.MCMC` object that has run.
    *args
        The model's arguments. Without any, MCMC uses those of its ``run``.
    model_kwargs
        The model's keyword arguments.
    num_samples
        Draws from the guide (all draws of an MCMC run are taken), and from the prior.
    report
        What is known of the guide, ``fit.psis`` or `psis`'s: its `PSIS.figures`, the verdict among
        them, become attributes of ``sample_stats`` with the prefix ``psis_``.
    log_likelihood, posterior_predictive, prior
        Whether to evaluate these groups. They run the model: at all draws at once where it
        broadcasts, else draw by draw.
    neutra
        The `NeuTraReparam`, or its guide, in whose space an MCMC run was made.
    model
        The model, where ``fitted`` does not know it or holds a wrapped one.
    dims
        Names of dimensions by variable, in place of plate names: ``{"theta": ["school"]}``.
    coords
        Labels by dimension: ``{"school": ["A", "B", ...]}``.
    seed
        Makes the result reproducible and leaves torch's global random state as it was.
    backend
        ``"arviz"`` or ``"arviz-base"``, the 1.x line; ``"auto"`` takes what is installed,
        ``arviz`` first.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        Posterior variables have dimensions ``(chain, draw, *plates, *event)``: plates by their
        names in the order of the axes, event axes as ``<site>_dim_<axis>``. Guide draws
        are one chain. Log densities are in nats.

    Raises
    ------
    TypeError
        If ``fitted`` is of another kind, or the model does not accept its arguments.
    ValueError
        If ``num_samples`` is below 1, MCMC has not run, it ran in the space of a guide and
        ``neutra`` is missing, or ``dims`` names what is not there.
    ImportError
        If ArviZ is not installed.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import MCMC, NUTS
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("school", 3):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=10, disable_progbar=True)
    >>> mcmc.run(torch.tensor([0.1, 0.2, 0.4]))
    >>> idata = to_arviz(mcmc, seed=0)
    >>> idata.posterior["mu"].dims, idata.log_likelihood["y"].dims
    (('chain', 'draw'), ('chain', 'draw', 'school'))
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples: expected an integer of at least 1, got {num_samples!r}.")
    assemble = _assembler(backend)
    with isolated(seed):
        draws = draw_posterior(
            fitted, args, model_kwargs, num_samples=num_samples, model=model, neutra=neutra
        )
        if draws.model is None:
            groups, labels, notes = without_model(draws), {}, [_NO_MODEL]
        else:
            exporter = Exporter(draws, draws.model)
            groups = exporter.at_draws(log_likelihood)
            groups |= exporter.posterior_predictive() if posterior_predictive else {}
            groups |= exporter.prior(num_samples) if prior else {}
            groups |= exporter.data()
            labels, notes = exporter.labels, exporter.notes
    for note in notes:
        warnings.warn(note, stacklevel=2)
    _check_dims(dims or {}, groups)
    datasets = {
        group: _dataset(variables, dims or {}, {**labels, **(coords or {})})
        for group, variables in groups.items()
        if variables
    }
    figures = {} if report is None else report.figures()
    attrs = draws.attrs | {f"psis_{name}": value for name, value in figures.items()}
    datasets["sample_stats"].attrs.update(attrs)
    return assemble(datasets)


def _check_dims(dims: Mapping[str, Sequence[str | None]], groups: Mapping[str, Group]) -> None:
    own: dict[str, int] = {}
    for group in groups.values():
        for name, variable in group.items():
            own[name] = max(len(variable.axes), own.get(name, 0))
    for name, given in dims.items():
        if isinstance(given, str) or len(given) > own.get(name, -1):
            found = f"it has {own[name]}" if name in own else f"the variables are {sorted(own)}"
            raise ValueError(
                f"dims: expected, for a variable of the export, a list of names of its dimensions "
                f"behind chain and draw, got {name!r}: {given!r}; {found}."
            )


def _dataset(
    group: Group, dims: Mapping[str, Sequence[str | None]], labels: Mapping[str, Any]
) -> Any:
    import xarray as xr

    variables: dict[str, tuple[tuple[str, ...], Array]] = {}
    coords: dict[str, Any] = {}
    for name, variable in group.items():
        given = list(dims.get(name, ()))[: len(variable.axes)]  # log densities have no event axes
        axes = [*given, *variable.axes[len(given) :]]
        named = [axis or f"{name}_dim_{position}" for position, axis in enumerate(axes)]
        variables[name] = ((*variable.lead, *named), variable.values)
        for dim, size in zip(variables[name][0], variable.values.shape, strict=True):
            coords.setdefault(dim, labels.get(dim, np.arange(size)))
    return xr.Dataset(variables, coords, _attributes())


def _attributes() -> dict[str, str]:
    from pyroflows import __version__

    return {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "created_by": "pyroflows",
        "created_by_version": __version__,
        "inference_library": "pyro",
        "inference_library_version": metadata.version("pyro-ppl"),
    }


def _assembler(backend: Backend) -> Callable[[dict[str, Any]], Any]:
    """Return what joins the groups: InferenceData for arviz 0.x, DataTree for the 1.x line."""
    order: dict[str, tuple[str, ...]] = {
        "auto": ("arviz", "arviz_base"),
        "arviz": ("arviz",),
        "arviz-base": ("arviz_base",),
    }
    if backend not in order:
        raise ValueError(f"backend: expected one of {sorted(order)}, got {backend!r}.")
    for name in order[backend]:
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        if name == "arviz" and module.__version__.startswith("0."):
            return lambda datasets: module.InferenceData(**datasets)
        return import_module("xarray").DataTree.from_dict
    raise ImportError(
        f"to_arviz needs {' or '.join(order[backend])}, and it is not installed. "
        "Install it: pip install arviz (or arviz-base and arviz-stats for the 1.x line)."
    )
