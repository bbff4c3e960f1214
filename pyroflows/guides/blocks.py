"""Blocks of latents that are drawn together by one flow: the global ones, and those of a plate."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyroflows.errors import DataError, LocalLatentError, ShapeError, check_event
from pyroflows.guides.reading import Reading, named
from pyroflows.numerics import sum_rightmost
from pyroflows.transforms.base import call_and_ladj

GLOBAL = "global"


@dataclass(frozen=True)
class Block:
    """Latent sites of the same amortised plates, as one unconstrained vector.

    Attributes
    ----------
    plates
        The amortised plates from left to right; none for the global block, whose vector holds
        whole sites, with the dimensions of plates that are not amortised.
    shapes
        Unconstrained shape of each site's part of the vector: of one row, or of the whole site.
    """

    plates: tuple[str, ...]
    shapes: Mapping[str, torch.Size]

    @property
    def key(self) -> str:
        """A name for modules and sites."""
        return "_".join(self.plates).replace(".", "_") or GLOBAL

    @property
    def size(self) -> int:
        """Length of the unconstrained vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    def on_intervals(self, reading: Reading) -> list[bool]:
        """For each number of the vector, whether its site is on an interval with two ends."""
        found: list[bool] = []
        for name, shape in self.shapes.items():
            support = reading.sites[name]["fn"].support
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            two_ends = isinstance(support, (constraints.interval, constraints.half_open_interval))
            found += [two_ends] * shape.numel()
        return found

    def is_inside(self, other: Block) -> bool:
        """Whether the other block's plates are around this one's, and are fewer."""
        return set(other.plates) < set(self.plates)

    def check(self, reading: Reading) -> None:
        """Raise `ShapeError` where a site's part would have another shape than at first."""
        for name, shape in self.shapes.items():
            now = _unconstrained_shape(reading, name, bool(self.plates))
            if now != shape:
                raise ShapeError(
                    f"site {name!r}: expected unconstrained shape {tuple(shape)}, as in the first "
                    f"call, got {tuple(now)}. Latents of a plate whose size changes need an "
                    "encoder, which makes them local to the plate."
                )

    def unpack(self, u: Tensor, reading: Reading) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Site, constrained value and log density of its Delta, from vectors ``(*batch, D)``."""
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            fn = reading.sites[name]["fn"]
            to_support = biject_to(fn.support)
            free = fn.event_dim + to_support.domain.event_dim - to_support.codomain.event_dim
            # The batch of the vectors pads the plates that are part of a global vector.
            batch = u.shape[:-1] if self.plates else torch.Size(())
            whole = torch.broadcast_shapes(batch + shape, u.shape[:-1] + (1,) * free)
            value, ladj = call_and_ladj(to_support, part.reshape(whole))
            extra = ladj.dim() - (value.dim() - fn.event_dim)
            yield name, value, -sum_rightmost(ladj, extra)

    def pack(self, values: Mapping[str, Tensor], reading: Reading) -> Tensor:
        """Draws ``{site: (N, *shape)}`` as unconstrained vectors ``(N, D)``; of a global block."""
        parts = []
        for name in self.shapes:
            fn = reading.sites[name]["fn"]
            check_event(name, values[name], fn.shape())
            if not fn.support.check(values[name]).all():
                raise DataError(
                    f"site {name!r}: values outside the support {fn.support} of the first call. A "
                    "support that depends on other latents cannot be unconstrained: write the "
                    "latent as a function of one with a fixed support."
                )
            free = biject_to(fn.support).inv(values[name])
            parts.append(free.reshape(len(free), self.shapes[name].numel()))
        return torch.cat(parts, -1)

    def split(self, u: Tensor, reading: Reading) -> dict[str, Tensor]:
        """The inverse of `pack`."""
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: biject_to(reading.sites[name]["fn"].support)(part.reshape(len(u), *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def locate(self, readings: Collection[Reading]) -> tuple[Tensor, Tensor]:
        """Robust location and scale of the vector over the rows of several readings."""
        columns = []
        for name, shape in self.shapes.items():
            rows = []
            for reading in readings:
                site = reading.sites[name]
                rows.append(biject_to(site["fn"].support).inv(site["value"]).reshape(-1, *shape))
            columns.append(torch.cat(rows).reshape(-1, shape.numel()))
        low, middle, high = torch.cat(columns, -1).quantile(
            torch.tensor([0.16, 0.5, 0.84], dtype=columns[0].dtype, device=columns[0].device), 0
        )
        scale = (high - low) / 2
        return middle, torch.where(scale > 0, scale, torch.ones_like(scale))


def _unconstrained_shape(reading: Reading, name: str, of_one_row: bool) -> torch.Size:
    fn = reading.sites[name]["fn"]
    shape = torch.Size(biject_to(fn.support).inverse_shape(fn.shape()))
    return shape[len(fn.batch_shape) :] if of_one_row else shape


def arrange(
    reading: Reading, latents: Collection[str], amortized: Collection[str]
) -> tuple[Block, ...]:
    """The blocks of a model: the global one first, then from the outer plates to the inner.

    Raises
    ------
    LocalLatentError
        For a latent inside amortised or subsampled plates for which no encoder was given.
    """
    local = {plate for name in amortized for plate in reading.frames(name)}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in latents:
        plates = tuple(reading.frames(name))
        groups.setdefault(plates if local & set(plates) else (), []).append(name)
        if name not in amortized:
            _check_covered(reading, name, plates, local, amortized)
    blocks = [
        Block(plates, {n: _unconstrained_shape(reading, n, bool(plates)) for n in names})
        for plates, names in groups.items()
    ]
    return tuple(sorted(blocks, key=lambda block: len(block.plates)))


def _check_covered(
    reading: Reading,
    name: str,
    plates: tuple[str, ...],
    local: Collection[str],
    amortized: Collection[str],
) -> None:
    if any(tuple(reading.frames(other)) == plates for other in amortized):
        return
    for frame in reading.frames(name).values():
        subsampled = frame.full_size is not None and frame.full_size != frame.size
        if frame.name in local or subsampled:
            raise LocalLatentError(
                f"site {name!r} is local to the plates {named(plates)}, and no site of just these "
                f"has an encoder: give one, encoders={{{name!r}: ...}}"
            )
