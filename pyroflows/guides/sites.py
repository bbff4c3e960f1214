"""The latent sites of a model, as a guide over all of them needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.util import detach
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.errors import LocalLatentError


def is_enumerated(site: Any) -> bool:
    """Whether the site is discrete and summed out."""
    return site["infer"].get("enumerate") == "parallel"


def init_anywhere(site: dict[str, Any], init_loc_fn: Callable[..., Tensor]) -> Tensor:
    """The start value of a site, also where it has none: enumerated, or ImproperUniform."""
    if is_enumerated(site):
        return site["fn"].sample()
    try:
        return init_loc_fn(site)
    except NotImplementedError:
        fn = site["fn"]
        to_support = biject_to(fn.support)
        shape = to_support.inverse_shape(fn.shape())
        return to_support(torch.zeros(shape))


def forget_data(trace: Any) -> None:
    """Keep the latent sites only, without their graph: a guide is copied and pickled."""
    trace.nodes["_INPUT"].update(args=(), kwargs={})
    trace.nodes["_RETURN"]["value"] = None
    for _, site in trace.iter_stochastic_nodes():
        site["fn"], site["value"] = detach(site["fn"]), site["value"].detach()


def check_latent(name: str, site: Any) -> None:
    """Raise unless one flow over all latents can represent the site."""
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.full_size != frame.size:
            raise LocalLatentError(
                f"site {name!r} is local to the subsampled plate {frame.name!r} ({frame.size} of "
                f"{frame.full_size}): one flow over the minibatch's latents would be shared by all "
                "minibatches. Use the full plate, or give the local latents an amortised guide."
            )
