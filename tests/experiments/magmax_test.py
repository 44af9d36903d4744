"""Tests of experiments.magmax on a small encoder and a small set of texts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tokenizers
from absl.testing import absltest, parameterized
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, processors

from experiments import (
  _backbone,
  _magmax_report,
  _magmax_study,
  _predictions,
  magmax,
  magmax_analysis,
)
from experiments.configs import magmax as configs
from experiments.configs import magmax_analysis as analysis_configs
from jaxmerge import data, merging, models
from jaxmerge.checkpoints import hugging_face
from tests.models import _noise

CLASSES = ("pay_bill", "book_flight", "play_song", "set_alarm")
WORDS = {
  "pay_bill": ("pay", "bill", "money", "card"),
  "book_flight": ("book", "flight", "plane", "city"),
  "play_song": ("play", "song", "music", "band"),
  "set_alarm": ("set", "alarm", "wake", "clock"),
}
SIZES = {
  "model_type": "bert",
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 32,
  "pad_token_id": 0,
}


def _texts(count, seed):
  draws = np.random.default_rng(seed)
  rows = []
  for number in range(count * len(CLASSES)):
    label = CLASSES[number % len(CLASSES)]
    own = draws.choice(WORDS[label], draws.integers(1, 4)).tolist()
    others = draws.choice(sum(WORDS.values(), ()), 2).tolist()
    rows.append([" ".join(own + others), label])
  return rows


def write_set(folder):
  content = {"train": _texts(20, 0), "val": _texts(8, 1), "test": _texts(10, 2)}
  (folder / "data_full.json").write_text(json.dumps(content))


def write_model(folder, vocab_size=None):
  """A random encoder in Hugging Face's layout."""
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sum(WORDS.values(), ())]
  made = tokenizers.Tokenizer(
    token_models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
  )
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / "tokenizer.json"))
  config = {**SIZES, "vocab_size": vocab_size or len(words)}
  (folder / "config.json").write_text(json.dumps(config))
  model = models.bert_from_config(config, pooler=True)
  params = _noise.params(model, jnp.zeros((1, 4), jnp.int32))
  hugging_face.save(folder, params)


def _config(model, **fields):
  config = configs.get_config("clinc150-2-smoke")
  config.model.source = str(model)
  config.length, config.buckets = 6, (4, 5, 7)
  config.orders = (0, 1)
  config.training.batch_size, config.devices = 8, 1
  config.training.epochs = 4
  with config.unlocked():
    config.recipes = {
      "slow": {"learning_rate": 1e-3},
      "fast": {"learning_rate": 1e-2},
    }
    rows = {
      name: config.rows[name].to_dict()
      for name in (
        "sequential",
        "independent",
        "avg",
        "random_mix",
        "magmax",
      )
    }
    config.rows = ml_collections.ConfigDict(rows, sort_keys=False)
    config.curves = ("sequential", "magmax")
    config.learners = {"sequential": {}, "independent": {}}
    for name, value in fields.items():
      if name == "rows":
        value = ml_collections.ConfigDict(value, sort_keys=False)
      config[name] = value
  return config


_LOAD = _magmax_study._load


class _KilledError(Exception):
  """Stands in for a kill."""


class _Folders(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.root = pathlib.Path(folder.name)
    write_set(cls.root)
    cls.model = cls.root / "model"
    write_model(cls.model)
    # One network for all studies: equal functions share what is compiled.
    backbone = _backbone.texts(_config(cls.model), str(cls.root))
    cls.enterClassContext(
      mock.patch.object(_magmax_study, "_load", lambda *args: backbone)
    )

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.empty = pathlib.Path(folder.name)

  def _run(self, folder, **fields):
    return magmax.run(
      _config(self.model, **fields), str(folder), str(self.root), False
    )

  def _study(self, **fields):
    return _magmax_study.build(_config(self.model, **fields), str(self.root))


class MagmaxTest(_Folders):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.root / "run"
    cls.results = magmax.run(
      _config(cls.model), str(cls.folder), str(cls.root), False
    )

  def test_rows(self):
    rows = self.results["rows"]
    self.assertEqual(
      set(rows),
      {"sequential", "independent", "avg", "random_mix", "magmax"},
    )
    for name, row in rows.items():
      for variant in ("fixed", "chosen"):
        self.assertLen(row[variant], 2)
        for entry in row[variant]:
          self.assertBetween(entry["accuracy"], 0, 1)
      for fixed, chosen in zip(row["fixed"], row["chosen"], strict=True):
        self.assertGreaterEqual(chosen["validation"], fixed["validation"])
        if name in ("avg", "magmax"):
          self.assertEqual(fixed["scale"], {"avg": 1.0, "magmax": 0.5}[name])
      recipes = {entry["recipe"] for entry in row["chosen"]}
      self.assertLen(recipes, 1)
    self.assertGreater(
      rows["sequential"]["chosen"][0]["accuracy"], self.results["zero_shot"]
    )

  def test_a_grid_grows_where_its_end_is_best(self):
    for file in self.folder.glob("order-*/validation/*.json"):
      for name, table in json.loads(file.read_text()).items():
        scales = sorted(float(scale) for scale in table)
        if len(scales) in (1, 16):  # No merge, or as long as it may be.
          continue
        best = max(table.values())
        where = [s for s in scales if table[str(s)] == best]
        self.assertNotIn(where, ([scales[0]], [scales[-1]]), (name, table))

  def test_curves(self):
    for name in ("sequential", "magmax", "avg"):
      for entry in self.results["rows"][name]["chosen"]:
        matrix = np.array(entry["matrix"], np.float64)
        self.assertEqual(np.isnan(matrix[0, 0]), name == "avg")
        self.assertTrue(np.isnan(matrix[0, 1]))
        self.assertFalse(np.isnan(matrix[1]).any())
        np.testing.assert_allclose(matrix[1].mean(), entry["accuracy"])
        self.assertEqual("forgetting" in entry["metrics"], name != "avg")

  def test_files(self):
    self.assertEqual(
      json.loads((self.folder / "results.json").read_text()), self.results
    )
    table = (self.folder / "table.md").read_text()
    self.assertRegex(table, r"\| magmax \| 0.5 \| (slow|fast) \|")
    self.assertGreater((self.folder / "tasks.png").stat().st_size, 1000)
    # The networks of the tasks are gone, the merged one is whole.
    self.assertFalse(list(self.folder.glob("order-*/networks/*")))
    merged = self.folder / "merged" / "magmax"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
      self.assertTrue((merged / name).exists(), name)
    self.assertIn(
      "pooler.dense.weight", hugging_face._safetensors.tensors(merged)
    )

  @parameterized.parameters((1, 0.0), (5, 0.0), (5, 60.0))
  def test_resume_equals_an_unbroken_run(self, calls, seconds):
    left = [calls]
    original = _magmax_study.strategy

    def killed(*args):
      made = original(*args)

      def observe(problem, state, task):
        left[0] -= 1
        if left[0] < 0:
          raise _KilledError
        return made.observe(problem, state, task)

      return made._replace(observe=observe)

    with contextlib.ExitStack() as stack:
      stack.enter_context(
        mock.patch.object(_magmax_study, "_SAVE_SECONDS", seconds)
      )
      stack.enter_context(mock.patch.object(_magmax_study, "strategy", killed))
      stack.enter_context(self.assertRaises(_KilledError))
      self._run(self.empty / "run")
    results = self._run(self.empty / "run")
    self.assertEqual(results["rows"], self.results["rows"])

  def test_a_finished_run_trains_nothing(self):
    with mock.patch.object(_magmax_study, "train", side_effect=AssertionError):
      self.assertEqual(self._run(self.folder), self.results)

  def test_running_magmax_is_that_of_all_checkpoints(self):
    study = self._study()
    one = _magmax_study.problem(study, 0)
    folder = self.empty / "networks"
    _magmax_study.train(study, one, "sequential", "fast", folder, str)
    networks = [
      study.backbone.load(_magmax_study.expert(folder, task))
      for task in range(2)
    ]
    merged = {}
    for task, given in _magmax_study.merges(
      study, ["magmax", "sequential"], folder, 2, jax.random.key(0)
    ):
      merged[task] = given("magmax"), given("sequential")
    base = study.backbone.params
    for task in range(2):
      chex.assert_trees_all_equal(
        merged[task][0],
        merging.magmax(base, networks[: task + 1], scale=1.0),
      )
      chex.assert_trees_all_equal(merged[task][1], networks[task])
    # A coefficient put in afterwards is that of the rule.
    chex.assert_trees_all_close(
      _magmax_study.scaled(base, merged[1][0], 0.5),
      merging.magmax(base, networks, scale=0.5),
      rtol=1e-5,
      atol=1e-7,
    )

  def test_the_frozen_head(self):
    study = self._study()
    back = study.backbone
    self.assertEqual(
      back.class_names, tuple(sorted(n.replace("_", " ") for n in CLASSES))
    )
    np.testing.assert_allclose(
      np.linalg.norm(back.head, axis=1), 20.0, rtol=1e-5
    )
    # A class name is nearest to itself.
    tokenizer = data.load_tokenizer(self.model, vocab_size=20)
    ids = data.tokenize(tokenizer, back.class_names, length=7)
    logits = np.asarray(jax.jit(back.logits_fn)(back.params, jnp.asarray(ids)))
    np.testing.assert_array_equal(logits.argmax(axis=1), np.arange(4))
    np.testing.assert_allclose(np.diag(logits), 20.0, rtol=1e-4)

  def test_training_sees_the_classes_of_the_task_alone(self):
    study = self._study()
    one = _magmax_study.problem(study, 0)
    chosen = _magmax_study.strategy(study, "sequential", "slow")
    first = chosen.observe(one, chosen.init(one), 0)
    # The logits of other classes have no part in it.
    others = [c for c in range(4) if c not in one.stream.tasks[0].classes]
    embed = study.backbone.logits_fn

    def logits_fn(params, ids):
      logits = embed(params, ids)
      return jnp.where(
        jnp.isin(jnp.arange(4), jnp.array(others))[None], 1e3, logits
      )

    other = dataclasses.replace(one, logits_fn=logits_fn, memo={})
    second = chosen.observe(other, chosen.init(other), 0)
    chex.assert_trees_all_close(
      first.current, second.current, rtol=1e-5, atol=1e-6
    )

  def test_validation_examples_are_not_trained_on(self):
    study = self._study()
    for order in range(2):
      for task in _magmax_study.stream(study, order).tasks:
        self.assertLen(task.train, 40)
        self.assertLen(task.validation, 16)
        self.assertTrue((task.train < 80).all())
        self.assertTrue((task.validation >= 80).all())
        self.assertLen(task.test, 20)

  def test_class_orders(self):
    config_orders = (-1, (3, 1, 0, 2), 5)
    study = self._study(orders=config_orders)
    classes = [
      [task.classes for task in _magmax_study.stream(study, order).tasks]
      for order in range(3)
    ]
    self.assertEqual(classes[0], [(0, 1), (2, 3)])
    self.assertEqual(classes[1], [(3, 1), (0, 2)])
    self.assertEqual(set(sum(classes[2], ())), {0, 1, 2, 3})

  @parameterized.parameters(
    ({"orders": ((0, 1),)}, "order"),
    ({"num_tasks": 3}, "does not divide the 4 classes"),
    ({"curves": ("nothing",)}, "curves names 'nothing'"),
    ({"export": ("nothing",)}, "export names 'nothing'"),
    ({"orders": ()}, "must name at least one"),
    ({"grow": 1.0}, "grow must be above 1"),
    ({"export": ("sequential",)}, "export names 'sequential', which is no"),
    ({"learners": {"sequential": {}}}, "unknown learner 'independent'"),
    (
      {"learners": {"sequential": {"rate": 1}, "independent": {}}},
      "Learner sequential: ",
    ),
    (
      {"recipes": {"a": {"learning_rate": -1.0}}},
      "learning rates must be positive",
    ),
  )
  def test_bad_configurations(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(self.empty / "run", **fields)
    self.assertFalse((self.empty / "run").exists())

  @parameterized.parameters(
    ({"kind": "sounds"}, "Unknown kind 'sounds'"),
    ({"buckets": (4, 64)}, "must not be above the 32 positions"),
    ({"templates": ("a text",)}, "must have one {}"),
  )
  def test_bad_networks(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      _LOAD(_config(self.model, **fields), str(self.root))

  def test_bad_rows(self):
    rows = _config(self.model).rows.to_dict()
    rows["magmax"]["rule"] = "maxmag"
    with self.assertRaisesRegex(ValueError, "Row magmax: unknown merge method"):
      self._run(self.empty / "run", rows=rows)
    rows["magmax"]["rule"], rows["magmax"]["options"] = "ties", {"density": 2.0}
    with self.assertRaisesRegex(ValueError, "Row magmax: density"):
      self._run(self.empty / "run", rows=rows)
    rows["magmax"]["options"] = {"scale": 2.0}
    with self.assertRaisesRegex(ValueError, "Row magmax: .*scale"):
      self._run(self.empty / "run", rows=rows)
    rows["magmax"]["options"], rows["magmax"]["fix"] = {}, 1.0
    with self.assertRaisesRegex(ValueError, "Row magmax: .*fix.*The fields"):
      self._run(self.empty / "run", rows=rows)
    del rows["magmax"]["fix"]
    rows["magmax"]["rule"] = "fisher_average"
    with self.assertRaisesRegex(ValueError, "does not take one network after"):
      self._run(self.empty / "run", rows=rows)

  def test_a_tokenizer_of_another_model(self):
    write_model(self.empty / "model", vocab_size=12)
    with self.assertRaisesRegex(ValueError, "tokens, but the embedding"):
      _LOAD(_config(self.empty / "model"), str(self.root))

  def test_variants(self):
    for variant in ("clinc150", "clinc150-x", "cifar10-5", "clinc150-5-tiny"):
      with self.assertRaisesRegex(ValueError, "Unknown variant"):
        configs.get_config(variant)
    self.assertEqual(list(configs.get_config("clinc150-1").rows), ["joint"])
    for name, count in (
      ("cifar100", 100),
      ("imagenet_r", 200),
      ("cub200", 200),
    ):
      (order,) = configs.get_config(f"{name}-10").orders
      self.assertEqual(sorted(order), list(range(count)))
    self.assertEqual(configs.get_config("cars-10").orders, (-1,))
    paper = configs.get_config("cars-10")
    self.assertEqual(paper.training.epochs, 30)
    self.assertEqual(paper.training.batch_size, 128)
    self.assertEqual(paper.recipes["lr-1e-5"].learning_rate, 1e-5)

  def test_page(self):
    kept = {"clinc150-2": self.results, "clinc150-2-smoke": self.results}
    page = _magmax_report.render(kept)
    self.assertIn("## clinc150-2", page)
    mean = 100 * np.mean(
      [e["accuracy"] for e in self.results["rows"]["magmax"]["chosen"]]
    )
    summary = _magmax_report.summary(kept)
    line = next(
      one for one in summary.splitlines() if one.startswith("| magmax |")
    )
    self.assertIn(f"| {mean:.2f} ± ", line)

  def test_publish(self):
    _magmax_report.publish(self.results, self.folder, self.empty)
    kept = json.loads(
      (self.empty / "experiments/results/magmax.json").read_text()
    )
    self.assertEqual(kept["clinc150-2-smoke"], self.results)
    self.assertTrue(
      (self.empty / "docs/images/magmax-clinc150-2-smoke.png").exists()
    )
    self.assertIn(
      "clinc150-2-smoke", (self.empty / "docs/results/magmax.md").read_text()
    )


class AllLearnersTest(_Folders):
  def test_table_two(self):
    rows = configs.get_config("generated-2-smoke").rows
    fields = {
      name: rows[name].to_dict()
      for name in ("joint", "lwf", "ewc", "lwf_magmax", "ewc_magmax")
    }
    results = self._run(
      self.empty / "run",
      rows=fields,
      orders=(0,),
      curves=("lwf_magmax",),
      export=(),
      recipes={"one": {"learning_rate": 1e-2}},
      learners={
        # By another name.
        "joint": {"learner": "joint"},
        "lwf": {"weight": 0.3, "temperature": 2.0},
        "ewc": {
          "samples": 5,
          "labels": "empirical",
          "chunk_size": 2,
          "recipes": {
            "loose": {"learning_rate": 1e-2, "weight": 1e-3},
            "tight": {"learning_rate": 1e-2, "weight": 1e9},
          },
        },
      },
    )
    self.assertEqual(list(results["rows"]), list(fields))
    self.assertGreater(results["rows"]["joint"]["chosen"][0]["accuracy"], 0.3)
    self.assertIn(
      results["rows"]["ewc"]["chosen"][0]["recipe"], ("loose", "tight")
    )


class PredictionsTest(_Folders):
  def test_one_program_a_bucket(self):
    back = self._study().backbone
    programs = _predictions._compiled(back.logits_fn)
    before = programs._cache_size()
    rows = np.arange(0, 40, 3)
    found = _predictions.predictions(
      back.logits_fn, back.params, back.test, batch_size=7
    )
    self.assertLen(back.test.buckets, 2)
    self.assertEqual(programs._cache_size() - before, 2)
    part = _predictions.predictions(
      back.logits_fn, back.params, back.test, rows, batch_size=7
    )
    np.testing.assert_array_equal(part, found[rows])
    self.assertEqual(programs._cache_size() - before, 2)
    # Each text on its own.
    alone = jax.jit(back.logits_fn)
    for inputs, places in back.test.buckets:
      for ids, place in zip(inputs, places, strict=True):
        logits = alone(back.params, jnp.asarray(ids[None]))
        self.assertEqual(int(logits.argmax()), found[place])
    accuracy = _predictions.accuracy(back.logits_fn, back.params, back.test)
    self.assertAlmostEqual(accuracy, (found == back.test.labels).mean())

  def test_accuracy_of_tasks(self):
    back = self._study().backbone
    tasks = [np.array([1, 5, 9]), np.array([0, 2])]
    found = _predictions.predictions(back.logits_fn, back.params, back.test)
    hits = found == back.test.labels
    np.testing.assert_allclose(
      _predictions.task_accuracies(
        back.logits_fn, back.params, back.test, tasks
      ),
      [hits[task].mean() for task in tasks],
    )


class AnalysisTest(_Folders):
  def test_measurements(self):
    config = analysis_configs.get_config("clinc150-2-smoke")
    brief = _config(self.model)
    with config.unlocked():
      for name in ("model", "length", "buckets", "recipes", "rows", "learners"):
        config[name] = brief[name]
    config.curves, config.recipe = ("magmax",), "fast"
    config.devices = 1
    config.densities = (0.1, 0.5)
    folder = self.empty / "run"
    with mock.patch.object(
      magmax_analysis.shutil, "rmtree"
    ):  # Keeps the networks, for the oracle.
      found = magmax_analysis.run(config, str(folder), str(self.root))
    study = _magmax_study.build(config, str(self.root))
    base = study.backbone.params
    networks = {
      name: [
        study.backbone.load(
          _magmax_study.expert(folder / "networks" / name, task)
        )
        for task in range(2)
      ]
      for name in ("independent", "sequential")
    }
    flat = {
      name: [
        np.concatenate(
          [
            (np.asarray(a, np.float64) - np.asarray(b, np.float64)).ravel()
            for a, b in zip(
              jax.tree.leaves(one), jax.tree.leaves(base), strict=True
            )
          ]
        )
        for one in given
      ]
      for name, given in networks.items()
    }
    for name, (a, b) in flat.items():
      cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      np.testing.assert_allclose(
        found["cosines"][name][0][1], cosine, rtol=1e-3, atol=1e-4
      )
      kept = []
      for vector in (a, b):
        least = np.sort(np.abs(vector))[-int(0.2 * len(vector))]
        kept.append(np.sign(vector) * (np.abs(vector) >= least))
      rate = (kept[0] * kept[1] < 0).sum() / (np.abs(kept).sum(0) > 0).sum()
      np.testing.assert_allclose(found["conflicts"][name], [rate], atol=2e-3)
      np.testing.assert_allclose(
        found["shares"][name],
        [(np.abs(a) > np.abs(b)).mean(), (np.abs(b) >= np.abs(a)).mean()],
        atol=0.05,
      )
    first, last = flat["sequential"]
    signs = np.sign(first), np.sign(last - first)
    both = (signs[0] == signs[1]) & (signs[0] != 0)
    numbers = found["consistency"]["numbers"]
    np.testing.assert_allclose(numbers[2], both.sum(), rtol=2e-2)
    np.testing.assert_allclose(
      found["consistency"]["magnitudes"][2],
      np.abs(last[both]).mean(),
      rtol=2e-2,
    )
    self.assertBetween(found["kept"]["whole"], 0, 1)
    for name in ("kept", "conflicts", "consistency", "cosines"):
      for ending in ("png", "svg"):
        self.assertGreater(
          (folder / f"{name}.{ending}").stat().st_size, 1000, name
        )
    magmax_analysis.publish(found, folder, self.empty)
    page = (self.empty / "docs/results/magmax_analysis.md").read_text()
    self.assertIn("Figure 2, sign conflicts", page)

  def test_hypotheses(self):
    def judge(top, random, bottom, apart, after, sizes, numbers=(0, 1, 1)):
      return magmax_analysis.hypotheses(
        {
          "kept": {
            "accuracy": {"top": top, "random": random, "bottom": bottom}
          },
          "conflicts": {"independent": apart, "sequential": after},
          "consistency": {"magnitudes": sizes, "numbers": numbers},
        }
      )

    yes = judge([3, 3], [2, 2], [1, 1], [0.5], [0.4], [9, 1, 2])
    self.assertEqual(set(yes.values()), {True})
    no = judge([3, 2], [2, 2], [1, 1], [0.5], [0.5], [9, 2, 2])
    self.assertEqual(set(no.values()), {False})

  @parameterized.parameters(
    ("generated-1", {}, "2 or more"),
    ("generated-2", {"recipe": "lr-1"}, "Unknown recipe 'lr-1'"),
    ("generated-2", {"top": 2.0}, r"must lie in \(0, 1\]"),
    ("generated-2", {"densities": (0.0,)}, r"must lie in \(0, 1\]"),
  )
  def test_bad_configurations(self, variant, fields, message):
    config = analysis_configs.get_config(variant)
    for name, value in fields.items():
      config[name] = value
    with self.assertRaisesRegex(ValueError, message):
      magmax_analysis.run(config, str(self.empty / "run"))
    self.assertFalse((self.empty / "run").exists())


class FindModelTest(absltest.TestCase):
  def test_a_package_stands_for_its_own_model_alone(self):
    with tempfile.TemporaryDirectory() as folder:
      root = pathlib.Path(folder)
      (root / "held" / "inner").mkdir(parents=True)
      (root / "held" / "__init__.py").write_text("")
      with (
        mock.patch.object(sys, "path", [folder, *sys.path]),
        mock.patch.dict(_backbone._PACKAGES, {"owner/held": ("held", "inner")}),
      ):
        self.assertEqual(
          _backbone.find_model("owner/held"), root / "held" / "inner"
        )
        with mock.patch.object(
          hugging_face, "locate", lambda source, weights_only: "hub"
        ):
          self.assertEqual(_backbone.find_model("owner/other"), "hub")
      self.assertEqual(_backbone.find_model(folder), root)


class ImagesTest(absltest.TestCase):
  def test_the_whole_path_of_images(self):
    config = configs.get_config("generated-2-smoke")
    with config.unlocked():
      config.rows = {
        name: config.rows[name].to_dict() for name in ("sequential", "magmax")
      }
    config.curves, config.devices = ("sequential",), 1
    with tempfile.TemporaryDirectory() as folder:
      root = pathlib.Path(folder)
      magmax.run(config, str(root / "run"), None, False)
      merged = root / "run" / "merged" / "magmax"
      model = models.clip_from_config(hugging_face.read_config(merged))
      like = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, 32, 32, 3)),
        jnp.zeros((1, 4), jnp.int32),
      )["params"]
      params = hugging_face.load(merged, like)
      back = _magmax_study.build(config, None).backbone
      changed = np.abs(
        params["visual_projection"]["kernel"]
        - np.asarray(back.params["visual_projection"]["kernel"])
      ).max()
      self.assertGreater(changed, 0)


if __name__ == "__main__":
  absltest.main()
