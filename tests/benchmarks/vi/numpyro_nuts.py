"""NumPyro's NUTS on the twelve posteriors of posteriordb; runs under an interpreter of its own.

``python numpyro_nuts.py NAME SEED WARM_UP DRAWS FILE`` reads the model's arguments from FILE, an
npz archive, and replaces it by the draws of every site, the CPU seconds, compilation included, and
the number of gradients. The models are those of `tests.benchmarks.vi.models`, word by word.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS


def flat(size: int) -> Any:
    return dist.ImproperUniform(constraints.real_vector, (), (size,))


def flat_positive() -> Any:
    return dist.ImproperUniform(constraints.positive, (), ())


def ar(lags: Any, y: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def regression(beta_prior: Callable[[int], Any], sigma_prior: Callable[[], Any]) -> Any:
    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", beta_prior(x.shape[1]))
        sigma = numpyro.sample("sigma", sigma_prior())
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    return model


def schools_centered(errors: Any, y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, errors), obs=y)


def schools_noncentered(errors: Any, y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * theta_trans, errors), obs=y)


def gp_poisson(x: Any, k: Any) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = numpyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-0.5 * distance**2) + 1e-10 * jnp.eye(len(x))
    f = jnp.linalg.cholesky(covariance) @ f_tilde
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


def hmm(y: Any) -> None:
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    numpyro.factor("prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    log_theta = jnp.log(jnp.stack([theta1, theta2]))
    output = dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(forward: Any, out: Any) -> tuple[Any, None]:
        return jax.nn.logsumexp(forward[:, None] + log_theta, 0) + out, None

    forward, _ = jax.lax.scan(step, output[0], output[1:])
    numpyro.factor("y", jax.nn.logsumexp(forward))


def gauss_mix(y: Any) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    share = dist.Categorical(jnp.stack([theta, 1 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(mu, sigma)), obs=y)


def wide(size: int) -> Any:
    return dist.Normal(0.0, 10.0).expand([size]).to_event(1)


MODELS: dict[str, Any] = {
    "arK": ar,
    "earn_height": regression(flat, flat_positive),
    "eight_schools_centered": schools_centered,
    "eight_schools_noncentered": schools_noncentered,
    "gp_pois_regr": gp_poisson,
    "hmm_example": hmm,
    "kidscore_interaction": regression(flat, lambda: dist.HalfCauchy(2.5)),
    "kidscore_momiq": regression(flat, lambda: dist.HalfCauchy(2.5)),
    "low_dim_gauss_mix": gauss_mix,
    "logmesquite": regression(flat, flat_positive),
    "nes": regression(flat, flat_positive),
    "blr": regression(wide, lambda: dist.HalfNormal(10.0)),
}


def main() -> None:
    name, seed, warm_up, draws, path = sys.argv[1:]
    numpyro.enable_x64()
    args = np.load(path)
    arrays = [jnp.asarray(args[key]) for key in args.files]
    start = time.process_time()
    mcmc = MCMC(
        NUTS(MODELS[name]), num_warmup=int(warm_up), num_samples=int(draws), progress_bar=False
    )
    key = jax.random.PRNGKey(int(seed))
    mcmc.warmup(key, *arrays, extra_fields=("num_steps",), collect_warmup=True)
    gradients = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(mcmc.post_warmup_state.rng_key, *arrays, extra_fields=("num_steps",))
    gradients += int(mcmc.get_extra_fields()["num_steps"].sum())
    samples = {site: np.asarray(value) for site, value in mcmc.get_samples().items()}
    seconds = time.process_time() - start
    np.savez(path, _seconds=seconds, _gradients=gradients, **samples)


if __name__ == "__main__":
    main()
