"""Variational inference with a flow guide."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroflows.diagnostics.psis import MIN_DRAWS, PSIS, moments_moved, psis, smooth
from pyroflows.guides import AutoAmortizedFlow, AutoFlow
from pyroflows.guides.default import DENSE
from pyroflows.training.amortized import fit_amortized
from pyroflows.training.checkpoint import Checkpoint
from pyroflows.training.compiled import Compile, compiled_step
from pyroflows.training.density import Density
from pyroflows.training.devices import Device, moved, place_
from pyroflows.training.gaussians import Gaussians
from pyroflows.training.loop import Loop
from pyroflows.training.losses import Estimator, NegativeELBO
from pyroflows.training.processes import agreed, broadcast_, gathered, own_share, seeded
from pyroflows.training.result import History, SVIFit
from pyroflows.training.start import find_start, missed_mass

#: Draws of a step, and of one of many latents. With more draws fits end after fewer steps, and in
#: fewer evaluations altogether.
DRAWS, FEWER = 1024, 256
#: Steps between looks at the guide; draws of a look, each of which must find enough before the next
#: are made; share of effective draws that needs no more than the first two of these.
LOOK_EVERY, LOOK, PLENTY = 25, (1000, 3000, 6000), 0.95
#: How far weights may then move a mean, in deviations, or the logarithm of a deviation.
STEADY = 0.06


def fit_svi(
    guide: AutoFlow | AutoAmortizedFlow,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    estimator: Estimator = "stl",
    draws: int | None = None,
    starts: int = 16,
    budget: int = 1400,
    enough: float = 0.8,
    steps: int | None = None,
    lr: float | None = None,
    clip_norm: float = 100.0,
    psis_samples: int = 10_000,
    checkpoint: str | os.PathLike[str] | None = None,
    device: Device = None,
    compile: Compile = False,
    progress: bool | None = None,
    seed: int | None = None,
) -> SVIFit:
    r"""Fit a flow guide by maximising the evidence lower bound.

    .. math:: \max_q\; E_q[\log p(x, u) - \log q(u)]

    First Gaussians: from many starts at once, each ascends to a mode and is matched to the scores
    of the posterior (see `pyroflows.numerics.batch_and_match`). The best becomes the flow's
    standardization, so that its layers begin where the posterior has mean zero and unit covariance;
    of many regressions it is all that is needed. Then the flow, until enough of the draws are
    effective: Adam with clipped gradients, all draws of a step evaluated at once; a mean of its
    iterates is looked at every so often. Last the report, for which the other starts are looked at
    again: mass that they see and the guide does not is named. Interrupted by Ctrl-C it returns what
    it has. Pyro's own ``SVI(model, guide, optim, Trace_ELBO()).step`` works on the same guide.

    Called by every process of a `torch.distributed` group, it fits one guide in all of them, and
    the draws of each step are shared out. The bounds of ``"iw"`` and ``"renyi"`` are then means of
    those of each process's draws.

    A model with parameters of its own trains them along, with the whole budget and a learning rate
    that falls to zero. So it does, without start, where the model scores the same draw differently
    each time (minibatches).
    A guide that has been trained keeps its place unless a Gaussian is better.

    An `AutoAmortizedFlow` is fitted by a fixed number of steps, 2,000 if not said, without start
    and report; the model may subsample its plates.

    One step costs one forward pass of the flow, one evaluation of the model and, with path
    gradients, one inverse pass, and their gradients. The start costs about two hundred evaluations.

    Parameters
    ----------
    guide
        An `AutoFlow` or `AutoAmortizedFlow`; fitted in place.
    *args
        The model's arguments. Every other keyword than ``model_kwargs`` is this function's.
    model_kwargs
        The model's keyword arguments.
    estimator
        ``"stl"``, ``"total"``, ``"iw"``, ``"renyi"``, ``"forward"`` or ``"fab"``, see
        `pyroflows.training.NegativeELBO`.
    draws
        Draws per step; by default 1,024, of more than 200 latents 256 for the memory they take,
        and of each row of an amortised guide 1.
    starts
        Points that ascend: the guide's own, the others at random; 0 for no Gaussian start.
    budget
        Most steps in all; 0 for the Gaussian alone.
    enough
        Share of effective draws at which to end, if their weights then move neither means nor
        deviations by more than 6%.
    steps
        So many steps instead, whatever the draws' effectiveness, with a learning rate that falls to
        zero.
    lr, clip_norm
        Of the optimiser; the learning rate is by default 0.01, of more than 10 latents less by the
        root of their number, down to 0.003, as of an amortised guide.
    psis_samples
        Draws for the report on the result; 0 for no report.
    checkpoint
        File that keeps the state of the fit; where it exists, the fit goes on from there, on the
        CPU to the same result as without interruption.
    device
        Where to move the guide and the model's arguments; by default where they are. ``"auto"`` is
        a GPU where there is one.
    compile
        Whether to compile the step, model, flow, gradient and update in one, which takes a while
        once and makes steps of small models several times faster; ``"auto"`` for only where the
        steps to come are likely to repay it. A model that cannot be compiled, or has parameters of
        its own, is fitted as without it, with a message.
    progress
        Whether to show a bar with the loss in nats; None for only in interactive use.
    seed
        Seed of the draws; the global random state is left alone.

    Returns
    -------
    SVIFit
        History, stop reason, seconds, the `pyroflows.PSIS` report, ``plot()``; ``print`` it.

    Raises
    ------
    FitError
        If the model has no finite density where the guide is, or gradients stay infinite.
    ValueError
        For a checkpoint of another fit.

    References
    ----------
    Agrawal, Sheldon and Domke, "Advances in black-box VI", NeurIPS 2020; Zhang, Carpenter, Gelman
    and Vehtari, "Pathfinder: parallel quasi-Newton variational inference", JMLR 2022; Cai et al.,
    "Batch and match", ICML 2024.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("rows", len(y)):
    ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> fit = pf.fit_svi(pf.AutoFlow(model), torch.full((8,), 0.5), seed=0)
    >>> fit.stop_reason, fit.psis.verdict
    ('a Gaussian was enough', 'good')
    """
    if not isinstance(guide, (AutoFlow, AutoAmortizedFlow)):
        raise TypeError(
            f"guide: expected an AutoFlow or AutoAmortizedFlow, got {type(guide).__name__}. Fit "
            "other guides with pyro.infer.SVI."
        )
    if psis_samples and psis_samples < MIN_DRAWS:
        raise ValueError(f"psis_samples: expected 0 or at least {MIN_DRAWS}, got {psis_samples}")
    for name, count in {"starts": starts, "budget": budget}.items():
        if count < 0:
            raise ValueError(f"{name}: expected at least 0, got {count}")
    if not 0 < enough <= 1:
        raise ValueError(f"enough: expected a share above 0, up to 1, got {enough}")
    kwargs = dict(model_kwargs or {})
    place = place_(guide, device)
    if place is not None:
        args, kwargs = moved(args, place), moved(kwargs, place)
    if isinstance(guide, AutoAmortizedFlow):
        if estimator != "stl" or checkpoint is not None or compile not in (False, "auto"):
            raise ValueError(
                "an AutoAmortizedFlow has neither other estimators, checkpoints, nor compiled steps"
            )
        with seeded(seed):
            return fit_amortized(
                guide,
                args,
                kwargs,
                draws=1 if draws is None else own_share(draws, "draws"),
                steps=2000 if steps is None else steps,
                lr=0.003 if lr is None else lr,
                clip_norm=clip_norm,
                progress=progress,
            )
    with seeded(seed, alone=checkpoint is not None):
        guide.register(*args, **kwargs)
        broadcast_(guide.state_dict())
        if draws is None:
            draws = DRAWS if guide.latent_dim <= DENSE else FEWER
        fit = _SVI(
            guide,
            args,
            kwargs,
            loss=NegativeELBO(guide, own_share(draws, "draws"), estimator),
            steps=budget if steps is None else steps,
            enough=enough if steps is None else None,
            lr=_default_rate(guide.latent_dim) if lr is None else lr,
            clip_norm=clip_norm,
            compile=compile,
            progress=progress,
            checkpoint=None if checkpoint is None else Checkpoint(checkpoint, guide.latent_shapes),
        )
        fit.run(starts)
        return SVIFit(
            History() if fit.loop is None else fit.loop.history,
            fit.reason,
            fit.seconds,
            psis=fit.report(psis_samples) if psis_samples else None,
            dropped=sum(gathered(fit.loss.dropped)),
            compiled=fit.compiled,
        )


def _default_rate(latents: int) -> float:
    """Learning rate: in one step of Adam a dense layer's output moves with the inputs' number."""
    return max(0.003, 0.01 * min(1.0, (10 / latents) ** 0.5))


@dataclass
class _SVI:
    """The stages of one fit, and what is known between them."""

    guide: AutoFlow
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: NegativeELBO
    steps: int
    enough: float | None
    lr: float
    clip_norm: float
    compile: Compile
    progress: bool | None
    checkpoint: Checkpoint | None
    gaussians: Gaussians | None = None
    found: str | None = None
    reason: str = "only the start was asked for"
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.density = Density(self.guide, self.args, self.kwargs)
        parameters, alone = _parameters(self.loss, self.args, self.kwargs)
        self.is_random = self.density.is_random()
        # Only a density that stands still can be compared with the guide.
        self.adaptive = self.enough is not None and alone and not self.is_random
        only_start = self.steps == 0 and self.enough is not None
        self.loop = None if only_start else self._loop(parameters)

    def _loop(self, parameters: list[Tensor]) -> Loop:
        watch = self.loss.watch
        compiled = compiled_step(
            self.compile, self.loss, parameters, self.clip_norm, not self.adaptive, watch
        )
        return Loop(
            loss=self.loss,
            batches=repeat((self.args, self.kwargs)),
            parameters=parameters,
            steps=self.steps,
            lr=self.lr,
            clip_norm=self.clip_norm,
            check=self._look if self.adaptive else None,
            # Each loss is that of the state before its step: a single one says little of the state.
            check_every=LOOK_EVERY if self.adaptive else max(5, self.steps // 20),
            patience=None,
            enough=(lambda: self.found) if self.adaptive else None,
            progress=self.progress,
            title=self.guide.name,
            compiled=compiled,
            unit="-ELBO",
            save=None if self.checkpoint is None else self._save,
            weigh=lambda *batch: self.loss.draws,
            watch=watch,
        )

    @property
    def compiled(self) -> str:
        """What came of the option ``compile``."""
        steps = self.loop and self.loop.compiled
        return steps.outcome if steps else ""

    def run(self, starts: int) -> None:
        """Find a start and train, from the checkpoint on where there is one."""
        state = self.checkpoint and self.checkpoint.load()
        if state:
            self._load(state)
        elif starts and not self.is_random:
            began = time.perf_counter()
            self.gaussians = find_start(self.density, starts)
            self.seconds += time.perf_counter() - began
        if self.loop is not None:
            broadcast_(self.guide.state_dict())
            self.reason, seconds = self.loop.run()
            self.seconds += seconds

    @torch.no_grad()
    def _look(self) -> float:
        """The guide's negative lower bound; notes why to end, if there is a reason."""
        enough, share, steady = cast("float", self.enough), 0.0, False
        latents, log_weights = [], []
        for draws in LOOK:
            z, log_q = self.density.draw_guide(draws)
            latents.append(z)
            log_weights.append(self.density.value(z) - log_q)
            raw = torch.cat(log_weights)
            usable = raw.isfinite()
            if not usable.any():
                break
            weights, _ = smooth(raw[usable].numpy())
            share = float(1 / (len(raw) * np.exp(2 * weights).sum()))
            if share < enough or (share > PLENTY and len(log_weights) > 1):
                break
        if share >= enough:
            values = self.guide.unpack(torch.cat(latents)[usable].to(self.guide.flow.dtype))
            steady = max(moments_moved(values, weights)[:2]) < STEADY
        # Each process draws its own.
        share, steady, bound = agreed((share, steady, raw[usable].mean().item()))
        self._note(share, steady)
        return -bound

    def _note(self, share: float, steady: bool) -> None:
        loop = cast("Loop", self.loop)
        loop.title = f"{self.guide.name} (ESS {share:.0%})"
        if steady:
            trained = f"{share:.0%} of the draws are effective"
            self.found = trained if loop.history.losses else "a Gaussian was enough"

    def report(self, draws: int) -> PSIS:
        """The weights of the guide's draws, and the mass that the guide misses."""
        report = psis(self.guide, *self.args, model_kwargs=self.kwargs, num_samples=draws)
        if self.gaussians is None:
            return report
        missed = missed_mass(self.density, self.gaussians, report.log_evidence)
        return replace(report, missed=missed)

    # --- checkpoints --------------------------------------------------------------------------

    def _save(self, loop: dict[str, Any]) -> None:
        cast("Checkpoint", self.checkpoint).save(
            {
                "loop": loop,
                "guide": self.guide.state_dict(),
                "gaussians": self.gaussians and vars(self.gaussians),
                "dropped": self.loss.dropped,
                "annealing": self.loss.annealing.size,
                "found": self.found,
                "seconds": self.seconds,
            }
        )

    def _load(self, state: dict[str, Any]) -> None:
        if self.loop is not None:
            self.loop.resume = state["loop"]
        self.guide.load_state_dict(state["guide"])
        self.gaussians = state["gaussians"] and Gaussians(**state["gaussians"])
        self.loss.dropped = state["dropped"]
        self.loss.annealing.size = state["annealing"]
        self.found = state["found"]
        self.seconds = state["seconds"]


def _parameters(loss: NegativeELBO, args: Any, kwargs: Any) -> tuple[list[Tensor], bool]:
    """The guide's trainable parameters and those of the model; whether the model has none."""
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        loss(args, kwargs)
    loss.dropped = 0  # that was no step of training
    found: list[Tensor] = [p for p in loss.guide.parameters() if p.requires_grad]
    own = len(found)
    for name in capture.trace.nodes:
        parameter: Tensor = cast("Any", pyro.param(name)).unconstrained()
        if parameter.requires_grad and all(parameter is not known for known in found):
            found.append(parameter)
    return found, len(found) == own
