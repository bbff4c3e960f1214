"""Whether the steps of a fit are looked at one by one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Watch:
    """What loop, loss and compiled step of one fit know of each other.

    Attributes
    ----------
    on
        Whether to look at every step for draws without a density and infinite gradients, so that
        nothing of it is lost. A GPU has to be waited for then: there it is off until losses, which
        are read many at a time, tell of a step that was left out.
    """

    on: bool = True
