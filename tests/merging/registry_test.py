"""Methods by name, and the checks of what they need."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging

BASE = {"w": jnp.zeros(3)}
MODELS = [{"w": jnp.ones(3)}, {"w": jnp.asarray([2.0, -4.0, 0.0])}]
KEY = jax.random.key(0)


class RegistryTest(parameterized.TestCase):
  @parameterized.parameters(*((name,) for name in merging.names()))
  def test_info(self, name):
    info = merging.info(name)
    self.assertEqual(info.name, name)
    self.assertTrue(callable(getattr(merging, name)))
    self.assertRegex(info.summary, r"^[A-Z].*[.:]")
    self.assertNotIn("key", info.options)
    self.assertNotIn("models", info.options)

  def test_flags(self):
    ties = merging.info("ties")
    self.assertEqual(
      (ties.needs_base, ties.needs_key, ties.leafwise, ties.streams),
      (True, False, False, True),
    )
    self.assertTrue(merging.info("ties", scope="leaf").leafwise)
    self.assertEqual(ties.options["density"], 0.2)
    self.assertTrue(merging.info("dare").needs_key)
    self.assertFalse(merging.info("multislerp").needs_base)
    self.assertTrue(merging.info("multislerp", task_vectors=True).needs_base)
    self.assertEqual(merging.info("slerp").max_models, 2)
    self.assertEqual(merging.info("consensus").min_models, 2)
    self.assertEqual(merging.info("consensus", min_tasks=0).min_models, 1)
    self.assertIs(
      merging.info("nearswap").options["t"], inspect.Parameter.empty
    )

  def test_same_as_the_functions(self):
    for got, want in (
      (
        merging.get("magmax", scale=0.3)(BASE, MODELS),
        merging.magmax(BASE, MODELS, scale=0.3),
      ),
      (
        merging.get("dare", density=0.4)(BASE, MODELS, key=KEY, weights=[1, 2]),
        merging.dare(BASE, MODELS, KEY, density=0.4, weights=[1, 2]),
      ),
      (merging.get("average")(None, MODELS), merging.average(MODELS)),
      (
        merging.get("multislerp", task_vectors=True)(BASE, MODELS),
        merging.multislerp(MODELS, base=BASE),
      ),
      (
        merging.get("nearswap", t=0.5)(BASE, MODELS[:1]),
        merging.nearswap(BASE, MODELS[0], 0.5),
      ),
    ):
      np.testing.assert_array_equal(got["w"], want["w"])

  @parameterized.parameters(
    ("tie", {}, "unknown merge method 'tie'; did you mean 'ties'"),
    ("???", {}, "unknown merge method '...'; choose from arcee_fusion"),
    ("ties", {"densty": 0.2}, "unknown option of ties 'densty'; did you mean"),
    ("average", {"density": 0.2}, "unknown option of average"),
    ("nearswap", {}, "nearswap needs the option t"),
    ("passthrough", {"slices": [], "select": "w"}, "unknown option of passthr"),
  )
  def test_bad_options(self, name, options, message):
    with self.assertRaisesRegex(ValueError, message):
      merging.get(name, **options)

  @parameterized.parameters(
    ("magmax", None, 2, {}, "magmax needs the parameters that the models were"),
    ("dare", BASE, 2, {}, "dare draws random numbers; give a PRNG key"),
    ("weighted_average", None, 2, {}, "weighted_average needs weights"),
    ("slerp", None, 2, {"weights": [1, 2]}, "slerp takes no weights"),
    ("slerp", None, 1, {}, "slerp takes exactly 2 models; got 1"),
    ("arcee_fusion", BASE, 2, {}, "arcee_fusion takes exactly 1 model; got 2"),
    ("model_stock", BASE, 1, {}, "model_stock takes at least 2 models; got 1"),
  )
  def test_missing(self, name, base, count, given, message):
    with self.assertRaisesRegex(ValueError, message):
      merging.get(name)(base, MODELS[:count], **given)
    if "key" in message:
      with self.assertRaisesRegex(ValueError, message):
        merging.get(name).method()


if __name__ == "__main__":
  absltest.main()
