"""From ArviZ back to rows: the draws of a posterior as data for a flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.errors import DataError


def from_arviz(
    idata: Any, sites: Sequence[str] | None = None, *, group: str = "posterior"
) -> Tensor:
    """Draws of sites side by side, ``(chains * draws, D)``, for `pyroflows.fit_mle`.

    So yesterday's posterior becomes today's prior: ``flow = pf.NSF(D, support=[...])`` keeps each
    column's constraint, ``pf.fit_mle(flow, rows)`` fits it, and ``pyro.sample("theta", flow())``
    stands in the next model. The columns are the sites in their order, each flattened.

    Parameters
    ----------
    idata
        An ArviZ ``InferenceData`` or ``DataTree``, whoever sampled it.
    sites
        Which variables, in which order; by default all of the group.
    group
        The group of draws.

    Raises
    ------
    DataError
        For a group or variable that is missing, or values that are not finite numbers.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    ...     pyro.sample("y", dist.Poisson(rate), obs=torch.tensor(3.0))
    >>> guide = pf.AutoFlow(model)
    >>> fit = pf.fit_svi(guide, budget=0, seed=0)
    >>> rows = pf.from_arviz(pf.to_arviz(guide, num_samples=200, seed=0), ["rate"])
    >>> flow = pf.NSF(1, support=torch.distributions.constraints.positive)
    >>> fit = pf.fit_mle(flow, rows, steps=20, seed=0)
    >>> flow().sample((3,)).shape
    torch.Size([3, 1])
    """
    draws = getattr(idata, group, None)
    if draws is None:
        raise DataError(
            f"idata: expected an ArviZ object with the group {group!r}, got {idata!r:.80}"
        )
    known = [str(name) for name in draws.data_vars]
    chosen = known if sites is None else list(sites)
    columns = []
    for name in chosen:
        if name not in known:
            raise DataError(f"sites: {group} has no {name!r}; it has {', '.join(known)}")
        values = np.asarray(draws[name].transpose("chain", "draw", ...).values)
        if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
            raise DataError(f"site {name!r}: expected finite numbers, got {values.dtype} or NaN")
        columns.append(values.reshape(values.shape[0] * values.shape[1], -1))
    if not columns:
        raise DataError(f"sites: expected at least one of {', '.join(known)}, got none")
    return torch.as_tensor(np.concatenate(columns, -1), dtype=torch.get_default_dtype())
