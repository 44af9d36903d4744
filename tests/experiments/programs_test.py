"""Tests of the bound on compiled programs."""

from __future__ import annotations

import os
import unittest

import chex
import jax
import jax.numpy as jnp
from absl.testing import absltest

from experiments import _programs


class BoundTest(absltest.TestCase):
  def test_forgets_only_above_the_limit(self):
    double = jax.jit(chex.assert_max_traces(lambda x: 2 * x, n=2))
    double(jnp.ones(3))
    self.assertFalse(_programs.bound(10**9))
    double(jnp.ones(3))  # Not traced anew.
    self.assertTrue(_programs.bound(-1))
    chex.assert_trees_all_equal(double(jnp.ones(3)), 2 * jnp.ones(3))
    with self.assertRaisesRegex(AssertionError, "traced > 2 times"):
      jax.clear_caches()
      double(jnp.ones(3))

  @unittest.skipUnless(os.path.exists("/proc/self/maps"), "Linux only")
  def test_mappings_of_programs_are_given_back(self):
    _programs.bound(-1)
    before = _programs.num_mappings()
    held = []
    for i in range(40):
      program = jax.jit(lambda x, i=i: jnp.sin(x) @ jnp.cos(x.T) + i)
      program(jnp.ones((4, 4)))
      held.append(program)
    full = _programs.num_mappings()
    self.assertGreater(full, before + 40)
    _programs.bound(-1)
    self.assertLess(_programs.num_mappings(), (before + full) / 2)


if __name__ == "__main__":
  absltest.main()
