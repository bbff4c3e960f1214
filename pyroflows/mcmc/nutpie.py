"""The No-U-Turn sampler of nutpie, in Rust, on a target in torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyroflows.mcmc.fisher import Learner
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

    With ``adapt=True`` a flow is learned during warm-up, from the draws and their gradients, by
    minimising the Fisher divergence: the mean squared distance, in the straightened space, of the
    posterior's score from that of a standard normal. It starts from the guide's flow or, with
    ``precondition=False``, from a diagonal map; then nothing needs to be fitted before. Each chain
    goes on with the flow of the one before it, so that they run one after another; the flow of a
    chain stands still while it makes the draws that are kept. Training evaluates no densities.

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
    adapt
        Whether to learn a flow during warm-up.

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
    adapt: bool = False
    chains: ClassVar[int] = 4
    draws: ClassVar[int] = 1000

    @property
    def warmup(self) -> int:
        """Fewer draws settle a mass matrix than a flow."""
        return 600 if self.adapt else 400

    def run(self, target: Target, plan: Plan) -> Chains:
        nutpie = _import()
        if self.adapt and self.low_rank:
            raise ValueError(
                "low_rank and adapt: expected one of them, a matrix or a flow, got both"
            )
        if self.adapt:
            return self._run_adapted(nutpie, target, plan)
        density = target.compile(plan.starts)
        alone = density == target.value_and_grad  # Pyro's handlers know one thread only
        functions = _Functions(density, torch.cat([plan.starts, target.starts(POOL * plan.chains)]))
        cores = 1 if alone else self.cores or min(plan.chains, os.cpu_count() or 1)
        return self._sample(nutpie, functions, plan, cores=cores)

    def _run_adapted(self, nutpie: Any, target: Target, plan: Plan) -> Chains:
        """Chains one after another, because each goes on with the flow of the last."""
        with torch.no_grad():
            starts = target.latents(plan.starts)[0]
            pool = target.latents(target.starts(POOL * plan.chains))[0]
        flow = target.guide.flow if target.precondition else None
        learner = Learner(target.plain(), flow, starts, plan.seed)
        functions = _Functions(learner.density, torch.cat([starts, pool]), learner)
        found = self._sample(nutpie, functions, plan, cores=1, transform_adapt=True)
        return replace(found, latents=True)

    def _sample(
        self, nutpie: Any, functions: _Functions, plan: Plan, cores: int, **options: Any
    ) -> Chains:
        if not options:
            options = {"low_rank_modified_mass_matrix": self.low_rank}
        with plan.bar("nutpie") as bar:
            trace = nutpie.sample(
                functions.model(bar),
                draws=plan.draws,
                tune=plan.warmup,
                chains=plan.chains,
                cores=cores,
                seed=plan.seed,
                progress_bar=False,
                target_accept=self.target_accept,
                maxdepth=self.max_tree_depth,
                **options,
            )
        return functions.chains(trace, plan)


class _Functions:
    """What nutpie calls, in threads of its own."""

    def __init__(self, density: Any, pool: Tensor, learner: Learner | None = None) -> None:
        self.density = density
        self.pool = pool
        self.learner = learner
        self.gradients: list[list[int]] = []  # one for each chain: threads do not share it

    def model(self, bar: Any) -> Any:
        from nutpie.compiled_pyfunc import from_pyfunc

        dim = self.pool.shape[-1]

        def make_expand(*seeds: int) -> Callable[[Array], dict[str, Array]]:
            def expand(z: Array) -> dict[str, Array]:
                bar.update()
                return {"z": z}

            return expand

        model = from_pyfunc(
            dim,
            self._make_density,
            make_expand,
            expanded_dtypes=[np.dtype(np.float64)],
            expanded_shapes=[(dim,)],
            expanded_names=["z"],
            make_initial_point_fn=self._start,
        )
        return model if self.learner is None else _with_adapter(model, self.learner)

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

    def _evaluations(self) -> int:
        learned = 0 if self.learner is None else self.learner.gradients
        return learned + sum(count[0] for count in self.gradients)

    def chains(self, trace: Any, plan: Plan) -> Chains:
        """Nutpie's trace as ours; chains that were interrupted end in NaN there."""
        points = torch.from_numpy(trace["posterior"]["z"].values).to(self.pool)
        lengths = points.isfinite().all(-1).sum(-1).tolist()
        if not any(lengths):
            raise KeyboardInterrupt("interrupted in the warm-up: there are no draws yet")
        cut = [chain[:length] for chain, length in zip(points, lengths, strict=True)]
        stats = {}
        for theirs, ours in STATS.items():
            values = torch.from_numpy(trace["sample_stats"][theirs].values)
            stats[ours] = stacked([v[:n] for v, n in zip(values, lengths, strict=True)])
        return Chains(
            points=stacked(cut),
            stats=stats,
            evaluations={"gradient_evaluations": self._evaluations()},
            interrupted=min(lengths) < plan.draws,
        )


def _with_adapter(model: Any, learner: Learner) -> Any:
    """The model with our adapter where nutpie would put that of its own flows, which are JAX's."""
    from nutpie import _lib

    class Adapted(type(model)):  # type: ignore[misc]
        def _make_model(self, init_mean: Any) -> Any:
            return _lib.PyModel(
                self._make_logp_func,
                self._make_expand_func,
                self._variables,
                self.n_dim,
                dim_sizes=self._dim_sizes,
                coords=self._coords,
                init_point_func=self._make_initial_points,
                transform_adapter=learner.new_adapter,
            )

    values = {field.name: getattr(model, field.name) for field in fields(model)}
    return Adapted(**values)


def _import() -> Any:
    try:
        import nutpie
    except ImportError as error:
        raise ImportError(
            "kernel 'nutpie' needs the package nutpie, which is not installed. Install it with "
            "pip install 'pyroflows[nutpie]', or take kernel='nuts'."
        ) from error
    return nutpie
