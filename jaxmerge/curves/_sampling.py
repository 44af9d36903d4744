"""Drawing the position t on a curve or simplex, one a step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmerge import training

#: Positions in every run of this many draws fall into different strata.
STRATA = 16

Sampler = Callable[[jax.Array, jax.Array], jax.Array]


def uniform(key: jax.Array, draw: jax.Array) -> jax.Array:
  """t ~ U(0, 1), independent at every draw."""
  return jax.random.uniform(jax.random.fold_in(key, draw))


def stratified(key: jax.Array, draw: jax.Array) -> jax.Array:
  """t ~ U(0, 1), each run of `STRATA` draws covering [0, 1] evenly.

  Within a run every stratum [k, k + 1) / STRATA is visited once, in random
  order, at a uniform place.
  """
  run, place = draw // STRATA, draw % STRATA
  order = jax.random.permutation(
    jax.random.fold_in(jax.random.fold_in(key, 0), run), STRATA
  )
  offset = uniform(jax.random.fold_in(key, 1), draw)
  return (order[place].astype(jnp.float32) + offset) / STRATA


def beta(concentration: float) -> Sampler:
  """t ~ Beta(a, a): nearer to 0.5 the larger a is; a = 1 is uniform."""

  def sample(key: jax.Array, draw: jax.Array) -> jax.Array:
    key = jax.random.fold_in(key, draw)
    return jax.random.beta(key, concentration, concentration)

  return sample


def get_sampler(name: str, concentration: float) -> Sampler:
  """Returns a sampler by name.

  Args:
    name: "uniform", "stratified" or "beta".
    concentration: a of Beta(a, a), positive; used by "beta" alone.

  Returns:
    `sample(key, draw) -> t`, a float32 scalar in [0, 1].

  Raises:
    ValueError: unknown name, or a concentration that is not positive.
  """
  if name == "beta":
    if concentration <= 0:
      raise ValueError(
        f"The concentration of Beta(a, a) must be positive, got "
        f"{concentration}."
      )
    return beta(concentration)
  samplers: dict[str, Sampler] = {"uniform": uniform, "stratified": stratified}
  if name not in samplers:
    raise ValueError(
      f"Unknown t_sampling {name!r}. Choose one of beta, stratified, uniform."
    )
  return samplers[name]


def dirichlet(concentration: float, num_models: int) -> Sampler:
  """t ~ Dirichlet(a, ..., a), barycentric coordinates `[num_models]`.

  Of two models they are (1 - s, s) with the s that `beta` draws, so that a
  simplex of two models sees what a curve sees.
  """
  if num_models == 2:
    second = beta(concentration)

    def pair(key: jax.Array, draw: jax.Array) -> jax.Array:
      s = second(key, draw)
      return jnp.stack([1 - s, s])

    return pair

  def sample(key: jax.Array, draw: jax.Array) -> jax.Array:
    key = jax.random.fold_in(key, draw)
    return jax.random.dirichlet(key, jnp.full(num_models, concentration))

  return sample


def _for_each_device(sampler: Sampler) -> Sampler:
  """Each device's own draws."""

  def own(key: jax.Array, step: jax.Array) -> jax.Array:
    devices = jax.lax.axis_size(training.DEVICE_AXIS)
    device = jax.lax.axis_index(training.DEVICE_AXIS)
    return sampler(key, step * devices + device)

  return own


@functools.lru_cache(maxsize=64)
def draw_t(name: str, concentration: float, shared: bool) -> Sampler:
  """Draws the t of a step, one for all devices or one for each."""
  sampler = get_sampler(name, concentration)
  return sampler if shared else _for_each_device(sampler)


@functools.lru_cache(maxsize=64)
def draw_barycentric(
  concentration: float, num_models: int, shared: bool
) -> Sampler:
  """Draws the position of a step on a simplex, as `draw_t` does on a curve."""
  sampler = dirichlet(concentration, num_models)
  return sampler if shared else _for_each_device(sampler)
