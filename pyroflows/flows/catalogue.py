"""Which flows there are, what each costs, and when to take it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pyroflows.flows.autoregressive import IAF, MAF
from pyroflows.flows.block import BNAF
from pyroflows.flows.circular import NCSF
from pyroflows.flows.continuous import CNF
from pyroflows.flows.coupling import NICE, NSF, RealNVP
from pyroflows.flows.flow import Flow
from pyroflows.flows.flowpp import FlowPP
from pyroflows.flows.gaussianization import GF
from pyroflows.flows.neural import NAF, UNAF
from pyroflows.flows.planar import Planar, Radial, Sylvester
from pyroflows.flows.polynomial import BPF, SOSPF
from pyroflows.flows.residual import ResidualFlow
from pyroflows.flows.transformer import TransformerAR


@dataclass(frozen=True)
class FlowInfo:
    """What a user needs to choose a flow.

    Attributes
    ----------
    recipe
        The class.
    title
        Its name in full.
    formula
        One layer, in LaTeX.
    density, sampling
        Cost of one layer in either direction, in network passes, by default.
    expressive
        What it can represent.
    use
        When to take it.
    paper
        Authors and year.
    """

    recipe: type[Flow]
    title: str
    formula: str
    density: str
    sampling: str
    expressive: str
    use: str
    paper: str

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.__name__


_STEPS = "1, in as many steps as features"
_ROOTS = "1, in as many steps as features, and a root for each"

CATALOGUE: tuple[FlowInfo, ...] = (
    FlowInfo(
        NSF,
        "Neural spline flow",
        r"y_B = \mathrm{spline}(x_B;\, \theta(x_A))",
        "1",
        f"1 (autoregressive: {_STEPS})",
        "sharp edges, gaps and many modes with few layers",
        "the first to try for densities of up to some dozens of features",
        "Durkan et al. 2019",
    ),
    FlowInfo(
        MAF,
        "Masked autoregressive flow",
        r"x_i = (y_i - t(y_{<i}))\, e^{-s(y_{<i})}",
        "1",
        _STEPS,
        "smooth dependence on all earlier features; each conditional a normal",
        "densities that are scored more often than drawn from",
        "Papamakarios et al. 2017",
    ),
    FlowInfo(
        RealNVP,
        "Real-valued non-volume preserving flow",
        r"y_B = x_B\, e^{s(x_A)} + t(x_A)",
        "1",
        "1",
        "as MAF, with more layers",
        "guides, and hundreds of features: both directions are cheap and stable",
        "Dinh et al. 2017",
    ),
    FlowInfo(
        IAF,
        "Inverse autoregressive flow",
        r"y_i = x_i\, e^{s(x_{<i})} + t(x_{<i})",
        _STEPS,
        "1",
        "as MAF",
        "guides whose own draws are all that is scored",
        "Kingma et al. 2016",
    ),
    FlowInfo(
        NICE,
        "Non-linear independent components estimation",
        r"y_B = x_B + t(x_A)",
        "1",
        "1",
        "preserves volume: bends, and cannot stretch",
        "where volume must be kept",
        "Dinh et al. 2015",
    ),
    FlowInfo(
        NCSF,
        "Neural circular spline flow",
        r"y_B = \mathrm{spline}_{\circ}(x_B + \varphi;\, \theta(\cos x_A, \sin x_A))",
        "1",
        "1",
        "any smooth density on the torus",
        "angles",
        "Rezende et al. 2020",
    ),
    FlowInfo(
        NAF,
        "Neural autoregressive flow",
        r"x_i = \sigma^{-1}\big(\textstyle\sum_k w_k\, \sigma(a_k y_i + b_k)\big)",
        "1",
        _ROOTS,
        "every density, with enough units",
        "densities with several modes in each conditional, scored more than drawn",
        "Huang et al. 2018",
    ),
    FlowInfo(
        UNAF,
        "Unconstrained neural autoregressive flow",
        r"x_i = \beta + \int_0^{y_i} e^{g(t;\, \theta(y_{<i}))}\, \mathrm{d}t",
        "1, and a quadrature for each feature",
        _ROOTS,
        "every density, with enough units",
        "smooth densities; as NAF",
        "Wehenkel and Louppe 2019",
    ),
    FlowInfo(
        BNAF,
        "Block neural autoregressive flow",
        r"x_i = \mathrm{net}_i(y_{\le i}), \quad \partial x_i / \partial y_i > 0",
        "1, as wide as all features together",
        _ROOTS,
        "every density, with enough units",
        "few features: the network itself is the map",
        "De Cao et al. 2019",
    ),
    FlowInfo(
        SOSPF,
        "Sum-of-squares polynomial flow",
        r"x_i = \beta + \int_0^{y_i} \textstyle\sum_k p_k(t;\, \theta(y_{<i}))^2\, \mathrm{d}t",
        "1",
        _ROOTS,
        "smooth densities, by degree",
        "smooth densities without gaps",
        "Jaini et al. 2019",
    ),
    FlowInfo(
        BPF,
        "Bernstein polynomial flow",
        r"x_i = \textstyle\sum_k \alpha_k(y_{<i})\, B_k(y_i), \quad \alpha_0 < \alpha_1 < \dots",
        "1",
        _ROOTS,
        "smooth densities, by degree",
        "smooth densities without gaps; robust",
        "Ramasinghe et al. 2021",
    ),
    FlowInfo(
        FlowPP,
        "Flow++",
        r"x_B = \sigma^{-1}\big(\textstyle\sum_k \pi_k\, \sigma((y_B - \mu_k) / s_k)\big)",
        "1",
        "1, and a root for each feature",
        "several modes in each conditional, from couplings",
        "as NSF, with straight tails",
        "Ho et al. 2019",
    ),
    FlowInfo(
        GF,
        "Gaussianization flow",
        r"x = R\, \Psi(y), \quad \Psi_i = \sigma^{-1} \circ F_i",
        "none: elementwise maps and a rotation",
        "none, and a root for each feature",
        "every density, with very many layers",
        "marginals far from normal, from which it starts; needs many rows",
        "Meng et al. 2020",
    ),
    FlowInfo(
        Planar,
        "Planar flow",
        r"x = y + u\, \tanh(w^\top y + b)",
        "none: two products of vectors",
        "none, and one root",
        "one bend for each layer",
        "a small step beyond a Gaussian guide, `one_pass='forward'`",
        "Rezende and Mohamed 2015",
    ),
    FlowInfo(
        Radial,
        "Radial flow",
        r"x = y + \frac{\beta}{\alpha + |y - c|} (y - c)",
        "none: a distance",
        "none: a distance",
        "one bump or hole for each layer",
        "as Planar",
        "Rezende and Mohamed 2015",
    ),
    FlowInfo(
        Sylvester,
        "Sylvester flow",
        r"x = y + Q R\, \tanh(\tilde R\, Q^\top y + b)",
        "none: two thin matrix products",
        "none, and a root for each direction",
        "as many bends for each layer as its rank",
        "amortised guides, `one_pass='forward'`",
        "van den Berg et al. 2018",
    ),
    FlowInfo(
        ResidualFlow,
        "Residual flow",
        r"x = y + g(y), \quad \mathrm{Lip}(g) < 1",
        "1, and a derivative for each feature (many features: some 18)",
        "some 10, each with a Jacobian",
        "all features at once; no more than twice the slope for each layer",
        "smooth densities whose features have no order",
        "Chen et al. 2019",
    ),
    FlowInfo(
        CNF,
        "Continuous normalizing flow",
        r"\dot x = v(t, x)",
        "tens, each with a derivative for each feature (or one)",
        "tens",
        "every density that a smooth motion reaches",
        "flow matching: no determinant is needed to train",
        "Chen et al. 2018, Grathwohl et al. 2019, Lipman et al. 2023",
    ),
    FlowInfo(
        TransformerAR,
        "Transformer autoregressive flow",
        r"x_i = (y_i - t_i)\, e^{-s_i}, \quad (s, t)_i = \mathrm{transformer}(y_{<i})",
        "1 of a transformer",
        _STEPS,
        "as MAF; parameters do not grow with the square of the features",
        "hundreds of features",
        "Zhai et al. 2025, Patacchiola et al. 2024",
    ),
)


def list_flows() -> tuple[str, ...]:
    """Names of all flows, for `get_flow`.

    Examples
    --------
    >>> "NSF" in pf.list_flows()
    True
    """
    return tuple(info.name for info in CATALOGUE)


def get_flow(name: str) -> type[Flow]:
    """The recipe of that name, whatever its case.

    Raises
    ------
    ValueError
        For an unknown name; the message lists the near ones.

    Examples
    --------
    >>> pf.get_flow("realnvp")(features=2).event_shape
    torch.Size([2])
    """
    recipes = {info.name.lower(): info.recipe for info in CATALOGUE}
    if name.lower() in recipes:
        return recipes[name.lower()]
    near = difflib.get_close_matches(name.lower(), recipes, n=3, cutoff=0.4)
    names = [recipes[match].__name__ for match in near]
    hint = (
        f"Did you mean {' or '.join(names)}?" if names else f"There are {', '.join(list_flows())}."
    )
    raise ValueError(f"name: expected the name of a flow, got {name!r}. {hint}")
