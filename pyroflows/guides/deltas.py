"""Delta sites of a guide with a Kullback-Leibler divergence that keeps their log density."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.distributions.distribution import Distribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import register_kl


class LatentDelta(dist.Delta):
    """A site of a guide: all mass at a value, with the log-Jacobian of its constraint as density.

    Pyro's own divergence of a Delta drops that density, and with it the objective of
    ``TraceMeanField_ELBO`` is wrong on constrained sites.
    """


# Pyro's own class of distributions, as in its rule for Delta: with torch's the two are ambiguous.
@register_kl(LatentDelta, Distribution)  # type: ignore[untyped-decorator]
def _kl(p: LatentDelta, q: Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)


class LatentDeltas(Messenger):
    """Turns the Delta sites of an autoguide into `LatentDelta`."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta:
            msg["fn"] = LatentDelta(fn.v, fn.log_density, event_dim=fn.event_dim)
