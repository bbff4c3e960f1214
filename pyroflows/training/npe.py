"""Neural posterior estimation: an amortised guide from simulations of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.diagnostics import Simulations, psis, simulate
from pyroflows.diagnostics.simulation import Values, only
from pyroflows.errors import DataError, FitError
from pyroflows.guides import AmortizedPosterior, AutoAmortizedFlow
from pyroflows.training.data import MIN_ROWS, location_and_scale, minibatches, take
from pyroflows.training.loop import Loop
from pyroflows.training.processes import broadcast_, seeded
from pyroflows.training.result import Fit, SVIFit
from pyroflows.training.rows import checker
from pyroflows.training.svi import fit_svi

#: Draws of the posterior behind the threshold of a truncated prior.
TRUNCATION_DRAWS = 10_000
#: Draws of the reports on a posterior before and after it is refined, and the draws that are to be
#: effective in each step between.
LOOK, EFFECTIVE = 10_000, 256
#: Prior draws of one try of rejection, and the most tries.
PROPOSALS, TRIES = 10_000, 1_000


@dataclass
class NPEFit(Fit):
    """Result of `pyroflows.fit_npe`; the checked losses are those of held-out simulations.

    Attributes
    ----------
    simulations
        All simulations; their values are by site.
    accepted
        Share of the prior that each truncated round kept.
    """

    simulations: Simulations = field(kw_only=True)
    accepted: list[float] = field(default_factory=list, kw_only=True)

    _quantity = "negative log posterior (nats)"
    _checked = "validation"

    def __str__(self) -> str:
        rounds = "".join(
            f"\na truncated round kept {share:.2%} of the prior" for share in self.accepted
        )
        return f"{self._summary()}\n{self.simulations}{rounds}"


class NegativeLogPosterior(nn.Module):
    r"""Mean of :math:`-\log q(u \mid e(y))` over simulations, in nats.

    Parameters
    ----------
    guide
        An `AutoAmortizedFlow` whose latents are all global and amortised.
    """

    def __init__(self, guide: AutoAmortizedFlow) -> None:
        super().__init__()
        self.flow = guide.flow()
        self.encoder = guide.data_encoder()

    def forward(self, u: Tensor, *data: Tensor) -> Tensor:
        """Unconstrained latents ``(N, D)`` and data of each observed site to a scalar."""
        return -self.flow(self._context(u, data)).log_prob(u).mean()

    def _context(self, u: Tensor, data: Sequence[Tensor]) -> Tensor:
        return self.encoder(dict(zip(self.encoder.sites, data, strict=True)), u.shape[:1])

    @torch.no_grad()
    def initialize_(self, u: Tensor, *data: Tensor) -> None:
        """Set from the simulations what depends on data, once."""
        if self.encoder.initialized:
            return
        self.encoder.initialized.fill_(True)
        self.encoder.standardize_(dict(zip(self.encoder.sites, data, strict=True)))
        self.flow.transform.standardization.set_(*location_and_scale([(u, None)], 0))
        context = self._context(u, data)
        self.flow.initialize_(u, context)


def fit_npe(
    guide: AutoAmortizedFlow,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    simulations: int | Simulations = 10_000,
    observation: Tensor | Mapping[str, Tensor] | None = None,
    rounds: int = 1,
    truncation: float = 1e-4,
    vectorized: bool | None = None,
    workers: int = 0,
    max_failed: float = 0.1,
    validation: float = 0.1,
    steps: int = 3000,
    batch_size: int = 256,
    lr: float = 1e-3,
    clip_norm: float = 5.0,
    patience: int | None = 10,
    progress: bool | None = None,
    seed: int | None = None,
) -> NPEFit:
    r"""Fit an amortised guide to simulations from the model's own prior (NPE).

    .. math:: \min_q\; -E_{p(u)\,p(y \mid u)}\left[\log q(u \mid y)\right]

    The likelihood is simulated and never evaluated. ``guide.posterior(y)`` is then an `AutoFlow`
    for any observation; where the model has a likelihood, `pyroflows.psis` weighs its draws with
    it, and `refine` trains it further. Every step costs one inverse pass and one of the encoder.

    With ``rounds`` and one observation the later rounds simulate from the prior where the guide's
    density of the posterior of that observation is above that of all but the share ``truncation``
    of its draws (TSNPE). The guide is then good near that observation only.

    Parameters
    ----------
    guide
        An `AutoAmortizedFlow` with ``encoder=...`` or ``observed=[...]``; fitted in place.
    *args
        The model's arguments, with which it draws its observed sites. Every other keyword than
        ``model_kwargs`` is this function's.
    model_kwargs
        The model's keyword arguments.
    simulations
        Number of simulations of a round, or simulations made by `pyroflows.simulate`.
    observation
        The data that the truncated rounds are for.
    rounds
        Number of rounds.
    truncation
        Share of the posterior's mass that a round may lose.
    vectorized, workers, max_failed
        Of the simulation, see `pyroflows.simulate`.
    validation
        Share of the simulations held out.
    steps, batch_size, lr, clip_norm, patience
        Of the optimiser, see `pyroflows.fit_mle`; steps of every round.
    progress
        Whether to show a bar with the loss in nats; None for only in interactive use.
    seed
        Seed of everything random; the global state is left alone.

    Returns
    -------
    NPEFit
        History of the last round, the simulations, ``plot()``; ``print`` it.

    Raises
    ------
    FitError
        If too many simulations fail, or gradients stay infinite.
    TypeError
        For a guide with other latents than global amortised ones.

    References
    ----------
    Papamakarios and Murray, "Fast epsilon-free inference of simulation models with Bayesian
    conditional density estimation", NeurIPS 2016; Greenberg, Nonnenmacher and Macke, "Automatic
    posterior transformation for likelihood-free inference", ICML 2019; Deistler, Goncalves and
    Macke, "Truncated proposals for scalable and hassle-free simulation-based inference",
    NeurIPS 2022.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 0.5))
    >>> guide = pf.AutoAmortizedFlow(model, observed=["y"])
    >>> fit = pf.fit_npe(guide, simulations=500, steps=100, seed=0)
    >>> guide.posterior(torch.tensor(1.0)).sample(10)["z"].shape
    torch.Size([10])
    """
    if not isinstance(guide, AutoAmortizedFlow):
        raise TypeError(f"guide: expected an AutoAmortizedFlow, got {type(guide).__name__}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if rounds > 1 and observation is None:
        raise ValueError("rounds: truncated rounds are for one observation: give observation=")
    kwargs = dict(model_kwargs or {})
    how: dict[str, Any] = {"model_kwargs": kwargs, "max_failed": max_failed}
    how.update(vectorized=vectorized, workers=workers)
    accepted: list[float] = []
    with seeded(seed):
        reading = guide.read(*args, **kwargs)
        encoder = guide.data_encoder()
        sites = [*guide.latent_sites, *encoder.sites]
        if isinstance(simulations, Simulations):
            done, count = simulations, len(simulations)
        else:
            count = simulations
            done = simulate(guide.original_model, *args, sites=sites, count=count, **how)
        for number in range(rounds):
            if number:
                given, share = _truncated_prior(guide, observation, count, truncation, args, kwargs)
                accepted.append(share)
                model = guide.original_model
                done = done.joined(
                    simulate(model, *args, sites=sites, count=count, given=given, **how)
                )
            check_sites(done, sites)
            data = [reading.data(site, value=done.values[site]) for site in encoder.sites]
            loop = Loop(
                **_batches(
                    guide, [guide.pack(done.values, reading), *data], validation, batch_size
                ),
                steps=steps,
                lr=lr,
                clip_norm=clip_norm,
                check_every=max(1, steps // 50),
                patience=patience if validation else None,
                progress=progress,
                title=f"{guide.name} on simulations",
                weigh=lambda u, *data: len(u),
            )
            broadcast_(guide.state_dict())
            reason, seconds = loop.run()
    return NPEFit(loop.history, reason, seconds, simulations=done, accepted=accepted)


def check_sites(simulations: Simulations, sites: Sequence[str]) -> None:
    """Raise `DataError` unless there are values of all these sites."""
    missing = [site for site in sites if site not in simulations.values]
    if missing:
        raise DataError(
            f"simulations: expected values of the sites {sites}, {missing[0]!r} is missing"
        )


def _batches(
    guide: AutoAmortizedFlow, rows: Sequence[Tensor], validation: float, batch_size: int
) -> dict[str, Any]:
    """What the loop needs of the rows; sets what depends on them, where nothing is trained yet."""
    if not 0 <= validation < 1:
        raise ValueError(f"validation: expected a share in [0, 1), got {validation}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    u = rows[0]
    if len(u) < MIN_ROWS:
        raise DataError(f"simulations: expected at least {MIN_ROWS}, got {len(u)}")
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    order = torch.randperm(len(u), generator=generator, device="cpu").to(u.device)
    held = min(max(1, round(validation * len(u))), len(u) - 1) if validation else 0
    train = take(tuple(rows), order[held:])
    loss = NegativeLogPosterior(guide)
    loss.initialize_(*train)
    return {
        "loss": loss,
        "batches": minibatches(train, batch_size, generator),
        "parameters": [p for p in loss.parameters() if p.requires_grad],
        "check": checker(loss, take(tuple(rows), order[:held])) if held else None,
    }


@torch.no_grad()
def _truncated_prior(
    guide: AutoAmortizedFlow,
    observation: Any,
    count: int,
    truncation: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Tensor], float]:
    """Prior draws in the region of highest posterior density, and the share of the prior there."""
    if not 0 < truncation < 1:
        raise ValueError(f"truncation: expected a share in (0, 1), got {truncation}")
    reading = guide.read(*args, **kwargs)
    posterior = guide.posterior(observation, *args, **kwargs).get_posterior()
    _, density = posterior.rsample_and_log_prob((TRUNCATION_DRAWS,))
    threshold = density.quantile(truncation)
    sites = guide.latent_sites
    prior = only(guide.original_model, sites)
    kept: list[Values] = []
    tried = found = 0
    while found < count and tried < TRIES * count:
        drawn = simulate(prior, *args, sites=sites, count=PROPOSALS, model_kwargs=kwargs).values
        inside = posterior.log_prob(guide.pack(drawn, reading)) >= threshold
        kept.append({site: value[inside] for site, value in drawn.items()})
        tried, found = tried + PROPOSALS, found + int(inside.sum())
    if found < count:
        raise FitError(
            f"only {found} of {tried} prior draws are where the posterior is: too few to truncate "
            f"the prior for {count} simulations. Ask for fewer, or use one round and more of them."
        )
    return {site: torch.cat([k[site] for k in kept])[:count] for site in sites}, found / tried


def refine(
    guide: AutoAmortizedFlow,
    data: Tensor | Mapping[str, Tensor],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    steps: int = 300,
    lr: float = 1e-3,
    psis_samples: int = LOOK,
    **options: Any,
) -> tuple[AmortizedPosterior, SVIFit]:
    """Train the amortised posterior of one observation further, by the model's likelihood.

    A few steps of `pyroflows.fit_svi` on a copy; the guide stays as it is, and so does the copy
    where its draws have not become more effective. The amortised posterior
    covers the exact one nearly, so its own draws, weighted by the likelihood, estimate the forward
    divergence: unlike the ELBO's it does not leave a mode, and knows hard edges of a support.

    Parameters
    ----------
    guide
        A fitted `AutoAmortizedFlow`.
    data
        The observation, see `AutoAmortizedFlow.posterior`.
    *args
        The model's arguments.
    model_kwargs
        The model's keyword arguments.
    psis_samples
        Draws of the reports before and after.
    steps, lr, **options
        Of `pyroflows.fit_svi`. The ``draws`` of a step are by default as many as it takes for 256
        to be effective, from 512 to 4096.

    Returns
    -------
    tuple
        The posterior, an `AutoFlow`, and the fit with its `pyroflows.PSIS` report.

    Raises
    ------
    NotImplementedError
        Where an observed site is a simulation without a density.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(z, 0.5))
    >>> guide = pf.AutoAmortizedFlow(model, observed=["y"])
    >>> fit = pf.fit_npe(guide, simulations=500, steps=100, seed=0)
    >>> posterior, fit = pf.refine(guide, torch.tensor(1.0), steps=50, seed=0)
    >>> fit.psis.verdict
    'good'
    """
    kwargs = dict(model_kwargs or {})
    posterior = guide.posterior(data, *args, **kwargs)
    look: dict[str, Any] = {
        "model_kwargs": kwargs,
        "num_samples": psis_samples,
        "seed": options.get("seed"),
    }
    before = psis(posterior, *args, **look)
    kept = copy.deepcopy(posterior.state_dict())
    draws = min(max(int(EFFECTIVE * psis_samples / before.ess), 2 * EFFECTIVE), 16 * EFFECTIVE)
    options = {"starts": 0, "estimator": "forward", "draws": draws, **options}
    fit = fit_svi(
        posterior, *args, model_kwargs=kwargs, steps=steps, lr=lr, psis_samples=0, **options
    )
    after = psis(posterior, *args, **look)
    if after.ess > before.ess:
        return posterior, replace(fit, psis=after)
    posterior.load_state_dict(kept)
    return posterior, replace(fit, psis=before, stop_reason="it got no better: all is as it was")
