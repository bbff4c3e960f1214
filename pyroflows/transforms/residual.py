"""Residual maps: the identity plus a contraction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics import batched_vjp, contraction_root, log_abs_det, value_and_jacobian
from pyroflows.transforms.base import Transform

LogDet = Literal["exact", "unbiased"]
#: Terms of the series that are always there.
SURE_TERMS = 2


class ResidualTransform(Transform):
    r"""Residual map, :math:`y = x + g(x)` with a contraction :math:`g`.

    Forward is closed-form; the inverse is found by `pyroflows.numerics.contraction_root`, to the
    rounding of the dtype. Values cost one evaluation of the function forwards. The log-determinant
    costs one vector-Jacobian product for each feature (``"exact"``), or is a random, unbiased
    estimate (``"unbiased"``), with a probe :math:`\varepsilon` and a number :math:`n` of terms that
    are drawn:

    .. math::

        \log|\det J| = \mathrm E \sum_{k=1}^{n} \frac{(-1)^{k+1}}{k\, P(n \ge k)}
        \varepsilon^\top \Bigl(\frac{\partial g}{\partial x}\Bigr)^{\!k} \varepsilon

    :math:`n` has as light a tail as a finite variance allows, :math:`P(n \ge k + 2) = L^{2k}` for
    the Lipschitz constant :math:`L`; with 0.97 there are 18 products in the mean.

    Parameters
    ----------
    function
        The contraction, from ``(*batch, features)`` to the same shape.
    lipschitz
        A Lipschitz constant of it, below 1.
    log_det
        ``"exact"`` or ``"unbiased"``; with the latter, densities are estimates in nats.

    Raises
    ------
    InversionError
        Where the inverse is not found to the tolerance.

    References
    ----------
    Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML 2019;
    Chen, Behrmann, Duvenaud and Jacobsen, "Residual flows for invertible generative modeling",
    NeurIPS 2019.

    Examples
    --------
    >>> residual = ResidualTransform(lambda x: 0.5 * x.sin(), lipschitz=0.5)
    >>> residual.inv(residual(torch.tensor([1.0, 2.0])))
    tensor([1., 2.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    sequential_inverse = True

    def __init__(
        self, function: Callable[[Tensor], Tensor], lipschitz: float, log_det: LogDet = "exact"
    ) -> None:
        super().__init__()
        self.function = function
        self.lipschitz = lipschitz
        self.log_det = log_det

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, ladj = self._value_and_ladj(x)
        return x + value, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self._inverse(y)
        return x, -self._value_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return x + self.function(x)

    def _inverse(self, y: Tensor) -> Tensor:
        root: Tensor = contraction_root(self.function, y, self.lipschitz)
        return root

    def _value_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._exact(x) if self.log_det == "exact" else self._unbiased(x)

    def _exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, matrix = value_and_jacobian(self.function, x)
        eye = torch.ones_like(value).diag_embed()
        return value, log_abs_det(eye + matrix)

    def _unbiased(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, vjp = batched_vjp(self.function, x)
        survival = self.lipschitz**2
        # Inversion of a geometric distribution; the CPU, so that the device need not answer.
        uniform = torch.rand((), dtype=torch.float64, device="cpu").item()
        extra = int(math.log(1 - uniform) / math.log(survival))
        probe = torch.randn_like(value).sign()
        ladj, product, sign = torch.zeros_like(value[..., 0]), probe, 1.0
        for k in range(1, SURE_TERMS + extra + 1):
            (product,) = vjp(product)
            weight = sign / (k * survival ** max(0, k - SURE_TERMS))
            ladj = ladj + weight * (product * probe).sum(-1)
            sign = -sign
        return value, ladj
