"""AutoAmortizedFlow: conditional flows that read the data, for plates of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_median
from torch import Tensor, nn

from pyroflows.distributions import FlowDistribution
from pyroflows.errors import ShapeError
from pyroflows.flows import Flow
from pyroflows.guides.blocks import GLOBAL, Block
from pyroflows.guides.build import Recipe, encoded
from pyroflows.guides.data_encoder import DataEncoder
from pyroflows.guides.deltas import LatentDeltas
from pyroflows.guides.param_store import claim, enter
from pyroflows.guides.posterior import AmortizedPosterior
from pyroflows.guides.reading import Model, Reading, named, read_model
from pyroflows.guides.sites import init_anywhere
from pyroflows.numerics import forked_rng

#: Prior draws of the model behind the location and scale of amortised latents.
PRIOR_DRAWS = 32
DRAWS = "_pyroflows_draws"


class AutoAmortizedFlow(AutoGuide):
    r"""Guide whose flows read the data: latents local to plates, or a posterior for any data set.

    Latents that an encoder is given for are amortised: all latents of the same plates are drawn
    jointly, row by row, from one conditional flow whose context is what the encoders make of the
    row's data. All other latents are global and share one flow.

    .. math:: q(u) = q(u_0) \prod_{\text{plates}} \prod_i q(u_i \mid e(y_i), u_0)

    The parameters do not know how many rows there are: plates may be subsampled, change their size
    from call to call, and be nested, and new rows have a posterior at once. With ``encoder`` the
    global latents are amortised too, over data sets: `pyroflows.fit_npe` then trains on
    simulations, and `posterior` gives an `AutoFlow` for any observation.

    An encoder is called with one tensor for each observed site inside the latent's plates, in the
    order of the model: ``(*plates, *other plates, *event)``, an event without dimensions as one of
    size one, standardised. It returns ``(*plates, size)``.

    Every call runs the model once more, without gradients, to learn the indices and the data of
    its plates, and costs one forward pass of each flow and encoder.

    Parameters
    ----------
    model
        The model; its latents are continuous, or enumerated.
    encoders
        A module for each amortised site. One is enough for all sites of the same plates; the
        outputs of several are put side by side.
    encoder
        A module that reads the whole data set, for the global latents. With ``observed`` alone,
        the data themselves are their context.
    observed
        The sites that the encoders read; by default the observed ones. Covariates can be made
        sites by ``pyro.deterministic(name, value, event_dim=...)``.
    flow
        From the number of features and the size of the context to a flow, for instance ``pf.NSF``;
        for each block of latents one. By default `default_flow`, or its conditional kin.
    hierarchical
        Whether the context of local latents includes the latents above them: the global ones, and
        those of enclosing plates.
    name
        Name of the parameters in Pyro's param store; see `AutoFlow`.
    init_loc_fn, init_scale
        Where global latents start without an encoder; see `AutoFlow`. Amortised latents start at
        the prior.
    example_args, example_kwargs
        The model's arguments; when given, parameters exist right after construction.

    Raises
    ------
    ValueError
        For encoders or observed sites that the model lacks, and encoders without data.
    ShapeError
        For an encoder's output of another shape, or a global latent whose shape changes.
    LocalLatentError
        For local latents that no encoder was given for.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("rows", len(y), subsample_size=min(5, len(y))) as rows:
    ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
    ...         pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])
    >>> guide = AutoAmortizedFlow(model, {"z": torch.nn.Linear(1, 4)})
    >>> _ = guide(torch.ones(9))  # makes the flows; or train it
    >>> guide.sample(7, torch.ones(3))["z"].shape
    torch.Size([7, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoders: Mapping[str, nn.Module] | None = None,
        *,
        encoder: nn.Module | None = None,
        observed: Sequence[str] | None = None,
        flow: Callable[[int, int], Flow] | None = None,
        hierarchical: bool = True,
        name: str = "AutoAmortizedFlow",
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        example_args: Sequence[Any] | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model)
        if not encoders and encoder is None and observed is None:
            raise ValueError(
                "expected encoders={site: module} for latents local to plates, or encoder=module "
                "for the global ones. A guide without either is an AutoFlow."
            )
        modules = {f"encoders[{site!r}]": module for site, module in (encoders or {}).items()}
        if encoder is not None:
            modules["encoder"] = encoder
        for argument, module in modules.items():
            if not isinstance(module, nn.Module):
                raise TypeError(f"{argument}: expected a torch module, got {module!r}")
        if flow is not None and (isinstance(flow, Flow) or not callable(flow)):
            raise TypeError(
                "flow: expected a callable from features and context to a flow, for instance "
                f"pyroflows.NSF, got {flow!r}"
            )
        if not init_scale > 0:
            raise ValueError(f"init_scale: expected a positive number, got {init_scale}")
        self._init_loc_fn = init_loc_fn
        self._recipe = Recipe(
            dict(encoders or {}),
            encoder,
            None if observed is None else tuple(observed),
            flow,
            hierarchical,
            init_scale,
        )
        self._blocks: tuple[Block, ...] = ()
        self._modules["encoders"] = nn.ModuleDict()
        self._modules["flows"] = nn.ModuleDict()
        self._stem = name
        self._own_name = self._pyro_name = claim(name, self, stem=name)
        if example_args is not None or example_kwargs is not None:
            self.register(*(example_args or ()), **(example_kwargs or {}))

    # --- construction -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the guide's parameters in the param store."""
        return str(self._pyro_name)

    @property
    def original_model(self) -> Model:
        """The model."""
        return cast("Model", self._model[0])

    def flow(self, block: str = GLOBAL) -> Flow:
        """The flow of a block: ``"global"``, or the names of its plates joined by ``_``."""
        if not self._blocks:
            raise RuntimeError(
                "the guide does not know its model's latents yet: call guide(*args) once, or pass "
                "example_args to the constructor"
            )
        # Not by Pyro's attribute access, which would register and warn at every call.
        flows = cast("nn.ModuleDict", self._modules["flows"])
        if block not in flows:
            raise ValueError(f"block: expected one of {named(flows)}, got {block!r}")
        return cast("Flow", flows[block])

    def encoder(self, block: str = GLOBAL) -> DataEncoder | None:
        """The encoders of a block; None for global latents that are not amortised."""
        encoders = cast("nn.ModuleDict", self._modules["encoders"])
        return cast("DataEncoder", encoders[block]) if block in encoders else None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The latents that are drawn together, the global ones first; none before a call."""
        return self._blocks

    @property
    def latent_sites(self) -> tuple[str, ...]:
        """The sites that the guide draws, in the order of its vectors."""
        return tuple(site for block in self._blocks for site in block.shapes)

    def pack(self, values: Mapping[str, Tensor], reading: Reading) -> Tensor:
        """Global latents ``{site: (N, *shape)}`` as unconstrained vectors ``(N, D)``."""
        return self._blocks[0].pack(values, reading)

    def unpack(self, latents: Tensor, reading: Reading) -> dict[str, Tensor]:
        """Unconstrained global vectors ``(..., D)`` as values ``{site: (..., *shape)}``."""
        rows = latents.reshape(-1, latents.shape[-1])
        parts = self._blocks[0].split(rows, reading)
        return {site: v.reshape(*latents.shape[:-1], *v.shape[1:]) for site, v in parts.items()}

    def read(self, *args: Any, **kwargs: Any) -> Reading:
        """The sites, plates and data of the model at these arguments; the first call builds."""
        feasible = self._at(init_to_feasible)
        reading = read_model(self.original_model, args, kwargs, feasible, self._plates())
        if not self._blocks:
            with forked_rng(0):
                tried = [self._draw_prior(args, kwargs) for _ in range(PRIOR_DRAWS)]
            # Where nothing can be drawn, the start values are all that is known.
            drawn = [draw for draw in tried if draw is not None] or [reading]
            start = read_model(self.original_model, args, kwargs, self._at(self._init_loc_fn))
            self._blocks, flows, encoders = self._recipe.build(reading, drawn, start)
            self._modules["flows"] = nn.ModuleDict(flows)
            self._modules["encoders"] = nn.ModuleDict(encoders)
        for block in self._blocks:
            block.check(reading)
        return reading

    def _plates(self) -> dict[str, Any]:
        """The plates that an ``AutoGuideList`` made for this part of it."""
        return {} if self.master is None else dict(self.master().plates)

    def _at(self, init_loc_fn: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
        """Start values of latents; data that were not given are drawn."""
        observed = self._recipe.observed or ()

        def init(site: Any) -> Tensor:
            if site["name"] in observed:
                return cast("Tensor", site["fn"].sample())
            return init_anywhere(site, init_loc_fn)

        return init

    def _draw_prior(self, args: Any, kwargs: Any) -> Reading | None:
        """A reading at a draw from the prior; None where there is none.

        Improper priors cannot be drawn from, and simulators fail at some draws, in whatever way.
        """
        try:
            return read_model(self.original_model, args, kwargs, None)
        except Exception:
            return None

    def register(self, *args: Any, **kwargs: Any) -> None:
        """Enter the parameters in Pyro's param store, as any call of the guide does."""
        if not self._blocks:
            self.read(*args, **kwargs)
        with self._pyro_context:
            self._register()

    def _register(self) -> None:
        enter(self, "flows", "encoders")

    # --- drawing ------------------------------------------------------------------------------

    def _posterior(
        self, block: Block, reading: Reading, drawn: Mapping[str, Tensor]
    ) -> FlowDistribution:
        """The distribution of a block's vectors, given those of the blocks above it."""
        parts = [drawn[above.key] for above in self._recipe.above(block, self._blocks)]
        is_draw = bool(parts)
        encoder = self.encoder(block.key)
        if encoder is not None:
            parts.insert(0, encoded(encoder, block, reading))
        if not parts:
            return self.flow(block.key)()
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        context = torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
        return self.flow(block.key)(context, context_is_draw=is_draw)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the model's arguments, Pyro's handlers."""
        reading = self.read(*args, **kwargs)
        self._register()
        frames = {
            n: f for b in self._blocks for s in b.shapes for n, f in reading.frames(s).items()
        }
        own = self._plates()
        plates = {name: own.get(name) or reading.plate(frame) for name, frame in frames.items()}
        drawn: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        with LatentDeltas():
            for block in self._blocks:
                posterior = self._posterior(block, reading, drawn)
                with _entered(plates[name] for name in block.plates):
                    drawn[block.key] = pyro.sample(
                        f"_{self.name}_{block.key}", posterior, infer={"is_auxiliary": True}
                    )
                for site, value, log_density in block.unpack(drawn[block.key], reading):
                    event_dim = reading.sites[site]["fn"].event_dim
                    with _entered(plates[name] for name in reading.frames(site)):
                        delta = dist.Delta(value, log_density, event_dim=event_dim)
                        values[site] = pyro.sample(site, delta)
        return values

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of every site at the model's arguments, ``{site: (num_samples, *shape)}``."""
        reading = self.read(*args, **kwargs)
        frames = [frame for site in reading.sites for frame in reading.frames(site).values()]
        nesting = max((-frame.dim for frame in frames), default=0)
        with poutine.block(), pyro.plate(DRAWS, num_samples, dim=-1 - nesting):
            values = self(*args, **kwargs)
        shapes = {site: reading.sites[site]["fn"].shape() for site in values}
        return {site: v.reshape(num_samples, *shapes[site]) for site, v in values.items()}

    # --- one observation ----------------------------------------------------------------------

    def encode(self, data: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Contexts ``(*batch, size)`` of data sets ``{site: (*batch, *shape)}``.

        For guides whose latents are all global and amortised; ``flow()`` of the contexts is the
        distribution of their unconstrained latents.
        """
        reading, encoder = self.read(*args, **kwargs), self.data_encoder()
        aligned = {site: reading.data(site, value=data[site]) for site in encoder.sites}
        first = encoder.sites[0]
        leading = data[first].dim() - len(reading.sites[first]["fn"].shape())
        return encoder(aligned, data[first].shape[:leading])

    def posterior(
        self, data: Tensor | Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> AmortizedPosterior:
        """The posterior of one observation: an `AutoFlow` of the model conditioned on it.

        For guides whose latents are all global and amortised. The flow is copied.

        Parameters
        ----------
        data
            Values of the observed sites by name, or the value of the only one.
        *args, **kwargs
            The model's arguments.

        Raises
        ------
        ValueError, ShapeError
            For a site that is missing or unknown, or a value of another shape.
        """
        reading, encoder = self.read(*args, **kwargs), self.data_encoder()
        if not isinstance(data, Mapping):
            data = {encoder.sites[0]: data} if len(encoder.sites) == 1 else {}
        if set(data) != set(encoder.sites):
            raise ValueError(
                f"data: expected values of the sites {named(encoder.sites)}, got {named(data)}"
            )
        conditioned = poutine.condition(self.original_model, data=dict(data))
        for site, value in data.items():
            shape = reading.sites[site]["fn"].shape()
            if value.shape != shape:
                raise ShapeError(
                    f"site {site!r}: expected data of shape {tuple(shape)}, as the model draws "
                    f"them, got {tuple(value.shape)}"
                )
        aligned = {site: reading.data(site, value=value) for site, value in data.items()}
        without = [s for s in data if reading.sites[s]["infer"].get("_deterministic")]
        with torch.no_grad():
            context = encoder(aligned, torch.Size())
        return AmortizedPosterior(conditioned, self.flow(), context, args, kwargs, without)

    def data_encoder(self) -> DataEncoder:
        """The encoder of the global latents, where there are no others."""
        encoder = self.encoder()
        if encoder is None or len(self._blocks) > 1:
            local = [site for block in self._blocks if block.plates for site in block.shapes]
            raise TypeError(
                "expected a guide whose latents are all global and amortised, by encoder=... or "
                f"observed=[...]; local to plates are {named(local)}. guide.sample(n, *args) draws "
                "them at the model's arguments."
            )
        return encoder

    # --- copies -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Models are functions or modules of the user's: they are not pickled.
        return {**self.__dict__, "_model": (None,), "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoAmortizedFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # The model is shared, the name is the copy's own.
        new.__dict__["_model"] = self.__dict__["_model"]
        return new


@contextmanager
def _entered(plates: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for plate in plates:
            stack.enter_context(plate)
        yield
