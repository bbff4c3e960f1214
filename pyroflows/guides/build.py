"""How the flows and encoders of an amortised guide are made, from a model's first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions.transforms import identity_transform

from pyroflows.flows import Flow
from pyroflows.guides.blocks import Block, arrange
from pyroflows.guides.data_encoder import DataEncoder
from pyroflows.guides.default import default_conditional_flow, default_flow
from pyroflows.guides.reading import Reading, named
from pyroflows.guides.sites import is_enumerated
from pyroflows.layers import Layer
from pyroflows.transforms import ColumnsTransform, LogisticTransform

#: Standard deviation that local latents start with, in units of the prior's.
LOCAL_SCALE = 0.2


class LogisticColumns(Layer):
    """The last layer of a flow of unconstrained latents some of which are on intervals.

    Their prior is close to logistic in unconstrained units if it is close to uniform; the layers
    before see it close to normal.
    """

    order: Tensor
    restore: Tensor

    def __init__(self, on_intervals: Sequence[bool]) -> None:
        super().__init__()
        others = ~torch.tensor(on_intervals)
        self.register_buffer("order", others.int().argsort(stable=True))
        self.register_buffer("restore", self.order.argsort())
        self.sizes = [int((~others).sum()), int(others.sum())]

    def forward(self, context: Tensor | None = None) -> ColumnsTransform:
        parts = [LogisticTransform(), identity_transform]
        return ColumnsTransform(parts, self.sizes, self.order, self.restore)


@dataclass(frozen=True)
class Recipe:
    """What an amortised guide was asked for; see `AutoAmortizedFlow`."""

    encoders: Mapping[str, nn.Module]
    encoder: nn.Module | None
    observed: tuple[str, ...] | None
    flow: Callable[[int, int], Flow] | None
    hierarchical: bool
    init_scale: float

    def build(
        self, reading: Reading, drawn: Sequence[Reading], start: Reading
    ) -> tuple[tuple[Block, ...], dict[str, Flow], dict[str, DataEncoder]]:
        """Blocks, flows and encoders from readings of a model: one, draws, and start values."""
        amortized = self.encoders
        latents = self._latents(reading)
        for site in amortized:
            if site not in latents:
                raise ValueError(
                    f"encoders: the model has no latent site {site!r}; it has {named(latents)}"
                )
            if not reading.frames(site):
                raise ValueError(
                    f"encoders: site {site!r} is in no plate. encoder=module is for global latents"
                )
        blocks = arrange(reading, latents, amortized)
        amortizes_globals = self.encoder is not None or not self.encoders
        flows: dict[str, Flow] = {}
        encoders: dict[str, DataEncoder] = {}
        located: dict[str, tuple[Tensor, Tensor]] = {}
        for block in blocks:
            loc, scale = located[block.key] = block.locate(drawn)
            shifts, scales = [], []
            if block.plates or amortizes_globals:
                encoder = encoders[block.key] = self._new_encoder(block, reading, loc.dtype)
                size = encoded(encoder, block, reading).shape[-1]
                shifts, scales = [loc.new_zeros(size)], [loc.new_ones(size)]
            else:
                # The start value says where a global latent is, and its start scale nothing.
                loc, scale = block.locate([start])[0], torch.ones_like(loc)
                located[block.key] = loc, scale
                scale = self.init_scale * scale
            for above in self.above(block, blocks):
                shifts.append(located[above.key][0])
                scales.append(located[above.key][1])
            flow = self._new_flow(len(loc), sum(map(len, shifts)), bool(block.plates))
            if block.key in encoders and any(block.on_intervals(reading)):
                last = LogisticColumns(block.on_intervals(reading))
                layers = [*flow.transform.layers, last]
                flow = Flow(layers, len(loc), flow.context_size, flow.base)
            flow.to(dtype=loc.dtype, device=loc.device)
            flow.transform.standardization.set_(loc, scale)
            if flow.transform.context_standardization is not None:
                flow.transform.context_standardization.set_(torch.cat(shifts), torch.cat(scales))
            flows[block.key] = flow
        return blocks, flows, encoders

    def _latents(self, reading: Reading) -> list[str]:
        observed = self.observed or ()
        unknown = [site for site in observed if site not in reading.sites]
        if unknown:
            raise ValueError(
                f"observed: the model has no site {unknown[0]!r}; it has {named(reading.sites)}"
            )
        found = [
            site
            for site, node in reading.sites.items()
            if not (node["is_observed"] or is_enumerated(node) or site in observed)
        ]
        if not found:
            raise ValueError("the model has no latent sites: it needs no guide")
        return found

    def _new_encoder(self, block: Block, reading: Reading, dtype: torch.dtype) -> DataEncoder:
        modules = [self.encoders[site] for site in block.shapes if site in self.encoders]
        if not block.plates and self.encoder is not None:
            modules = [self.encoder]
        sites = self.observed
        if sites is None:
            sites = tuple(
                site
                for site, node in reading.sites.items()
                if node["is_observed"] and not node["infer"].get("_deterministic")
            )
        sites = tuple(s for s in sites if set(block.plates) <= set(reading.frames(s)))
        if not sites:
            raise ValueError(
                f"the encoder of {named(block.shapes)} has no data: the model has no observed site "
                f"inside the plates {named(block.plates)}. Call the guide with data, or name the "
                "sites to read by observed=[...]."
            )
        data = {site: reading.data(site, block.plates) for site in sites}
        dims = {site: max(reading.sites[site]["fn"].event_dim, 1) for site in sites}
        return DataEncoder(tuple(block.shapes), modules, data, dims, dtype)

    def _new_flow(self, features: int, context: int, local: bool) -> Flow:
        if self.flow is not None:
            flow = self.flow(features, context)
        elif context:
            flow = default_conditional_flow(features, context, LOCAL_SCALE if local else 1.0)
        else:
            flow = default_flow(features)
        if not isinstance(flow, Flow):
            raise TypeError(f"flow: expected a pyroflows Flow, got {flow!r} from the callable")
        if flow.event_shape != (features,) or flow.context_size != context:
            raise ValueError(
                f"flow: expected {features} features and a context of size {context}, got event "
                f"shape {tuple(flow.event_shape)} and a context of size {flow.context_size}"
            )
        return flow

    def above(self, block: Block, blocks: Sequence[Block]) -> list[Block]:
        """The blocks whose latents a block's context includes."""
        return [b for b in blocks if block.is_inside(b)] if self.hierarchical else []


def encoded(encoder: DataEncoder, block: Block, reading: Reading) -> Tensor:
    """The encoded data, ``(*batch, size)`` with the block's plates at their dimensions."""
    data = {}
    for site in encoder.sites:
        if not reading.sites[site]["is_observed"] and block.plates:
            raise ValueError(
                f"site {site!r} has no data in this call: the encoder of {encoder.owners} "
                "needs them. Pass the data to the guide."
            )
        data[site] = reading.data(site, block.plates)
    frames = reading.frames(next(iter(block.shapes)))
    sizes = torch.Size(frames[plate].size for plate in block.plates)
    encoded = encoder(data, sizes)
    batch = [1] * -min((frames[plate].dim for plate in block.plates), default=0)
    for plate in block.plates:
        batch[frames[plate].dim] = frames[plate].size
    return encoded.reshape(*batch, encoded.shape[-1])
