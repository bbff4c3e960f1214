"""AutoFlow: a flow as the guide of any Pyro model with continuous latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous, prototype_hide_fn
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.distributions import FlowDistribution
from pyroflows.errors import check_event
from pyroflows.flows import Flow
from pyroflows.guides.default import DENSE, RANK, default_flow
from pyroflows.guides.deltas import LatentDeltas
from pyroflows.guides.groups import Groups
from pyroflows.guides.log_joint import LogJoint
from pyroflows.guides.param_store import claim, enter
from pyroflows.guides.sites import check_latent, forget_data, init_anywhere, is_enumerated
from pyroflows.numerics import forked_rng, sum_rightmost
from pyroflows.transforms import ComposedTransform
from pyroflows.transforms.base import call_and_ladj

#: Draws behind `AutoFlow.median` and `AutoFlow.quantiles`.
QUANTILE_DRAWS = 10_000


class AutoFlow(AutoContinuous):
    r"""Guide of all global continuous latents by one normalizing flow.

    The flow's distribution lives on the unconstrained latent vector :math:`u \in R^D`, all sites in
    the order of the model. It starts where the model is: at ``init_loc_fn``'s values with standard
    deviation ``init_scale``, in coordinates whitened by these two.

    Works with Pyro's ``SVI`` and every ELBO, with ``Predictive``, ``NeuTraReparam`` and
    `pyroflows.fit_svi`. ``Trace_ELBO``, ``TraceGraph_ELBO`` and ``TraceMeanField_ELBO`` train it by
    path gradients ("sticking the landing"); ``RenyiELBO`` and ``TraceEnum_ELBO`` take the total
    derivative, because they read ``log_prob`` alone.

    Parameters
    ----------
    model
        The model; its latents are continuous, or enumerated (``infer={"enumerate": "parallel"}``).
    flow
        A `pyroflows.Flow`, or a callable from the latent dimension to one (``pf.NSF``, a
        ``partial``); by default `default_flow`. A flow whose standardisation is already set, for
        instance by `pyroflows.fit_mle`, starts where it is.
    groups
        Lists of sites, in which each latent site stands once: the latents of a group are drawn
        together, given those of the groups before it,
        :math:`q(u) = \prod_k q(u_k \mid u_1, \dots, u_{k-1})`. Then ``flow`` is called for the
        first with its number of features, for the others with features and context (``pf.NSF``),
        or is a list with a callable or None for each group. The latent vector follows their order.
    name
        Name of the parameters in Pyro's param store. Stored tensors of the same name and shape are
        adopted, with a message. A second live guide takes ``name_1``, ``name_2``, ....
    init_loc_fn
        Start value of each site, as in Pyro's autoguides.
    init_scale
        Standard deviation to start with, in unconstrained units.
    example_args, example_kwargs
        The model's arguments; when given (an empty tuple for a model without arguments), parameters
        exist right after construction, else from the first call on.

    Raises
    ------
    LocalLatentError
        For a latent inside a subsampled plate.
    ParamStoreError
        If stored parameters of this name have other shapes.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     pyro.sample("scale", dist.HalfNormal(1.0))
    >>> guide = AutoFlow(model, example_args=())
    >>> guide.sample(5)["scale"].shape
    torch.Size([5])
    """

    prototype_trace: Any
    _unconstrained_shapes: dict[str, torch.Size]
    _log_joint: LogJoint | None

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Flow | Callable[..., Flow] | Sequence[Callable[..., Flow] | None] | None = None,
        *,
        groups: Sequence[Sequence[str]] | None = None,
        name: str = "AutoFlow",
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        example_args: Sequence[Any] | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=partial(init_anywhere, init_loc_fn=init_loc_fn))
        if not init_scale > 0:
            raise ValueError(f"init_scale: expected a positive number, got {init_scale}")
        # A tuple, so that a model that is a module does not become a part of the guide.
        self._original_model = (model,)
        self._init_scale = init_scale
        self._groups = None if groups is None else Groups.of(groups, flow)
        self._make_flow: Callable[[int], Flow] | None = None
        if groups is not None:
            self._make_flow = self._make_grouped
        elif isinstance(flow, Flow):
            self._modules["flow"] = flow
        elif flow is None or callable(flow):
            self._make_flow = flow or default_flow
        else:
            raise TypeError(f"flow: expected a pyroflows Flow or a callable to one, got {flow!r}")
        self._log_joint: LogJoint | None = None
        self._stem = name
        self._own_name = self._pyro_name = claim(name, self, stem=name)
        if example_args is not None or example_kwargs is not None:
            self._setup_prototype(*(example_args or ()), **(example_kwargs or {}))
            self.register()

    # --- model and construction ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the guide's parameters in the param store, without the flow's own part."""
        return str(self._pyro_name)

    @property
    def original_model(self) -> Callable[..., Any]:
        """The model as it was given, without the handler that sets start values."""
        model = self._original_model[0]
        if model is None:
            raise RuntimeError(
                "this guide was unpickled, and models are not pickled. Construct the guide with "
                "its model and use pyroflows.load, or load_state_dict."
            )
        return model

    @property
    def flow(self) -> Flow:
        """The flow over unconstrained latents; there from the first call on."""
        self._require_prototype()
        # Not by Pyro's attribute access, which would warn of frozen parameters at every call.
        return cast("Flow", self._modules["flow"])

    @property
    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Unconstrained shape of each latent site, in the order of the latent vector."""
        self._require_prototype()
        return {name: tuple(shape) for name, shape in self._unconstrained_shapes.items()}

    @property
    def groups(self) -> tuple[tuple[str, ...], ...] | None:
        """The sites that are drawn together, if they were given."""
        return None if self._groups is None else self._groups.sites

    @staticmethod
    def _prototype_hide_fn(msg: Any) -> bool:
        """Whether a site is none of the guide's: observed, subsampled, or enumerated."""
        return prototype_hide_fn(msg) or is_enumerated(msg)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            check_latent(name, site)
        if self._groups is not None:
            # The latent vector, and all that walks through it, follows the order of the trace.
            self._groups.arrange(self.prototype_trace)
            named = self.prototype_trace.iter_stochastic_nodes()
            self._unconstrained_shapes = {n: self._unconstrained_shapes[n] for n, _ in named}
        forget_data(self.prototype_trace)
        if self.master is None:
            # For NeuTraReparam. Blocked, as the first call makes them again in the same trace.
            with poutine.block():
                self._create_plates(*args, **kwargs)
        self._build_flow()

    def _full_trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """A trace of the model with its observed sites, which the prototype leaves out."""
        return poutine.block(poutine.trace(self.model).get_trace)(*args, **kwargs)

    def _make_grouped(self, features: int) -> Flow:
        return cast("Groups", self._groups).build(self._unconstrained_shapes)

    def _build_flow(self) -> None:
        loc = self._init_loc()
        if not loc.isfinite().all():
            raise ValueError(f"init_loc_fn: expected finite unconstrained values, got {loc}")
        flow = self.flow if self._make_flow is None else self._make_flow(self.latent_dim)
        if not isinstance(flow, Flow):
            raise TypeError(f"flow: expected a pyroflows Flow, got {flow!r} from the callable")
        if flow.event_shape != (self.latent_dim,):
            raise ValueError(
                f"flow: expected {self.latent_dim} features, the model's latent dimension, got "
                f"event shape {tuple(flow.event_shape)}. Pass a callable such as pyroflows.NSF to "
                "have the flow made for the dimension."
            )
        flow.to(dtype=loc.dtype, device=loc.device)
        standardization = flow.transform.standardization
        if standardization.is_identity():
            rank = self.latent_dim if self.latent_dim <= DENSE else RANK
            standardization = flow.transform.whiten_(rank)
            standardization.set_(loc, self._init_scale)
        self._modules["flow"] = flow
        self._make_flow = None

    def _require_prototype(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                "the guide does not know its model's latents yet: call guide(*args) once, or pass "
                "example_args to the constructor"
            )

    def _ensure_prototype(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def register(self, *args: Any, **kwargs: Any) -> None:
        """Enter the parameters in Pyro's param store, as any call of the guide does."""
        self._ensure_prototype(args, kwargs)
        with self._pyro_context:
            self._register()

    def _register(self) -> None:
        """Bring flow and param store together."""
        enter(self, "flow")

    # --- Pyro's autoguide contract ------------------------------------------------------------

    def get_context(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The flow's context, from the model's arguments; override it for a conditional flow."""
        return None

    def get_base_dist(self) -> Any:
        """The flow's base distribution."""
        return self.flow.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> ComposedTransform:
        """The flow's transform from base to unconstrained latents, made afresh."""
        return self.flow.transform.condition(self.get_context(*args, **kwargs))

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the unconstrained latent vector, event shape ``(latent_dim,)``."""
        self._ensure_prototype(args, kwargs)
        return self.flow(self.get_context(*args, **kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the model's arguments, Pyro's handlers."""
        self._ensure_prototype(args, kwargs)
        self._register()
        with LatentDeltas():
            return super().forward(*args, **kwargs)

    # --- latents and values -------------------------------------------------------------------

    def _unpack_with_ladj(self, latents: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self._require_prototype()
        check_event("latents", latents, (self.latent_dim,))
        leading = latents.shape[:-1]
        sizes = [shape.numel() for shape in self._unconstrained_shapes.values()]
        values: dict[str, Tensor] = {}
        total = latents.new_zeros(leading)
        sites = self.prototype_trace.iter_stochastic_nodes()
        for (name, site), part in zip(sites, latents.split(sizes, -1), strict=True):
            u = part.reshape(leading + self._unconstrained_shapes[name])
            values[name], ladj = call_and_ladj(biject_to(site["fn"].support), u)
            total = total + sum_rightmost(ladj, ladj.dim() - len(leading))
        return values, total

    def unpack(self, latents: Tensor) -> dict[str, Tensor]:
        """Unconstrained ``(..., latent_dim)`` to constrained values ``{site: (..., *shape)}``."""
        return self._unpack_with_ladj(latents)[0]

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Constrained values ``{site: (..., *shape)}`` to unconstrained vectors ``(..., D)``.

        Raises
        ------
        ValueError
            If a site is missing or unknown.
        ShapeError
            If a value's rightmost dimensions are not the site's.
        """
        self._require_prototype()
        expected = list(self._unconstrained_shapes)
        if set(values) != set(expected):
            raise ValueError(f"values: expected the sites {expected}, got {sorted(values)}")
        parts = []
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value, shape = values[name], site["value"].shape
            check_event(name, value, shape)
            u = biject_to(site["fn"].support).inv(value)
            leading = value.shape[: value.dim() - len(shape)]
            parts.append(u.reshape(*leading, self._unconstrained_shapes[name].numel()))
        leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*leading, part.shape[-1]) for part in parts], -1)

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of every site, ``{site: (num_samples, *shape)}``, without gradients."""
        return self.unpack(self.get_posterior(*args, **kwargs).sample((num_samples,)))

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        r"""Log density of constrained values, in nats, of the shape of their leading dimensions.

        .. math:: \log q(z) = \log q(u) - \log\left|\det \partial z / \partial u\right|
        """
        self._ensure_prototype(args, kwargs)
        latents = self.pack(values)
        return (
            self.get_posterior(*args, **kwargs).log_prob(latents)
            - self._unpack_with_ladj(latents)[1]
        )

    def log_joint(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        r"""The model's log density over unconstrained latents, ``(S, D)`` to ``(S,)``, in nats.

        .. math:: \log p(x, z(u)) + \log\left|\det \partial z / \partial u\right|

        All draws are evaluated at once where the model broadcasts (see `LogJoint`). Enumerated
        discrete sites are summed out. NaN where the model is undefined, no exception.
        """
        self._ensure_prototype(args, kwargs)
        if latents.dim() != 2:
            raise ValueError(
                f"latents: expected shape (draws, {self.latent_dim}), got {tuple(latents.shape)}"
            )
        if self._log_joint is None:
            self._log_joint = LogJoint(self.original_model, self._full_trace(args, kwargs))
        values, ladj = self._unpack_with_ladj(latents)
        return self._log_joint(values, args, kwargs) + ladj

    # --- summaries ----------------------------------------------------------------------------

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal quantiles ``{site: (len(quantiles), *shape)}``.

        Taken coordinate by coordinate in unconstrained space from 10,000 draws of a fixed seed, and
        mapped to the constrained space.
        """
        posterior = self.get_posterior(*args, **kwargs)
        levels = torch.as_tensor(quantiles, dtype=self.flow.dtype, device=self.flow.device)
        with forked_rng(0):
            latents = posterior.sample((QUANTILE_DRAWS,))
        return self.unpack(torch.quantile(latents, levels, dim=0))

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians ``{site: shape}``; see `quantiles`."""
        return {site: q[0] for site, q in self.quantiles([0.5], *args, **kwargs).items()}

    # --- copies -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Models are functions or modules of the user's: they are not pickled.
        state = self.__dict__.copy()
        return {
            **state,
            "_model": (None,),
            "_original_model": (None,),
            "master": None,
            "_log_joint": None,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # The model is shared, the name is the copy's own.
        for attribute in ("_model", "_original_model", "_log_joint"):
            new.__dict__[attribute] = self.__dict__[attribute]
        return new
