"""NaN and infinity are found wherever they are, and nothing else is."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging
from jaxmerge.merging import _leafwise

BAD = (np.nan, np.inf, -np.inf)


def _models(count, dtype=jnp.float32):
  return [{"w": jnp.arange(4, dtype=dtype) + i} for i in range(count)]


class FiniteTest(parameterized.TestCase):
  @parameterized.product(
    bad=BAD, place=(0, 1, 18), dtype=("float32", "bfloat16")
  )
  def test_names_the_model_that_hides_it(self, bad, place, dtype):
    """Later models are larger and would win, in one kernel and in two."""
    models = _models(19, dtype)
    models[place] = {"w": models[place]["w"].at[1].set(bad)}
    base = {"w": jnp.zeros(4, dtype)}
    message = f"'w' of model {place} holds NaN or infinity"
    with self.assertRaisesRegex(ValueError, message):
      merging.magmax(base, models)
    with (
      mock.patch.object(_leafwise, "_CHUNK", 16),
      self.assertRaisesRegex(ValueError, message),
    ):
      merging.magmax(base, models)
    merging.magmax(base, models, allow_nonfinite=True)

  @parameterized.parameters(*BAD)
  def test_rules_that_spread_it(self, bad):
    models = _models(3)
    models[1] = {"w": models[1]["w"].at[1].set(bad)}
    for merge in (
      lambda base, models: merging.average(models),
      lambda base, models: merging.weighted_average(models, [1, 0, 1]),
      merging.task_arithmetic,
      lambda *args: merging.task_arithmetic(*args, scale=0.0),
      # Weights that sum to zero, and give the base.
      lambda *args: merging.task_arithmetic(
        *args, weights=[1, 0, -1], normalize=True
      ),
      merging.ema,
      lambda *args: merging.ema(*args, decay=1.0),
    ):
      with self.assertRaisesRegex(ValueError, "'w' of model 1 holds NaN"):
        merge({"w": jnp.zeros(4)}, models)

  @parameterized.parameters(*BAD)
  def test_names_the_base(self, bad):
    base = {"w": jnp.full(4, bad)}
    with self.assertRaisesRegex(ValueError, "'w' of base holds NaN"):
      merging.magmax(base, _models(2))
    with self.assertRaisesRegex(ValueError, "'w' of base holds NaN"):
      merging.magmax_method().init(base)

  def test_overflow_is_no_error(self):
    """Finite inputs, whose sum or whose result is not."""
    largest = float(np.finfo(np.float32).max)
    base, models = {"w": jnp.zeros(4)}, [{"w": jnp.full(4, largest)}] * 2
    got = merging.magmax(base, models, scale=1.0)
    np.testing.assert_array_equal(got["w"], models[0]["w"])
    got = merging.task_arithmetic(base, models)
    np.testing.assert_array_equal(got["w"], np.full(4, np.inf))
    got = merging.average(_models(2), dtype=jnp.float16)
    self.assertEqual(got["w"].dtype, jnp.float16)
    got = merging.magmax(base, models, scale=1.0, dtype=jnp.float16)
    np.testing.assert_array_equal(got["w"], np.full(4, np.inf))

  def test_let_through_where_it_is_not_known(self):
    base, models = {"w": jnp.zeros(4)}, _models(2)
    bad = {"w": jnp.asarray([np.nan, 0, 0, 0])}
    fn = jax.jit(lambda one: merging.magmax(base, [models[1], one])["w"])
    np.testing.assert_array_equal(fn(bad), fn({"w": jnp.zeros(4)}))
    with self.assertRaisesRegex(ValueError, "'w' of model 1 holds NaN"):
      jax.jit(lambda one: merging.magmax(base, [one, bad])["w"])(models[0])
    with self.assertRaisesRegex(ValueError, "'w' of model 1 holds NaN"):
      jax.jit(lambda x: merging.magmax(base, [models[0], bad], scale=x))(0.5)


if __name__ == "__main__":
  absltest.main()
