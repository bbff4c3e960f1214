"""The groups of an ArviZ export, as labelled arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pyroflows.diagnostics.draws import Draws, named_arguments, shared_latent
from pyroflows.diagnostics.predictions import Model, Program
from pyroflows.diagnostics.sites import PADDING, Site, dim_of

Array = np.ndarray[Any, Any]


class Variable(NamedTuple):
    """An array, the plate of each axis behind chain and draw, and whether it has these two."""

    values: Array
    axes: tuple[str | None, ...]
    sampled: bool

    @property
    def lead(self) -> tuple[str, ...]:
        """The dimensions of the draws."""
        return ("chain", "draw") if self.sampled else ()


Group = dict[str, Variable]


def without_model(draws: Draws) -> dict[str, Group]:
    """Label the draws alone."""
    lead = _lead(draws)
    return {
        "posterior": {name: _array(v, lead) for name, v in draws.samples.items()},
        "sample_stats": {name: _array(v, lead) for name, v in draws.stats.items()},
    }


class Exporter:
    """Evaluates a model at draws, one method for one or two groups.

    Attributes
    ----------
    notes
        What was left out, and why.
    """

    def __init__(self, draws: Draws, model: Model) -> None:
        first = {name: value[0] for name, value in draws.samples.items()}
        self.program = Program(model, draws.args, draws.kwargs, first)
        self.draws = draws
        self.num_draws = len(next(iter(draws.samples.values())))
        self.constants = named_arguments(model, draws.args, draws.kwargs)
        self.notes = draws.notes + [
            f"Plate {name!r} is subsampled: the export holds {len(self.program.plates[name])} of "
            f"its {size} rows (see its coordinates). Give the model all rows to export all."
            for name, size in self.program.subsampled.items()
        ]
        if shared_latent(draws.samples, self.program):
            raise ValueError(
                "This run was made in the space of a NeuTraReparam guide. Pass the NeuTraReparam, "
                "or the guide, as neutra=... to have the model's own sites."
            )

    @property
    def labels(self) -> dict[str, Array]:
        """The indices of each plate, by dimension."""
        return {dim_of(name): index.cpu().numpy() for name, index in self.program.plates.items()}

    def at_draws(self, log_likelihood: bool) -> dict[str, Group]:
        """Return posterior, sample_stats and, if wanted, log_likelihood."""
        unaffected = self.program.independent_of_undrawn()
        observed = self._names("observed") if log_likelihood else []
        scored = [name for name in observed if name in unaffected]
        self._note_undrawn([name for name in observed if name not in unaffected])
        computed = [name for name in self._names("deterministic") if name in unaffected]
        found = self.program.evaluate(
            self.draws.samples, self.num_draws, values=computed, log_probs=scored
        )
        values = {**self.draws.samples, **found.values}
        lead = _lead(self.draws)
        groups = without_model(self.draws)
        # In the order of the model; what the model does not have at these arguments comes last.
        groups["posterior"] = {
            **self._label([name for name in self.program.sites if name in values], values, lead),
            **{n: v for n, v in groups["posterior"].items() if n not in self.program.sites},
        }
        groups["log_likelihood"] = self._label(scored, found.log_probs, lead)
        self._note_nan(groups["log_likelihood"])
        return groups

    def posterior_predictive(self) -> dict[str, Group]:
        """Sample the sites that have no draws, and the observed ones anew."""
        new = self._names("observed", "undrawn")
        found = self.program.evaluate(
            self.draws.samples, self.num_draws, values=new, replicate=True
        )
        return {"posterior_predictive": self._label(new, found.values, _lead(self.draws))}

    def prior(self, num_draws: int) -> dict[str, Group]:
        """Sample the model forwards: prior and prior_predictive."""
        names = list(self.program.sites)
        try:
            values = self.program.evaluate({}, num_draws, values=names, replicate=True).values
        except NotImplementedError as error:
            self.notes.append(
                f"prior is left out, because the model cannot be sampled forwards: {error}"
            )
            return {}
        new = self._names("observed", "undrawn")
        old = [name for name in names if name not in new]
        lead = (1, num_draws)
        return {
            "prior": self._label(old, values, lead),
            "prior_predictive": self._label(new, values, lead),
        }

    def data(self) -> dict[str, Group]:
        """Return observed_data, and constant_data: numeric arrays that are not observed values."""
        sites = [site for site in self.program.sites.values() if site.kind == "observed"]
        observed = {site.name: _labelled(site, site.value) for site in sites}
        constant: Group = {}
        for name, value in self.constants.items():
            if isinstance(value, Tensor | np.ndarray):
                array = _numpy(value)
                if array.dtype.kind in "biuf" and not self._is_observed(array, sites):
                    constant[name] = Variable(array, (None,) * array.ndim, sampled=False)
        return {"observed_data": observed, "constant_data": constant}

    def _is_observed(self, array: Array, sites: Iterable[Site]) -> bool:
        versions = [array]
        for name in self.program.subsampled:
            minibatch = self.program.plates[name].cpu().numpy()
            if array.ndim and len(array) > minibatch.max(initial=-1):
                versions.append(array[minibatch])
        return any(
            version.shape == site.shape and np.allclose(version, _numpy(site.value), equal_nan=True)
            for version in versions
            for site in sites
        )

    def _names(self, *kinds: str) -> list[str]:
        return [site.name for site in self.program.sites.values() if site.kind in kinds]

    def _label(
        self, names: Iterable[str], values: Mapping[str, Tensor], lead: tuple[int, int]
    ) -> Group:
        sites = [self.program.sites[name] for name in names]
        return {s.name: _labelled(s, values[s.name], lead) for s in sites if not s.auxiliary}

    def _note_undrawn(self, names: list[str]) -> None:
        if names:
            self.notes.append(
                f"log_likelihood of {names} is left out: it may depend on "
                f"{self._names('undrawn')}, of which there are no draws (summed out, or not "
                "saved). Score a model in which these are summed out by hand, or set "
                "log_likelihood=False."
            )

    def _note_nan(self, group: Group) -> None:
        for name, variable in group.items():
            bad = np.isnan(variable.values).any(axis=(0, 1))
            if bad.any():
                self.notes.append(
                    f"log_likelihood of {name!r} is NaN at {int(bad.sum())} of {bad.size} data "
                    "points, probably because these are NaN: az.loo will refuse it. Tell the "
                    "model of missing data by pyro.sample(..., obs_mask=...)."
                )


def _lead(draws: Draws) -> tuple[int, int]:
    total = len(next(iter(draws.samples.values())))
    return draws.num_chains, total // draws.num_chains


def _numpy(value: Tensor | Array) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _array(values: Tensor, lead: tuple[int, int]) -> Variable:
    """Split the draws into chains, where nothing is known of the other axes."""
    array = _numpy(values.reshape(*lead, *values.shape[1:]))
    return Variable(array, (None,) * (array.ndim - 2), sampled=True)


def _labelled(site: Site, values: Tensor, lead: tuple[int, int] | None = None) -> Variable:
    """Label data, draws ``(draws, *shape)``, or log densities, which have no event axes."""
    shape = values.shape[1:] if lead else values.shape
    kept = [(size, axis) for size, axis in zip(shape, site.axes, strict=False) if axis != PADDING]
    array = _numpy(values.reshape((*(lead or ()), *(size for size, _ in kept))))
    return Variable(array, tuple(axis for _, axis in kept), sampled=lead is not None)
