"""From a model, or its guide, to draws of the posterior itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pyro
import torch

from pyroflows.diagnostics.draws import Draws, check_call
from pyroflows.diagnostics.to_arviz import Backend, to_arviz
from pyroflows.guides import AutoFlow
from pyroflows.mcmc.imh import IMH
from pyroflows.mcmc.kernels import Chains, Kernel, Plan
from pyroflows.mcmc.nutpie import Nutpie
from pyroflows.mcmc.nuts import NUTS
from pyroflows.mcmc.target import Target
from pyroflows.numerics import forked_rng
from pyroflows.training import fit_svi

KERNELS: dict[str, Callable[[], Kernel]] = {"nuts": NUTS, "nutpie": Nutpie, "imh": IMH}
KernelName = Literal["nuts", "nutpie", "imh"]


def run_mcmc(
    model: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    guide: AutoFlow | None = None,
    kernel: KernelName | Kernel = "nuts",
    chains: int | None = None,
    draws: int | None = None,
    warmup: int | None = None,
    precondition: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    prior: bool = False,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    backend: Backend = "auto",
) -> Any:
    r"""Sample a model's posterior exactly, where its guide's flow has straightened it.

    Chains run over the base variable z of the flow :math:`T`, whose parameters are held constant:

    .. math:: \log\pi(z) = \log p(x, T(z)) + \log\left|\det \partial T / \partial z\right|

    A perfect guide makes this a standard normal density, the easiest there is; an imperfect one
    costs speed, not exactness. Chains start at draws of the guide; where none was fitted, near the
    prior's medians. Each gradient costs one forward pass of the flow and one evaluation of the
    model; their tensor operations are recorded once and replayed without Python, several times
    faster, unless the model's control flow depends on values.

    Ctrl-C ends the run; what is there is returned, with a warning.

    Parameters
    ----------
    model
        The model; its latents are continuous, or enumerated.
    *args
        The model's arguments.
    model_kwargs
        The model's keyword arguments.
    guide
        A fitted `AutoFlow`, taken as it is: of this model, or of one with the same sites. None
        makes one and fits it by `pyroflows.fit_svi` with its defaults first.
    kernel
        ``"nuts"``, ``"nutpie"``, ``"imh"``, or an object with options, such as
        ``pf.mcmc.NUTS(target_accept=0.9)``.
    chains, draws, warmup
        Number of chains, draws of each that are kept, and draws before these in which the kernel
        adapts. By default the kernel's own numbers.
    precondition
        Whether to use the guide's flow; without, chains run over the unconstrained latents, and
        nothing is fitted where there is no guide.
    seed
        Makes the result reproducible and leaves torch's global random state as it was.
    progress
        Whether to show a bar; None for only in interactive use.
    log_likelihood, posterior_predictive, prior, dims, coords, backend
        As in `pyroflows.to_arviz`.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        As from `pyroflows.to_arviz`. In ``sample_stats`` stand ``lp``, the log density of the
        unconstrained latents and the data in nats, ``acceptance_rate``, and what the kernel knows:
        ``diverging``, ``n_steps``, ``step_size``. Attributes of the group: the kernel, the number
        of ``gradient_evaluations`` with those of the warm-up, and of a guide fitted here its
        k-hat.

    Raises
    ------
    ValueError
        For a model without latents, or with discrete ones that are not enumerated; a guide of other
        sites; starting points without a finite density; a random density; an unknown kernel.
    TypeError
        If the model does not accept its arguments, or the guide is no `AutoFlow`.

    References
    ----------
    Hoffman et al., "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport",
    2019; Parno and Marzouk, "Transport map accelerated Markov chain Monte Carlo", SIAM/ASA Journal
    on Uncertainty Quantification 2018.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("rows", len(y)):
    ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> y = torch.full((8,), 0.5)
    >>> guide = pf.AutoFlow(model)
    >>> fit = pf.fit_svi(guide, y, steps=100, lr=0.01, seed=0)
    >>> idata = pf.run_mcmc(model, y, guide=guide, chains=2, draws=50, warmup=50, seed=0)
    >>> idata.posterior["loc"].shape, int(idata.sample_stats["diverging"].sum())
    ((2, 50), 0)
    """
    chosen = _kernel(kernel)
    kwargs = dict(model_kwargs or {})
    check_call(model, args, kwargs)
    numbers = {"chains": chains, "draws": draws, "warmup": warmup}
    counts = {name: _count(name, n, getattr(chosen, name)) for name, n in numbers.items()}
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    with forked_rng(seed), _parameters_kept():
        known = guide is not None
        guide = _guide_of(model, guide, args, kwargs)
        attrs: dict[str, Any] = {"kernel": repr(chosen), "preconditioned": int(precondition)}
        if precondition and not known:
            fit = fit_svi(guide, *args, model_kwargs=kwargs, progress=progress)
            attrs["guide_k_hat"] = fit.psis.k_hat if fit.psis else float("nan")
        target = Target(guide, args, kwargs, precondition)
        starts = target.starts(counts["chains"])
        found = chosen.run(target, Plan(starts, counts["draws"], counts["warmup"], seed, progress))
    return to_arviz(
        _as_draws(found, target, attrs),
        num_samples=counts["draws"],
        log_likelihood=log_likelihood,
        posterior_predictive=posterior_predictive,
        prior=prior,
        dims=dims,
        coords=coords,
        seed=seed,
        backend=backend,
    )


def _kernel(kernel: str | Kernel) -> Kernel:
    if isinstance(kernel, str) and kernel in KERNELS:
        return KERNELS[kernel]()
    if isinstance(kernel, str) or not hasattr(kernel, "run"):
        raise ValueError(
            f"kernel: expected one of {sorted(KERNELS)} or an object such as pf.mcmc.NUTS(), got "
            f"{kernel!r}"
        )
    return kernel


def _count(name: str, given: int | None, default: int) -> int:
    value = default if given is None else given
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return value


@contextmanager
def _parameters_kept() -> Iterator[None]:
    """Leave no new parameters in Pyro's store: those of a guide made here."""
    store = pyro.get_param_store()
    stored = set(store.keys())
    try:
        yield
    finally:
        for name in set(store.keys()) - stored:
            del store[name]


def _guide_of(
    model: Callable[..., Any],
    guide: AutoFlow | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> AutoFlow:
    """The guide, or one of this model with its flow, or a new one."""
    if guide is not None and not isinstance(guide, AutoFlow):
        raise TypeError(f"guide: expected an AutoFlow, got {type(guide).__name__}")
    if guide is not None and guide.original_model == model:
        return guide
    flow = None if guide is None else copy.deepcopy(guide.flow)
    try:
        own = AutoFlow(model, flow, name="run_mcmc", example_args=args, example_kwargs=kwargs)
    except RuntimeError as error:
        if "no latent variables" not in str(error):
            raise
        raise ValueError(
            "model: expected latent variables to sample, got a model without any. Leave obs=... "
            "out where a site is unknown."
        ) from None
    if guide is not None and guide.latent_shapes != own.latent_shapes:
        raise ValueError(
            f"guide: expected one of this model, whose latent sites are {own.latent_shapes} "
            f"(unconstrained shapes), got a guide of {guide.latent_shapes}"
        )
    return own


def _as_draws(found: Chains, target: Target, attrs: dict[str, Any]) -> Draws:
    chains, length, dim = found.points.shape
    if found.interrupted:
        warnings.warn(
            f"the run was interrupted: {chains} chains of {length} draws are returned", stacklevel=3
        )
    space = target.plain() if found.latents else target
    latents, lp = space.latents(found.points.reshape(-1, dim))
    stats = {name: value.reshape(-1) for name, value in found.stats.items()}
    return Draws(
        samples=target.guide.unpack(latents),
        num_chains=chains,
        model=target.guide.original_model,
        args=target.args,
        kwargs=target.kwargs,
        stats={"lp": lp, **stats},
        attrs={**attrs, **found.evaluations},
    )
