"""The No-U-Turn sampler of nutpie, in Rust, on a target in torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyroflows.mcmc.kernels import Chains, Plan, stacked
from pyroflows.mcmc.target import Target

Array = np.ndarray[Any, np.dtype[np.float64]]

#: ArviZ's names of what nutpie records.
STATS = {
    "diverging": "diverging",
    "mean_tree_accept": "acceptance_rate",
    "n_steps": "n_steps",
    "depth": "tree_depth",
    "maxdepth_reached": "reached_max_treedepth",
    "step_size": "step_size",
    "energy": "energy",
}
#: Points for each chain to choose its start from.
POOL = 16


@dataclass(frozen=True)
class Nutpie:
    """The No-U-Turn sampler of `nutpie <https://pymc-devs.github.io/nutpie/>`_, in Rust.

    Its mass matrix is diagonal, from draws and gradients, and settles in fewer draws than Pyro's.
    Needs the ``nutpie`` extra. Chains run at once where the model's operations could be recorded
    (see `run_mcmc`), one after another where they call Pyro.

    Parameters
    ----------
    target_accept
        Acceptance rate that the step size aims at.
    max_tree_depth
        A trajectory has at most two to this power steps, each one gradient.
    low_rank
        Whether the mass matrix learns the strongest correlations too.
    cores
        Chains at once; by default as many as there are processors.

    References
    ----------
    Seyboldt, "If only my posterior were normal: introducing Fisher HMC", 2024.

    Examples
    --------
    >>> pf.mcmc.Nutpie(target_accept=0.9).low_rank
    False
    """

    target_accept: float = 0.8
    max_tree_depth: int = 10
    low_rank: bool = False
    cores: int | None = None
    chains: ClassVar[int] = 4
    draws: ClassVar[int] = 1000
    warmup: ClassVar[int] = 400

    def run(self, target: Target, plan: Plan) -> Chains:
        nutpie = _import()
        density = target.compile(plan.starts)
        alone = density == target.value_and_grad  # Pyro's handlers know one thread only
        functions = _Functions(density, torch.cat([plan.starts, target.starts(POOL * plan.chains)]))
        with plan.bar("nutpie") as bar:
            trace = nutpie.sample(
                functions.model(target.dim, bar),
                draws=plan.draws,
                tune=plan.warmup,
                chains=plan.chains,
                cores=1 if alone else self.cores or min(plan.chains, os.cpu_count() or 1),
                seed=plan.seed,
                progress_bar=False,
                low_rank_modified_mass_matrix=self.low_rank,
                target_accept=self.target_accept,
                maxdepth=self.max_tree_depth,
            )
        return functions.chains(trace, plan)


class _Functions:
    """What nutpie calls, in threads of its own."""

    def __init__(self, density: Any, pool: Tensor) -> None:
        self.density = density
        self.pool = pool
        self.gradients: list[list[int]] = []  # one for each chain: threads do not share it

    def model(self, dim: int, bar: Any) -> Any:
        from nutpie.compiled_pyfunc import from_pyfunc

        def make_expand(*seeds: int) -> Callable[[Array], dict[str, Array]]:
            def expand(z: Array) -> dict[str, Array]:
                bar.update()
                return {"z": z}

            return expand

        return from_pyfunc(
            dim,
            self._make_density,
            make_expand,
            expanded_dtypes=[np.dtype(np.float64)],
            expanded_shapes=[(dim,)],
            expanded_names=["z"],
            make_initial_point_fn=self._start,
        )

    def _start(self, seed: int) -> Array:
        # Chosen by nutpie's seed, because its threads ask in any order.
        start: Array = self.pool[seed % len(self.pool)].double().cpu().numpy()
        return start

    def _make_density(self) -> Callable[[Array], tuple[float, Array]]:
        count = [0]
        self.gradients.append(count)

        def density(z: Array) -> tuple[float, Array]:
            count[0] += 1
            value, grad = self.density(torch.from_numpy(z).to(self.pool))
            return float(value), grad.double().cpu().numpy()

        return density

    def chains(self, trace: Any, plan: Plan) -> Chains:
        """Nutpie's trace as ours; chains that were interrupted end in NaN there."""
        points = torch.from_numpy(trace["posterior"]["z"].values).to(self.pool)
        lengths = points.isfinite().all(-1).sum(-1).tolist()
        cut = [chain[:length] for chain, length in zip(points, lengths, strict=True)]
        stats = {}
        for theirs, ours in STATS.items():
            values = torch.from_numpy(trace["sample_stats"][theirs].values)
            stats[ours] = stacked([v[:n] for v, n in zip(values, lengths, strict=True)])
        return Chains(
            points=stacked(cut),
            stats=stats,
            evaluations={"gradient_evaluations": sum(count[0] for count in self.gradients)},
            interrupted=min(lengths) < plan.draws,
        )


def _import() -> Any:
    try:
        import nutpie
    except ImportError as error:
        raise ImportError(
            "kernel 'nutpie' needs the package nutpie, which is not installed. Install it with "
            "pip install 'pyroflows[nutpie]', or take kernel='nuts'."
        ) from error
    return nutpie
