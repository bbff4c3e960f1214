"""The flow that AutoFlow takes when none is given."""

from __future__ import annotations

from pyroflows.flows import NSF, Flow, RealNVP


def default_flow(features: int) -> Flow:
    """The flow that `AutoFlow` takes when none is given: one pass in either direction.

    Six affine couplings with learned dense affine maps between them and last; in one dimension,
    where a coupling has nothing to condition on, splines. Beyond 500 dimensions the dense maps,
    quadratic in the dimension, are left out.
    """
    if features == 1:
        return NSF(1, transforms=2, bins=16)
    dense = features <= 500
    return RealNVP(
        features,
        transforms=6,
        hidden_features=(32, 32),
        max_log_scale=1.0,
        mixing="lu" if dense else None,
        act_norm=not dense,
    )
