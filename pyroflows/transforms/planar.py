"""Planar, radial and Sylvester maps: the identity plus a change of low rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.numerics import bounded_exp, increasing_root
from pyroflows.transforms.base import Transform

#: Largest contraction: no slope falls below ``1 - CONTRACTION``.
CONTRACTION = 0.998
#: Bound of the logarithm of a radial map's radius.
MAX_LOG_RADIUS = 5.0


class PlanarTransform(Transform):
    r"""Planar map: the space moves along one direction, by an amount that depends on another.

    .. math::

        y = x + \hat u \tanh(a), \qquad a = w^\top x + b, \qquad
        \log|\det J| = \log(1 + w^\top \hat u\, \operatorname{sech}^2 a)

    :math:`\hat u = 2\,\sigma(t)\, u` with :math:`\sinh t = w^\top u / c` has the direction of
    :math:`u`, and :math:`w^\top \hat u = c\,(e^t - 1)`, which exceeds :math:`-c` smoothly for all
    parameters: the map is invertible, and its slope is nowhere below :math:`1 - c = 0.002`. Forward
    is closed-form; the inverse solves one scalar equation, :math:`a + w^\top \hat u \tanh a =
    w^\top y + b`.

    Parameters
    ----------
    weight, scale
        The vectors :math:`w` and :math:`u`, shape ``(*batch, features)``.
    bias
        The number :math:`b`, shape ``(*batch,)``.

    References
    ----------
    Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Examples
    --------
    >>> planar = PlanarTransform(torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor(0.0))
    >>> planar.inv(planar(torch.tensor([0.5, -1.0])))
    tensor([ 0.5000, -1.0000])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    sequential_inverse = True

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale
        self.bias = bias

    def _constrained(self) -> tuple[Tensor, Tensor]:
        """The vector of the shift, and its product with the weight."""
        factor, slope = shortened((self.weight * self.scale).sum(-1))
        return factor.unsqueeze(-1) * self.scale, slope

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, slope = self._constrained()
        a = (self.weight * x).sum(-1) + self.bias
        return x + scale * a.tanh().unsqueeze(-1), _plus_tanh(a, slope)[1]

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        scale, slope = self._constrained()
        target = (self.weight * y).sum(-1) + self.bias
        a, ladj = increasing_root(lambda a: _plus_tanh(a, slope), target)
        return y - scale * a.tanh().unsqueeze(-1), ladj


class RadialTransform(Transform):
    r"""Radial map: the space moves away from a centre, or towards it.

    .. math::

        y = x + \frac{\beta}{\alpha + r}\,(x - x_0), \qquad r = |x - x_0|

    .. math::

        \log|\det J| = (D - 1) \log\Bigl(1 + \frac{\beta}{\alpha + r}\Bigr)
        + \log\Bigl(1 + \frac{\alpha \beta}{(\alpha + r)^2}\Bigr)

    :math:`\alpha > 0` and :math:`\beta > -0.998\,\alpha` hold smoothly for all parameters. Both
    directions are closed-form: the radius before the map is the root of a quadratic. The
    log-determinant has a kink at the centre; its gradient there is given as zero.

    Parameters
    ----------
    center
        :math:`x_0`, shape ``(*batch, features)``.
    log_radius
        Logarithm of :math:`\alpha`, softly bounded by 5, shape ``(*batch,)``.
    strength
        Raw :math:`\beta / \alpha`, shape ``(*batch,)``: 0 is the identity.

    References
    ----------
    Rezende and Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Examples
    --------
    >>> radial = RadialTransform(torch.zeros(2), torch.tensor(0.0), torch.tensor(2.0))
    >>> radial.inv(radial(torch.tensor([0.5, -1.0])))
    tensor([ 0.5000, -1.0000])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, center: Tensor, log_radius: Tensor, strength: Tensor) -> None:
        super().__init__()
        self.center = center
        self.log_radius = log_radius
        self.strength = strength

    def _constrained(self) -> tuple[Tensor, Tensor]:
        """The radius and strength of the map."""
        alpha = bounded_exp(self.log_radius, MAX_LOG_RADIUS)
        return alpha, alpha * shortened(self.strength)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self._constrained()
        offset = x - self.center
        growth, ladj = _radial(_length(offset), alpha, beta, x.shape[-1])
        return x + growth.unsqueeze(-1) * offset, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self._constrained()
        offset = y - self.center
        length = _length(offset)
        # r^2 + p r - alpha length = 0; the larger of the roots' sizes comes without cancellation.
        p = alpha + beta - length
        outward = p < 0
        larger = (torch.where(outward, -p, p) + (p.square() + 4 * alpha * length).sqrt()) / 2
        radius = torch.where(outward, larger, alpha * length / larger)
        growth, ladj = _radial(radius, alpha, beta, y.shape[-1])
        return y - (growth / (1 + growth)).unsqueeze(-1) * offset, -ladj


class SylvesterTransform(Transform):
    r"""Sylvester map: a planar map of several directions at once.

    .. math::

        y = x + Q R \tanh(v), \qquad v = \tilde R Q^\top x + b, \qquad
        \log|\det J| = \sum_i \log(1 + \tilde R_{ii} R_{ii} \operatorname{sech}^2 v_i)

    :math:`R` and :math:`\tilde R` are upper triangular. The columns of :math:`Q`, a product of
    Householder reflections, are orthonormal for all parameters, and :math:`\tilde R_{ii} R_{ii} >
    -0.998` holds as in `PlanarTransform`. Forward is closed-form; the inverse solves one scalar
    equation for each direction, from the last to the first: :math:`v + \tilde R R \tanh v =
    \tilde R Q^\top y + b` is triangular.

    Parameters
    ----------
    vectors
        Of the reflections, shape ``(*batch, rank, features)``, no more rows than columns; the
        diagonal is not read.
    outer, inner
        Raw :math:`R` and :math:`\tilde R`, shape ``(*batch, rank, rank)``; only the upper triangles
        are read.
    bias
        :math:`b`, shape ``(*batch, rank)``.

    References
    ----------
    van den Berg, Hasenclever, Tomczak and Welling, "Sylvester normalizing flows for variational
    inference", UAI 2018.

    Examples
    --------
    >>> vectors, ones = torch.zeros(2, 3), torch.ones(2, 2)
    >>> sylvester = SylvesterTransform(vectors, ones, ones, torch.zeros(2))
    >>> sylvester.inv(sylvester(torch.tensor([1.0, -2.0, 3.0])))
    tensor([ 1., -2.,  3.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    sequential_inverse = True

    def __init__(self, vectors: Tensor, outer: Tensor, inner: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.vectors = vectors
        self.outer = outer
        self.inner = inner
        self.bias = bias

    def _constrained(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The maps into and out of the hidden space, their product, and its diagonal."""
        frame = orthonormal_columns(self.vectors)
        inner = self.inner.triu()
        factor, slopes = shortened(self._diagonal(self.inner) * self._diagonal(self.outer))
        outer = self.outer.triu(1) + torch.diag_embed(factor * self._diagonal(self.outer))
        return inner @ frame.mT, frame @ outer, inner @ outer, slopes

    @staticmethod
    def _diagonal(matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        into, out, _, slopes = self._constrained()
        v = _applied(into, x) + self.bias
        return x + _applied(out, v.tanh()), _plus_tanh(v, slopes)[1].sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        into, out, product, slopes = self._constrained()
        target = _applied(into, y) + self.bias
        ladj = torch.zeros_like(target[..., 0])
        tanh: list[Tensor] = []
        for i in reversed(range(target.shape[-1])):
            rest = target[..., i]
            if tanh:
                rest = rest - (product[..., i, i + 1 :] * torch.stack(tanh, -1)).sum(-1)
            slope = slopes[..., i]
            v, part = increasing_root(partial(_plus_tanh, slope=slope), rest)
            tanh.insert(0, v.tanh())
            ladj = ladj + part
        return y - _applied(out, torch.stack(tanh, -1)), ladj


class ConditionalTransform(Transform):
    """A vector map built from raw parameters, which are learned or depend on a context.

    Parameters
    ----------
    build
        From raw parameters ``(*batch, count)`` to a transform of a vector.
    params
        The raw parameters, ``(count,)``, or a conditioner that gives ``(1, *batch, count)``: it is
        called with a vector of no features, ``(*batch, 0)``, and so depends on its context alone.
    sequential_inverse
        Whether the inverse of what is built goes step by step.

    Examples
    --------
    >>> from pyroflows.transforms import DiagonalAffineTransform
    >>> scaled = ConditionalTransform(lambda p: DiagonalAffineTransform(0 * p, p), torch.zeros(2))
    >>> scaled(torch.ones(2))
    tensor([1., 1.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        build: Callable[[Tensor], Transform],
        params: Tensor | Callable[[Tensor], Tensor],
        *,
        sequential_inverse: bool = False,
    ) -> None:
        super().__init__()
        self.build = build
        self.params = params
        self.sequential_inverse = sequential_inverse

    def _built(self, value: Tensor) -> Transform:
        params = self.params
        return self.build(params if isinstance(params, Tensor) else params(value[..., :0])[0])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._built(x).call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._built(y).inverse_and_ladj(y)


def shortened(product: Tensor) -> tuple[Tensor, Tensor]:
    r"""A factor that brings a product above ``-CONTRACTION``, and the product times the factor.

    .. math:: 2\,\sigma(t) \quad\text{and}\quad c\,(e^t - 1), \qquad t = \sinh^{-1}(p / c)

    Both are smooth and increasing; the factor is 1 at 0, and twice the product at most comes out.
    """
    t = (product / CONTRACTION).asinh()
    return 2 * t.sigmoid(), CONTRACTION * t.expm1()


def orthonormal_columns(vectors: Tensor) -> Tensor:
    """The first columns of a product of Householder reflections, up to their signs.

    From ``(*batch, rank, features)`` to ``(*batch, features, rank)``. Each vector has a one on the
    diagonal, so that none vanishes; vectors of zeros give the columns of the identity matrix.
    """
    eye = torch.ones_like(vectors).tril().triu()
    unit = vectors * (1 - eye) + eye
    unit = unit / unit.norm(dim=-1, keepdim=True)
    # H_1 ... H_k = I - V' S^-1 V; see `pyroflows.transforms.HouseholderTransform`.
    rank = vectors.shape[-2]
    triangle = (unit @ unit.mT).triu(1) + eye[..., :rank] / 2
    return unit.mT @ torch.linalg.solve_triangular(triangle, unit @ eye.mT, upper=True) - eye.mT


def _plus_tanh(a: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The increasing function ``a + slope * tanh(a)``, and the logarithm of its slope."""
    tanh = a.tanh()
    return a + slope * tanh, (slope * (1 - tanh.square())).log1p()


def _applied(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _length(offset: Tensor) -> Tensor:
    """Euclidean norm, with derivatives of zero (and not NaN) where it is zero."""
    squared = offset.square().sum(-1)
    zero = squared == 0
    return torch.where(zero, squared, torch.where(zero, 1.0, squared).sqrt())


def _radial(radius: Tensor, alpha: Tensor, beta: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Relative growth of an offset of this length, and the log-determinant."""
    growth = beta / (alpha + radius)
    around, along = growth.log1p(), (growth * alpha / (alpha + radius)).log1p()
    return growth, (features - 1) * around + along
