"""What a Pyro model says at given draws: its sites, pointwise densities and predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyroflows.diagnostics.sites import Site, Values, describe
from pyroflows.errors import first_line
from pyroflows.numerics import forked_rng

logger = logging.getLogger(__name__)

Model = Callable[..., Any]

_DRAWS = "_pyroflows_draws"
# What a model raises when a value has one dimension more than it was written for.
_SHAPE_TROUBLE = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Run models for reading only: no gradients, no new stored parameters, no value checks.

    Draws that divergent transitions left at the edge of the support, and missing data, must not
    stop an export: they give NaN or minus infinity. With ``seed`` the global random state is put
    back at the end.
    """
    store = pyro.get_param_store()
    stored = set(store.keys())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(pyro.validation_enabled(False))
        if seed is not None:
            stack.enter_context(forked_rng(seed))
        try:
            yield
        finally:
            for name in set(store.keys()) - stored:
                del store[name]


@dataclass(frozen=True)
class Evaluation:
    """Values ``(draws, *shape)`` and pointwise log densities ``(draws, *batch_shape)`` by site."""

    values: dict[str, Tensor] = field(default_factory=dict)
    log_probs: dict[str, Tensor] = field(default_factory=dict)


class Program:
    """A model with its arguments, evaluated at many draws of its latent variables.

    Draws are evaluated at once, in a plate around the model, when the model broadcasts; the
    first and the last draw are evaluated alone as well, and any difference sends the whole set
    through a loop. The model's structure must not depend on the draw.

    Parameters
    ----------
    model, args, kwargs
        The model and what it is called with.
    draw
        Constrained values of the sites that have draws, one draw: ``{site: shape}``.

    Attributes
    ----------
    sites
        The sites in the order in which the model runs. Factors and subsampling are not sites.
        Observed deltas (`pyro.deterministic`, reparametrised sites) are deterministic.
    plates
        Name of each plate and its indices, those of the minibatch where it is subsampled.
    subsampled
        Size of each plate of which only a part is used. One minibatch serves all draws.
    """

    def __init__(
        self, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], draw: Values
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.sites: dict[str, Site] = {}
        self.plates: dict[str, Tensor] = {}
        self.subsampled: dict[str, int] = {}
        self._nesting = 0
        self._broadcasts = True
        nodes: Mapping[str, Any] = self._trace(draw).nodes
        for name, node in nodes.items():
            if node["type"] != "sample":
                continue
            if site_is_subsample(node):
                self.plates[name] = torch.as_tensor(node["value"])
                if len(self.plates[name]) < node["fn"].size:
                    self.subsampled[name] = int(node["fn"].size)
                continue
            plate_dims = [-f.dim for f in node["cond_indep_stack"] if f.vectorized]
            self._nesting = max(self._nesting, *plate_dims, 0)
            if not site_is_factor(node):
                site = self.sites[name] = describe(name, node, draw)
                if site.kind != "deterministic":
                    self._nesting = max(self._nesting, site.batch_dim)

    def independent_of_undrawn(self) -> set[str]:
        """Sites that run before the first latent without draws, and so cannot depend on it."""
        names = set()
        for site in self.sites.values():
            if site.kind == "undrawn":
                break
            names.add(site.name)
        return names

    def evaluate(
        self,
        draws: Values,
        num_draws: int,
        *,
        values: Collection[str] = (),
        log_probs: Collection[str] = (),
        replicate: bool = False,
    ) -> Evaluation:
        """Run the model at each draw.

        Parameters
        ----------
        draws
            Constrained values ``{site: (num_draws, *shape)}``; other latents are sampled.
        num_draws
            How many draws, also where ``draws`` is empty (sampling from the prior).
        values, log_probs
            Sites whose values or pointwise log densities (nats; masked entries are 0, the scale
            of subsampling is not applied) are wanted.
        replicate
            Sample the observed sites as well, in place of the data.
        """
        if not (values or log_probs):
            return Evaluation()
        if self._broadcasts:
            try:
                return self._vectorised(draws, num_draws, values, log_probs, replicate)
            except _SHAPE_TROUBLE as error:
                self._broadcasts = False
                logger.warning(
                    "The model does not broadcast over draws (%s): running it once for each of "
                    "%d draws, which is slower.",
                    first_line(error),
                    num_draws,
                )
        rows = []
        for index in range(num_draws):
            trace = self._trace({name: v[index] for name, v in draws.items()}, replicate)
            rows.append(self._read(trace, values, log_probs))
        return Evaluation(
            {name: torch.stack([row.values[name] for row in rows]) for name in values},
            {name: torch.stack([row.log_probs[name] for row in rows]) for name in log_probs},
        )

    def vectorized(
        self, draws: Values, num_draws: int, values: Collection[str], *, trust: bool
    ) -> Evaluation:
        """As `evaluate`, but raise where the model does not broadcast, unless it is trusted to."""
        return self._vectorised(draws, num_draws, values, (), False, trust=trust)

    def _trace(self, values: Values, replicate: bool = False) -> Trace:
        """Run the model once, at fixed values and at this program's minibatch."""
        fixed = {name: self.plates[name] for name in self.subsampled} | dict(values)
        observed = [s for s in self.sites.values() if replicate and s.kind == "observed"]
        forget = _Forget({site.name: site.shape[: site.batch_dim] for site in observed})
        model = poutine.condition(forget(self.model), data=fixed)
        return poutine.trace(model).get_trace(*self.args, **self.kwargs)

    def _vectorised(
        self,
        draws: Values,
        num_draws: int,
        values: Collection[str],
        log_probs: Collection[str],
        replicate: bool,
        *,
        trust: bool = False,
    ) -> Evaluation:
        aligned = {}
        for name, value in draws.items():
            padding = self._nesting - self.sites[name].batch_dim if name in self.sites else 0
            aligned[name] = value.reshape(num_draws, *(1,) * padding, *value.shape[1:])
        with pyro.plate(_DRAWS, num_draws, dim=-1 - self._nesting):
            trace = self._trace(aligned, replicate)
        dense = [site.name for site in self.sites.values() if site.kind != "deterministic"]
        everything = self._read(trace, self.sites, dense, num_draws)
        for index in set() if trust else {0, num_draws - 1}:
            self._compare(everything, index, dense)
        return Evaluation(
            {name: everything.values[name] for name in values},
            {name: everything.log_probs[name] for name in log_probs},
        )

    def _compare(self, everything: Evaluation, index: int, dense: list[str]) -> None:
        """Raise unless the model agrees when it is run at one draw of the set."""
        trace = self._trace({name: everything.values[name][index] for name in dense})
        alone = self._read(trace, self.sites, dense)
        for name in self.sites:
            if name in alone.log_probs:
                expected, found = alone.log_probs[name], everything.log_probs[name][index]
                atol = 1e-3
            else:
                expected, found = alone.values[name], everything.values[name][index]
                typical = expected.double().abs().nan_to_num(0, 0).mean()
                atol = 1e-3 * float(typical.nan_to_num(0))  # NaN where there are no entries
            # Far above float32 rounding, far below what a misplaced dimension does.
            found, expected = found.double(), expected.double()
            if not torch.allclose(found, expected, rtol=1e-3, atol=atol, equal_nan=True):
                raise ValueError(f"site {name!r} differs from the same draw alone")

    def _read(
        self,
        trace: Trace,
        values: Collection[str],
        log_probs: Collection[str],
        num_draws: int | None = None,
    ) -> Evaluation:
        """Take values and log densities out of a trace of one draw, or of ``num_draws``."""
        nodes: Mapping[str, Any] = trace.nodes
        result = Evaluation()
        for name in values:
            value = torch.as_tensor(nodes[name]["value"])
            result.values[name] = _spread(value, self.sites[name].shape, num_draws)
        for name in log_probs:
            site, node = self.sites[name], nodes[name]
            log_prob = scale_and_mask(node["fn"].log_prob(node["value"]), mask=node["mask"])
            result.log_probs[name] = _spread(log_prob, site.shape[: site.batch_dim], num_draws)
        return result


class _Forget(Messenger):
    """Turn the observed sites of these names into sampled ones, of these batch shapes.

    `poutine.uncondition` forgets deterministic sites too, and those know no value but their own.
    """

    def __init__(self, batch_shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.batch_shapes = batch_shapes

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.batch_shapes:
            # The data may have more dimensions than their distribution: one draw for each datum.
            batch_shape = self.batch_shapes[msg["name"]]
            fn = msg["fn"].expand(torch.broadcast_shapes(msg["fn"].batch_shape, batch_shape))
            msg.update(fn=fn, value=None, is_observed=False, done=False)


def _spread(value: Tensor, shape: torch.Size, num_draws: int | None) -> Tensor:
    """Give ``value`` the shape ``(num_draws, *shape)``: it may not depend on the draw."""
    target = shape if num_draws is None else torch.Size((num_draws, *shape))
    if value.numel() == target.numel():
        return value.reshape(target)
    if value.numel() == shape.numel():
        return value.reshape(shape).expand(target)
    return value.expand(target)
