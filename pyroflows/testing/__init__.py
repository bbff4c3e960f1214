"""Property checks for people who write transforms, layers and flows; our own suite runs them too.

A *module* is a layer or a flow: ``module(context)`` gives a transform or a distribution. Its checks
take values ``(N, *event)`` and contexts ``(N, context)`` or None. A check that fails raises
`CheckError`, which reports shapes, the largest error, where it is, and how many NaNs there were.

`two_dimensional` draws from densities that flows are tried on.

Examples
--------
>>> import torch
>>> from pyroflows.layers import LULinear
>>> layer, x = LULinear(3).double(), torch.randn(5, 3, dtype=torch.float64)
>>> redraw_(layer, scale=0.3)
>>> check_round_trip(layer(), x)
>>> check_jacobian(layer(), x)
>>> check_batching(layer, x)
"""

from pyroflows.testing.modules import (
    check_batching,
    check_context,
    check_copies,
    check_defaults,
    check_dtype,
    check_every_parameter,
    check_gradients,
    check_mass,
    check_meta,
    check_nan,
    check_state,
    check_tails,
    check_vmap_grad,
)
from pyroflows.testing.samples import SAMPLERS, two_dimensional
from pyroflows.testing.tools import CheckError, check_close, jacobian, log_density, redraw_
from pyroflows.testing.transforms import check_fused, check_jacobian, check_round_trip

__all__ = [
    "SAMPLERS",
    "CheckError",
    "check_batching",
    "check_close",
    "check_context",
    "check_copies",
    "check_defaults",
    "check_dtype",
    "check_every_parameter",
    "check_fused",
    "check_gradients",
    "check_jacobian",
    "check_mass",
    "check_meta",
    "check_nan",
    "check_round_trip",
    "check_state",
    "check_tails",
    "check_vmap_grad",
    "jacobian",
    "log_density",
    "redraw_",
    "two_dimensional",
]
