"""Tests of the figures from a matrix of accuracies."""

from __future__ import annotations

import json

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge.continual import metrics

# A row after each task. Task 0 is best after task 1, so that forgetting is
# more than minus the backward transfer.
_A = np.array([[0.6, 0.2, 0.1], [0.9, 0.8, 0.3], [0.5, 0.6, 0.7]])
_BASELINE = np.array([0.5, 0.1, 0.2])
_JOINT = np.array([0.7, 0.8, 0.9])
_SIZES = [10, 20, 70]

_BY_HAND = {
  # (10 * 0.5 + 20 * 0.6 + 70 * 0.7) / 100 = (5 + 12 + 49) / 100
  "final_accuracy": 0.66,
  # (0.6 + (0.9 + 0.8) / 2 + (0.5 + 0.6 + 0.7) / 3) / 3
  # = (0.6 + 0.85 + 0.6) / 3
  "average_accuracy": 2.05 / 3,
  # (0.6 + 0.8 + 0.7) / 3
  "learning_accuracy": 0.7,
  # ((0.5 - 0.6) + (0.6 - 0.8)) / 2 = (-0.1 - 0.2) / 2
  "backward_transfer": -0.15,
  # ((max(0.6, 0.9) - 0.5) + (0.8 - 0.6)) / 2 = (0.4 + 0.2) / 2
  "forgetting": 0.3,
  # ((0.2 - 0.1) + (0.3 - 0.2)) / 2
  "forward_transfer": 0.1,
  # ((0.7 - 0.6) + (0.8 - 0.8) + (0.9 - 0.7)) / 3 = 0.3 / 3
  "intransigence": 0.1,
  # 0.6, (10 * 0.9 + 20 * 0.8) / 30 = 25 / 30, and the final accuracy
  "accuracies_over_tasks": [0.6, 25 / 30, 0.66],
}


def _summary(a=_A, **options):
  options = dict(sizes=_SIZES, baseline=_BASELINE, joint=_JOINT) | options
  return metrics.summarize(a, **options)


def _random(seed, *shape):
  return np.random.default_rng(seed).uniform(size=shape)


class ByHandTest(parameterized.TestCase):
  def test_has_the_figures_worked_out_by_hand(self):
    found = _summary()
    self.assertEqual(set(found), set(_BY_HAND))
    for name, value in _BY_HAND.items():
      self.assertEqual(found[name].dtype, np.float64, name)
      np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)

  def test_weighs_tasks_equally_without_sizes(self):
    np.testing.assert_allclose(metrics.final_accuracy(_A), 0.6)  # 1.8 / 3
    np.testing.assert_allclose(
      metrics.accuracies_over_tasks(_A), [0.6, 0.85, 0.6]
    )

  def test_the_summary_is_what_the_functions_return(self):
    a = _random(0, 2, 4, 4)
    baseline, joint = _random(1, 2, 4), _random(2, 4)
    found = metrics.summarize(
      a, sizes=[1, 2, 3, 4], baseline=baseline, joint=joint
    )
    arguments = {
      "final_accuracy": ([1, 2, 3, 4],),
      "accuracies_over_tasks": ([1, 2, 3, 4],),
      "forward_transfer": (baseline,),
      "intransigence": (joint,),
    }
    self.assertLen(found, 8)
    for name, value in found.items():
      expected = getattr(metrics, name)(a, *arguments.get(name, ()))
      np.testing.assert_array_equal(value, expected)

  def test_has_the_accuracy_on_the_union_of_the_test_sets(self):
    rng = np.random.default_rng(0)
    right = [rng.integers(0, 2, size) for size in _SIZES]
    a = np.full((3, 3), np.nan)
    a[-1] = [np.mean(hits) for hits in right]
    np.testing.assert_allclose(
      metrics.final_accuracy(a, _SIZES), np.mean(np.concatenate(right))
    )


class PropertiesTest(parameterized.TestCase):
  @parameterized.parameters(2, 3, 7)
  def test_agrees_with_the_sums_written_as_loops(self, tasks):
    a, baseline = _random(tasks, tasks, tasks), _random(9, tasks)
    last, pairs = tasks - 1, range(tasks - 1)
    expected = {
      "final_accuracy": sum(a[last, j] for j in range(tasks)) / tasks,
      "average_accuracy": sum(
        sum(a[i, j] for j in range(i + 1)) / (i + 1) for i in range(tasks)
      )
      / tasks,
      "backward_transfer": sum(a[last, j] - a[j, j] for j in pairs) / last,
      "forward_transfer": sum(a[j, j + 1] - baseline[j + 1] for j in pairs)
      / last,
      "forgetting": sum(
        max(a[i, j] for i in range(j, last)) - a[last, j] for j in pairs
      )
      / last,
      "intransigence": sum(baseline[j] - a[j, j] for j in range(tasks)) / tasks,
    }
    found = metrics.summarize(a, baseline=baseline, joint=baseline)
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value, err_msg=name)

  def test_keeps_leading_axes(self):
    a = _random(0, 5, 2, 4, 4)
    baseline = _random(1, 5, 2, 4)
    joint = _random(2, 4)
    found = metrics.summarize(a, baseline=baseline, joint=joint)
    for seed in np.ndindex(5, 2):
      one = metrics.summarize(a[seed], baseline=baseline[seed], joint=joint)
      for name, value in one.items():
        np.testing.assert_allclose(found[name][seed], value, err_msg=name)

  def test_keeps_the_scale(self):
    percent = _summary(100 * _A, baseline=100 * _BASELINE, joint=100 * _JOINT)
    for name, value in _summary().items():
      np.testing.assert_allclose(percent[name], 100 * value, err_msg=name)

  def test_nothing_is_lost_or_won_where_accuracies_stay(self):
    column = _random(0, 5)
    a = np.tile(column, (5, 1))
    found = metrics.summarize(a, baseline=column, joint=column)
    for name in (
      "backward_transfer",
      "forgetting",
      "forward_transfer",
      "intransigence",
    ):
      np.testing.assert_allclose(found[name], 0, atol=1e-15, err_msg=name)
    np.testing.assert_allclose(found["final_accuracy"], column.mean())
    np.testing.assert_allclose(found["learning_accuracy"], column.mean())

  def test_forgetting_is_at_least_what_backward_transfer_lost(self):
    a = _random(0, 100, 4, 4)
    lost = -metrics.backward_transfer(a)
    self.assertTrue(np.all(metrics.forgetting(a) >= lost - 1e-15))
    # With two tasks the maximum is over one entry.
    np.testing.assert_allclose(
      metrics.forgetting(a[:, :2, :2]),
      -metrics.backward_transfer(a[:, :2, :2]),
    )

  def test_leaves_its_input_untouched(self):
    a = _A.copy()
    a.flags.writeable = False
    _summary(a)
    np.testing.assert_array_equal(a, _A)


class NotMeasuredTest(parameterized.TestCase):
  def test_needs_nothing_above_the_diagonal_but_for_forward_transfer(self):
    a = np.where(np.tril(np.ones((3, 3), bool)), _A, np.nan)
    found, full = _summary(a), _summary()
    self.assertEqual(set(full) - set(found), {"forward_transfer"})
    for name, value in found.items():
      np.testing.assert_array_equal(value, full[name])

  def test_gives_nan_where_an_entry_is_missing(self):
    a = _A.copy()
    a[1, 0] = np.nan
    np.testing.assert_array_equal(
      np.isnan(metrics.accuracies_over_tasks(a)), [False, True, False]
    )
    for figure in (metrics.average_accuracy, metrics.forgetting):
      self.assertTrue(np.isnan(figure(a)))
    np.testing.assert_allclose(metrics.backward_transfer(a), -0.15)
    np.testing.assert_allclose(metrics.final_accuracy(a), 0.6)

  def test_the_summary_leaves_out_what_is_missing_for_one_seed(self):
    a = np.stack([_A, _A])
    a[1, 1, 0] = np.nan
    found = _summary(a)
    self.assertEqual(
      set(_BY_HAND) - set(found),
      {"average_accuracy", "forgetting", "accuracies_over_tasks"},
    )
    json.dumps(
      {name: value.tolist() for name, value in found.items()}, allow_nan=False
    )

  def test_of_the_last_row_alone_there_is_the_final_accuracy(self):
    a = np.full((3, 3), np.nan)
    a[-1] = _A[-1]
    found = _summary(a)
    self.assertEqual(list(found), ["final_accuracy"])
    np.testing.assert_allclose(found["final_accuracy"], 0.66)

  def test_one_task_has_no_transfer(self):
    found = metrics.summarize([[0.5]], baseline=[0.1], joint=[0.75])
    self.assertEqual(
      {name: value.tolist() for name, value in found.items()},
      {
        "final_accuracy": 0.5,
        "average_accuracy": 0.5,
        "learning_accuracy": 0.5,
        "intransigence": 0.25,
        "accuracies_over_tasks": [0.5],
      },
    )


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(((3,),), ((2, 3),), ((4, 3, 2),), ((0, 0),), ((),))
  def test_refuses_what_is_not_square(self, shape):
    with self.assertRaisesRegex(ValueError, r"square in its last two axes"):
      metrics.summarize(np.zeros(shape))

  @parameterized.parameters(-0.1, 100.5, np.inf, -np.inf)
  def test_refuses_what_is_no_accuracy(self, value):
    a = _A.copy()
    a[0, 1] = value
    with self.assertRaisesRegex(ValueError, rf"a has the entry {value:g}: .*"):
      metrics.final_accuracy(a)
    for name in ("baseline", "joint"):
      with self.assertRaisesRegex(ValueError, rf"{name} has the entry"):
        metrics.summarize(_A, **{name: [0.1, value, 0.3]})

  def test_refuses_transfer_of_one_task(self):
    for name, arguments in (
      ("backward_transfer", ()),
      ("forward_transfer", ([0.1],)),
      ("forgetting", ()),
    ):
      with self.assertRaisesRegex(ValueError, f"{name} compares tasks"):
        getattr(metrics, name)([[0.5]], *arguments)

  @parameterized.parameters(((2,),), ((4, 3),), ((),), ((3, 1),))
  def test_refuses_a_baseline_of_other_tasks(self, shape):
    a = np.stack([_A] * 5)
    for name in ("baseline", "joint"):
      with self.assertRaisesRegex(
        ValueError, rf"{name} must .* shape \(3,\) or \(5, 3\): got shape"
      ):
        metrics.summarize(a, **{name: np.zeros(shape)})

  def test_refuses_a_baseline_of_other_tasks_even_if_it_is_not_used(self):
    with self.assertRaisesRegex(ValueError, r"shape \(1,\): got shape \(2,\)"):
      metrics.summarize([[0.5]], baseline=[0.1, 0.2])

  def test_refuses_sizes_of_other_tasks(self):
    for sizes in ([1, 2], 3, [[1, 2, 3]]):
      with self.assertRaisesRegex(ValueError, "each of the 3 tasks"):
        metrics.final_accuracy(_A, sizes)
    for sizes in ([1, 0, 2], [1, -1, 2], [1, np.nan, 2], [1, np.inf, 2]):
      with self.assertRaisesRegex(ValueError, "positive numbers"):
        metrics.accuracies_over_tasks(_A, sizes)


if __name__ == "__main__":
  absltest.main()
