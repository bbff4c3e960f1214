"""From the data of a model's observed sites to the context of a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import ShapeError
from pyroflows.layers import Standardization

Data = Mapping[str, Tensor]


class DataEncoder(nn.Module):
    """The encoders of a block of latents, side by side, on standardised data.

    Parameters
    ----------
    owners
        The latent sites that the encoders were given for, for messages.
    encoders
        Modules from one tensor for each site of the data, ``(*leading, *inner)``, to
        ``(*leading, size)``. Without any, the flattened data are the context.
    data
        Data of the first call.
    event_dims
        Dimensions of an event of each site, at least one: each of its numbers is standardised,
        over everything to the left.
    dtype
        Floating dtype of the context.
    """

    initialized: Tensor

    def __init__(
        self,
        owners: Sequence[str],
        encoders: Sequence[nn.Module],
        data: Data,
        event_dims: Mapping[str, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.owners = " and ".join(map(repr, owners))
        self.sites = tuple(data)
        self.encoders = nn.ModuleList(encoders)
        shapes = [data[site].shape[-event_dims[site] :] for site in self.sites]
        self.inputs: Any = nn.ModuleList(Standardization(shape) for shape in shapes)
        #: Whether simulations have set the inputs' location and scale, in place of one call's data.
        self.register_buffer("initialized", torch.tensor(False))
        self.to(dtype=dtype, device=next(iter(data.values())).device)
        self.standardize_(data)
        #: Size of the context, known after the first call.
        self.size: int | None = None

    @torch.no_grad()
    def standardize_(self, data: Data) -> None:
        """Take location and scale of the inputs from these data."""
        for site, standardization in zip(self.sites, self.inputs, strict=True):
            loc = standardization.loc
            rows = data[site].to(loc).reshape(-1, *loc.shape)
            scale = rows.std(0, correction=0)
            # Rounding leaves a constant column a deviation of about one unit in the last place.
            constant = scale <= 10 * torch.finfo(scale.dtype).eps * rows.mean(0).abs()
            one = torch.ones_like(scale)
            standardization.set_(rows.mean(0), torch.where(constant, one, scale))

    def forward(self, data: Data, leading: torch.Size) -> Tensor:
        """Data ``{site: (*leading, *inner)}`` to contexts ``(*leading, size)``.

        Raises
        ------
        ShapeError
            For data of another shape, or an encoder's output of another shape.
        """
        tensors = [
            self._standardized(site, standardization, data[site], leading)
            for site, standardization in zip(self.sites, self.inputs, strict=True)
        ]
        if self.encoders:
            try:
                parts = [encoder(*tensors) for encoder in self.encoders]
            except ShapeError as error:
                raise ShapeError(f"encoder of {self.owners}: {error}") from error
        else:
            parts = [tensor.flatten(len(leading)) for tensor in tensors]
        for part in parts:
            self._check_output(part, leading)
        context = torch.cat(parts, -1)
        if self.size not in (None, context.shape[-1]):
            raise ShapeError(
                f"encoder of {self.owners}: expected a context of size {self.size}, as in the "
                f"first call, got {context.shape[-1]}. Data of changing length need an encoder "
                "such as pyroflows.nn.DeepSet."
            )
        self.size = context.shape[-1]
        return context

    def _standardized(
        self, site: str, standardization: Standardization, value: Tensor, leading: torch.Size
    ) -> Tensor:
        loc = standardization.loc
        event = value.shape[value.dim() - loc.dim() :]
        if event != loc.shape or value.shape[: len(leading)] != leading:
            expected = ", ".join([*map(str, leading), "...", *map(str, loc.shape)])
            raise ShapeError(f"site {site!r}: expected data ({expected}), got {tuple(value.shape)}")
        return standardization().inv(value.to(loc))

    def _check_output(self, out: object, leading: torch.Size) -> None:
        shape = out.shape if isinstance(out, Tensor) else None
        if shape is None or shape[:-1] != leading or not shape:
            expected = ", ".join([*map(str, leading), "size"])
            got = type(out).__name__ if shape is None else tuple(shape)
            raise ShapeError(
                f"encoder of {self.owners}: expected an output of shape ({expected}), got {got}"
            )
