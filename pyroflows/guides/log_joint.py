"""The model's log density over many unconstrained draws at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyroflows.errors import DependentSupportError
from pyroflows.numerics import forked_rng

logger = logging.getLogger(__name__)

DRAWS = "_pyroflows_draws"
# What a model that does not broadcast over an extra dimension raises, or vmap of one.
_UNFIT = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError)

Values = dict[str, Tensor]
Evaluate = Callable[[Values], Tensor]


class LogJoint:
    r"""Evaluate :math:`\log p(x, z)` for a dictionary of constrained draws, shape ``(S,)`` each.

    Draws are vectorised by an outermost plate; where the model does not broadcast, by
    ``torch.func.vmap``; else in a loop. The first evaluation of several draws decides, by comparing
    two of them with single evaluations, and says so where it is not the plate.

    Parameters
    ----------
    model
        The model.
    trace
        A trace of it, for the nesting of its plates and its enumerated sites.
    """

    def __init__(self, model: Callable[..., Any], trace: Trace) -> None:
        self.model = model
        self.strategy: str | None = None
        sites = _sample_sites(prune_subsample_sites(trace))
        frames = [f for site in sites for f in site["cond_indep_stack"] if f.vectorized]
        self.max_plate_nesting = max((-f.dim for f in frames), default=0)
        # Batch dimensions of the latent sites tell where the dimension of the draws goes.
        self.event_dims = {site["name"]: site["fn"].event_dim for site in sites}
        self.enumerated = any(site["infer"].get("enumerate") == "parallel" for site in sites)

    def __call__(self, values: Values, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Log densities ``(S,)`` in nats of draws ``{site: (S, *shape)}``."""
        draws = len(next(iter(values.values())))
        strategies: dict[str, Evaluate] = {
            "plate": lambda v: self._by_plate(v, args, kwargs),
            "vmap": lambda v: self._by_vmap(v, args, kwargs),
            "loop": lambda v: self._by_loop(v, args, kwargs),
        }
        # Draws far out may leave the domain of a distribution: they score NaN, no exception.
        with pyro.validation_enabled(False):
            if draws < 2:
                return strategies["loop"](values)
            strategy = self.strategy or self._choose(strategies, values, args, kwargs)
            try:
                return strategies[strategy](values)
            except LinAlgError:
                # One draw whose matrix has no factor fails them all: only that one is undefined.
                halves = [{name: v.chunk(2)[i] for name, v in values.items()} for i in (0, 1)]
                return torch.cat([self(half, args, kwargs) for half in halves])

    # --- one evaluation -----------------------------------------------------------------------

    def _trace(
        self,
        values: Values,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        draws: Iterable[AbstractContextManager[Any]] = (),
    ) -> Trace:
        model = poutine.condition(self.model, data=values)
        if self.enumerated:
            model = poutine.enum(model, first_available_dim=-self.max_plate_nesting - 2)
        with ExitStack() as stack:
            # Outer handlers see no sites, and an SVI step still collects the parameters.
            stack.enter_context(poutine.block(expose_types=["param"]))
            for plate in draws:
                stack.enter_context(plate)
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        return prune_subsample_sites(trace)

    def _single(self, values: Values, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        trace = self._trace(values, args, kwargs)
        if self.enumerated:
            nesting = self.max_plate_nesting + 1
            return TraceEinsumEvaluator(trace, True, nesting).log_prob(trace)
        return torch.as_tensor(trace.log_prob_sum())

    # --- many evaluations ---------------------------------------------------------------------

    def _by_loop(self, values: Values, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        like = next(iter(values.values()))
        scores = [like.new_zeros(0)]
        for i in range(len(like)):
            try:
                score = self._single({name: v[i] for name, v in values.items()}, args, kwargs)
            except LinAlgError:
                score = like.new_tensor(torch.nan)
            scores.append(score.reshape(1))
        return torch.cat(scores)

    def _by_vmap(self, values: Values, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        single = torch.func.vmap(lambda v: self._single(v, args, kwargs), randomness="same")
        return single(values)

    def _by_plate(self, values: Values, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        draws = len(next(iter(values.values())))
        plate = pyro.plate(DRAWS, draws, dim=-self.max_plate_nesting - 1)
        aligned = {name: self._aligned(name, value) for name, value in values.items()}
        trace = self._trace(aligned, args, kwargs, [plate])
        if self.enumerated:
            evaluator = TraceEinsumEvaluator(trace, True, self.max_plate_nesting + 1)
            factors = evaluator._get_log_factors(trace)
            kept = frozenset(trace.plate_to_symbol[DRAWS])
            return contract_to_tensor(factors, evaluator._enum_dims, target_ordinal=kept)
        trace.compute_log_prob()
        scores = [site["log_prob"] for site in _sample_sites(trace)]
        return torch.stack([sum_rightmost(s, self.max_plate_nesting) for s in scores]).sum(0)

    def _aligned(self, name: str, value: Tensor) -> Tensor:
        """The draws' dimension moved left of every plate, ``(S, 1, ..., *batch, *event)``."""
        missing = self.max_plate_nesting - (value.dim() - 1 - self.event_dims[name])
        return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])

    # --- the choice ---------------------------------------------------------------------------

    def _check_supports(self, two: Values, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise where the support of a site is another one at another draw."""
        traces = [self._trace({k: v[i] for k, v in two.items()}, args, kwargs) for i in (0, 1)]
        for name in two:
            sites: list[Any] = [trace.nodes[name] for trace in traces]
            first, second = (_bounds(site["fn"].support) for site in sites)
            if any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                raise DependentSupportError(
                    f"site {name!r}: its support depends on another latent, and a guide maps all "
                    "draws to one support. Sample it on a fixed one and scale it, as in "
                    "b = a * pyro.sample('share', dist.Uniform(0, 1)) in place of Uniform(0, a)."
                )

    @torch.no_grad()
    def _choose(
        self,
        strategies: dict[str, Evaluate],
        values: Values,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> str:
        """The first strategy that agrees with the loop on two draws, for good."""
        two = {name: v[:2] for name, v in values.items()}
        # The same random numbers for every evaluation, so that subsamples can be compared.
        with forked_rng(0):
            first = strategies["loop"]({name: v[:1] for name, v in two.items()})
        with forked_rng(0):
            second = strategies["loop"]({name: v[1:] for name, v in two.items()})
        expected = torch.cat([first, second])
        if expected.isnan().any():
            return "loop"  # for now: these draws cannot tell
        with forked_rng(0):
            self._check_supports(two, args, kwargs)
        for name in ("plate", "vmap"):
            try:
                with forked_rng(0):
                    got = strategies[name](two)
            except _UNFIT as error:
                logger.debug("evaluation by %s failed: %s", name, error)
                continue
            if got.shape == expected.shape and _agree(got, expected):
                if name != "plate":
                    logger.warning("the model does not broadcast over draws: using %s", name)
                self.strategy = name
                return name
        logger.warning(
            "the model does not broadcast over draws: evaluating them one by one, which is slow. "
            "Declare its batch dimensions by pyro.plate or .to_event to have them vectorised."
        )
        self.strategy = "loop"
        return "loop"


def _sample_sites(trace: Trace) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _bounds(constraint: Any) -> list[Tensor]:
    """The numbers that a constraint is made of, however nested."""
    if isinstance(constraint, (Tensor, int, float)):
        return [torch.as_tensor(constraint)]
    parts = constraint if isinstance(constraint, (list, tuple)) else vars(constraint).values()
    nested = (Tensor, int, float, list, tuple, Constraint)
    return [bound for part in parts if isinstance(part, nested) for bound in _bounds(part)]


def _agree(got: Tensor, expected: Tensor) -> bool:
    # Sums of many terms differ by rounding, which grows with the total.
    rtol = 1e3 * torch.finfo(expected.dtype).eps
    return torch.allclose(got.to(expected.dtype), expected, rtol=rtol, atol=rtol)
