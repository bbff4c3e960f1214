"""flowjax under an interpreter of its own: builds and times what it is told, a line at a time.

Reads ``{"build": {...}}`` and ``{"time": repeats}`` from its standard input and answers each with a
line of JSON. Imports neither torch nor the rest of the benchmark, which are not there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import paramax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import StandardNormal
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from jax.scipy.stats import cauchy, norm

Parts = tuple[Any, Any]
Run = Callable[[], Any]


def build(spec: dict[str, Any]) -> Parts:
    """The flow, divided into its trainable arrays and the rest."""
    recipe = coupling_flow if spec["kind"] == "coupling" else masked_autoregressive_flow
    # Of its inner knots there is one less than bins.
    spline = RationalQuadraticSpline(knots=spec["bins"] - 1, interval=spec["bound"])
    flow = recipe(
        jr.key(0),
        base_dist=StandardNormal((spec["features"],)),
        transformer=spline if spec["spline"] else None,
        flow_layers=spec["layers"],
        nn_width=spec["hidden"],
        nn_depth=2,
        invert=spec["kind"] != "guide",
    )
    return eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )


def likelihood(flow: Any, key: Any, x: Any) -> Any:
    return -flow.log_prob(x).mean()


def to_normal(number: int) -> Callable[..., Any]:
    def loss(flow: Any, key: Any) -> Any:
        x, log_q = flow.sample_and_log_prob(key, (number,))
        return (log_q + 0.5 * jnp.square(x).sum(-1)).mean()

    return loss


def to_schools(number: int) -> Callable[..., Any]:
    y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def log_joint(u: Any) -> Any:
        mu, log_tau, z = u[0], u[1], u[2:]
        tau = jnp.exp(log_tau)
        prior = norm.logpdf(mu, 0.0, 5.0) + cauchy.logpdf(tau, 0.0, 5.0) + jnp.log(2.0) + log_tau
        return prior + norm.logpdf(z).sum() + norm.logpdf(y, mu + tau * z, sigma).sum()

    def loss(flow: Any, key: Any) -> Any:
        u, log_q = flow.sample_and_log_prob(key, (number,))
        return (log_q - jax.vmap(log_joint)(u)).mean()

    return loss


class Session:
    """One flow and what is timed of it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.parameters, self.static = build(spec)
        self.key = jr.key(1)
        start = time.perf_counter()
        if spec["trained"]:
            step = self.steps(likelihood, correlated(256, spec["features"]))
            for _ in range(150):
                step()
        number, shape = spec["number"], (spec["number"], spec["features"])
        self.gap = self.round_trip()
        self.run: Run = {
            "score": lambda: self.scores(jr.normal(jr.key(2), shape)),
            "step": lambda: self.steps(likelihood, jr.normal(jr.key(2), shape)),
            "sample": lambda: self.samples(number),
            "guide": lambda: self.gradients(to_normal(number)),
            "guide step": lambda: self.steps(to_normal(number)),
            "schools fit": lambda: self.steps(to_schools(number)),
        }[spec["work"]]()
        jax.block_until_ready(self.run())
        self.seconds = time.perf_counter() - start

    def flow(self, parameters: Any) -> Any:
        return eqx.combine(parameters, self.static)

    def next_key(self) -> Any:
        self.key, key = jr.split(self.key)
        return key

    def round_trip(self) -> float:
        flow = self.flow(self.parameters)
        x, score = flow.sample_and_log_prob(jr.key(3), (64,))
        again = flow.log_prob(x)
        return float((jnp.abs(again - score) / (1 + 0.02 * jnp.abs(score))).max())

    def scores(self, x: Any) -> Run:
        score = jax.jit(lambda parameters: self.flow(parameters).log_prob(x))
        return lambda: score(self.parameters)

    def samples(self, number: int) -> Run:
        @jax.jit
        def sample(parameters: Any, key: Any) -> Any:
            return self.flow(parameters).sample(key, (number,))

        return lambda: sample(self.parameters, self.next_key())

    def gradients(self, loss: Callable[..., Any]) -> Run:
        @jax.jit
        def gradient(parameters: Any, key: Any) -> Any:
            own, key = jr.split(key)
            return jax.grad(lambda p: loss(self.flow(p), own))(parameters), key

        def run() -> Any:
            made, self.key = gradient(self.parameters, self.key)
            return made

        return run

    def steps(self, loss: Callable[..., Any], *batch: Any) -> Run:
        optimizer = optax.adam(1e-3)
        state = optimizer.init(self.parameters)

        @jax.jit
        def update(parameters: Any, state: Any, key: Any, *batch: Any) -> Any:
            own, key = jr.split(key)
            value, gradient = jax.value_and_grad(lambda p: loss(self.flow(p), own, *batch))(
                parameters
            )
            change, state = optimizer.update(gradient, state)
            return optax.apply_updates(parameters, change), state, key, value

        def step() -> Any:
            nonlocal state
            self.parameters, state, self.key, value = update(
                self.parameters, state, self.key, *batch
            )
            return value

        return step

    def time(self, repeats: int) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(self.run())
        return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def correlated(rows: int, features: int) -> Any:
    """As the other packages are trained on."""
    mixing = jr.normal(jr.key(4), (features, features)) / features**0.5
    x = jr.normal(jr.key(5), (rows, features)) @ mixing
    x = x + 0.3 * jnp.roll(x, 1, -1) ** 2
    return (x - x.mean(0)) / x.std(0)


def main() -> None:
    session: Session | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "build" in asked:
            session = Session(asked["build"])
            size = sum(leaf.size for leaf in jax.tree.leaves(session.parameters))
            answer: Any = {"parameters": size, "gap": session.gap, "seconds": session.seconds}
        elif session is not None:
            answer = session.time(asked["time"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
