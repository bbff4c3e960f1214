"""Groups of latent sites: a flow for each, given the groups before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from pyroflows.distributions import Modes, StandardNormal
from pyroflows.flows import Flow
from pyroflows.guides.default import DENSE, default_conditional_flow, default_flow
from pyroflows.layers import Chain

Make = Callable[..., Flow]


@dataclass(frozen=True)
class Groups:
    """Which sites are drawn together, in which order, and by which flow.

    Attributes
    ----------
    sites
        Names of the sites of each group.
    flows
        For each group a callable, ``flow(features)`` for the first and ``flow(features, context)``
        for the others, or None for the default.
    """

    sites: tuple[tuple[str, ...], ...]
    flows: tuple[Make | None, ...]

    @classmethod
    def of(cls, groups: Sequence[Sequence[str]], flow: Any) -> Groups:
        """From the arguments of `AutoFlow`: one callable is that of every group."""
        if isinstance(groups, str) or any(isinstance(group, str) for group in groups):
            raise TypeError(
                "groups: expected lists of names of sites, for instance [['a', 'b'], ['c']], got "
                f"{groups!r}"
            )
        flows = list(flow) if isinstance(flow, Sequence) else [flow] * len(groups)
        if not groups or len(flows) != len(groups):
            raise ValueError(
                f"flow: expected one callable, or one for each of {len(groups)} groups, got "
                f"{len(flows)}"
            )
        for make in flows:
            if isinstance(make, Flow) or not (make is None or callable(make)):
                raise TypeError(
                    "flow: with groups expected callables from features and context to a flow, "
                    f"for instance pyroflows.NSF, got {make!r:.80}"
                )
        return cls(tuple(map(tuple, groups)), tuple(flows))

    def arrange(self, trace: Any) -> None:
        """Put the latent sites of a trace in the order of the groups.

        Raises
        ------
        ValueError
            Unless the groups have each latent site of the model once.
        """
        named = [name for group in self.sites for name in group]
        latents = [name for name, _ in trace.iter_stochastic_nodes()]
        problems = [
            *(f"the model has no latent site {name!r}" for name in named if name not in latents),
            *(f"{name!r} is in none" for name in latents if name not in named),
            *(f"{name!r} is in two" for name in latents if named.count(name) > 1),
            *("one group is empty" for group in self.sites if not group),
        ]
        if problems:
            raise ValueError(
                f"groups: expected each of the latent sites {latents} in one group, but "
                f"{'; '.join(problems)}"
            )
        for name in named:
            trace.nodes.move_to_end(name)

    def build(self, shapes: Mapping[str, torch.Size]) -> Flow:
        """One flow of all latents by the chain rule, from the unconstrained shapes of the sites."""
        sizes = [sum(shapes[name].numel() for name in group) for group in self.sites]
        given = [0, *accumulate(sizes)]
        flows = [
            self._make(number, size, context)
            for number, (size, context) in enumerate(zip(sizes, given, strict=False))
        ]
        if len(flows) == 1:
            return flows[0]
        features = given[-1]
        parts = [list(flow.transform.layers) for flow in flows]
        modes = all(make is None for make in self.flows) and features <= DENSE
        base = Modes(features) if modes else None
        return Flow([Chain(parts, sizes)], features, base=base)

    def _make(self, number: int, size: int, context: int) -> Flow:
        default: Make = default_conditional_flow if context else default_flow
        by_default = self.flows[number] is None
        make = self.flows[number] or default
        flow = make(size, context) if context else make(size)
        where = f"flow of group {number} {list(self.sites[number])}"
        if not isinstance(flow, Flow):
            raise TypeError(f"{where}: expected a pyroflows Flow, got {flow!r} from the callable")
        if flow.event_shape != (size,) or flow.context_size != context:
            raise ValueError(
                f"{where}: expected {size} features and a context of size {context}, got event "
                f"shape {tuple(flow.event_shape)} and a context of size {flow.context_size}"
            )
        # Layers are chained; the base is one for all.
        if len(self.flows) > 1 and not (by_default or isinstance(flow.base, StandardNormal)):
            raise ValueError(
                f"{where}: expected a flow with a standard normal as base, got "
                f"{type(flow.base).__name__}"
            )
        return flow
