"""Tests of values of parameters, and of which layer a tensor is in."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge.recipes import _layers, _schema, _settings


def _conditions(*pairs):
  return [_schema.Conditional(filter=f, value=v) for f, v in pairs]


class SettingsTest(parameterized.TestCase):
  @parameterized.parameters(0.5, 3, True, "text", -2.5)
  def test_scalars(self, value):
    for t in (0, 0.3, 1):
      self.assertEqual(_settings.evaluate(value, "w", t), value)

  @parameterized.parameters(
    ([0, 1],), ([0.25],), ([1, 0, 1, 0.5],), ([3, 3, -1],)
  )
  def test_gradients(self, values):
    places = np.linspace(0, 1, len(values))
    for t in np.linspace(0, 1, 13):
      self.assertAlmostEqual(
        _settings.evaluate(values, "w", float(t)),
        np.interp(t, places, values),
        places=12,
      )

  def test_gradients_of_words(self):
    values = ["a", "b", "c"]
    found = [_settings.evaluate(values, "w", t) for t in (0, 0.49, 0.5, 0.9, 1)]
    self.assertEqual(found, ["a", "a", "b", "b", "c"])
    values = [False, True]
    found = [_settings.evaluate(values, "w", t) for t in (0, 0.9, 1)]
    self.assertEqual(found, [False, False, True])

  def test_filters(self):
    setting = _conditions(("self_attn", [0, 1]), ("mlp", 0.25), (None, 0.5))
    for name, t, wanted in (
      ("model.layers.3.self_attn.q_proj.weight", 0.75, 0.75),
      ("model.layers.3.mlp.up_proj.weight", 0.75, 0.25),
      ("model.norm.weight", 0.75, 0.5),
    ):
      self.assertEqual(_settings.evaluate(setting, name, t), wanted)

  def test_the_first_filter_counts(self):
    setting = _conditions(("proj", 1), ("q_proj", 2), (None, 3), ("norm", 4))
    self.assertEqual(_settings.evaluate(setting, "x.q_proj.weight", 0), 1)
    self.assertEqual(_settings.evaluate(setting, "x.norm", 0), 3)

  def test_filters_that_leave_some_out(self):
    setting = _conditions(("mlp", 1))
    self.assertIsNone(_settings.evaluate(setting, "attn", 0))
    self.assertEqual(_settings.evaluate(setting[0], "mlp", 0), 1)
    self.assertIsNone(_settings.evaluate(setting[0], "attn", 0))
    self.assertEqual(
      _settings.evaluate(_conditions(("mlp", 1), ("*", 2)), "attn", 0), 2
    )

  def test_levels(self):
    levels = (
      {"weight": _conditions(("mlp", 1))},
      None,
      {"weight": 2, "density": 0.5},
      {"weight": 3, "density": 0.7, "t": 0},
    )
    look_up = _settings.look_up
    self.assertEqual(look_up("weight", levels, "mlp", 0), 1)
    # Where no filter of a level matches, the next level counts.
    self.assertEqual(look_up("weight", levels, "attn", 0), 2)
    self.assertEqual(look_up("density", levels, "attn", 0), 0.5)
    # Zero is a value.
    self.assertEqual(look_up("t", levels, "attn", 0), 0)
    self.assertIsNone(look_up("gamma", levels, "attn", 0))
    self.assertIsNone(look_up("gamma", (), "attn", 0))


class LayersTest(parameterized.TestCase):
  @parameterized.parameters(
    ("model.layers.12.mlp.up_proj.weight", "model.layers", 12),
    ("h.0.attn.c_attn.weight", "h", 0),
    ("transformer.h.7.ln_1.bias", "transformer.h", 7),
    ("bert.encoder.layer.3.output.dense.bias", "bert.encoder.layer", 3),
    ("text_model.encoder.layers.1.x", "text_model.encoder.layers", 1),
    ("visual.transformer.resblocks.4.w", "visual.transformer.resblocks", 4),
    ("params/blocks/2/kernel", "params/blocks", 2),
    ("params/layers_2/kernel", "params/layers", 2),
    ("model.layers.3", "model.layers", 3),
  )
  def test_find_and_rename(self, name, stack, number):
    found = _layers.find(name)
    self.assertEqual((found.stack, found.number), (stack, number))
    self.assertEqual(f"{stack}{name[len(stack)]}{number}{found.rest}", name)
    renamed = _layers.rename(name, 105)
    again = _layers.find(renamed)
    self.assertEqual(
      (again.stack, again.number, again.rest), (stack, 105, found.rest)
    )

  @parameterized.parameters(
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.weight",
    "model.layersx.3.weight",
    "model.layers.3x.weight",
    "graph.0.weight",
    "classifier.0.weight",
  )
  def test_no_layer(self, name):
    self.assertIsNone(_layers.find(name))

  @parameterized.parameters(
    ("model.embed_tokens.weight", True),
    ("transformer.wte.weight", True),
    ("wpe.weight", True),
    ("bert.embeddings.LayerNorm.bias", True),
    ("shared.weight", True),
    ("vision_model.pre_layrnorm.weight", True),
    ("lm_head.weight", False),
    ("embed_out.weight", False),
    ("model.norm.weight", False),
    ("bert.pooler.dense.weight", False),
  )
  def test_is_before(self, name, wanted):
    self.assertEqual(_layers.is_before(name), wanted)

  def test_stacks(self):
    names = [
      *(f"encoder.layers.{i}.w" for i in range(3)),
      *(f"encoder.layers.{i}.v" for i in range(2)),
      *(f"decoder.layers.{i}.w" for i in range(2)),
      # A gap: these are no stack.
      "head.layers.1.w",
      "head.layers.4.w",
      "other",
    ]
    self.assertEqual(
      _layers.stacks(names), {"encoder.layers": 3, "decoder.layers": 2}
    )

  def test_configuration(self):
    config = {
      "num_hidden_layers": 4,
      "n_layer": 5,
      "layer_types": ["a", "b", "c", "d"],
      "eos_token_id": [1, 2, 3, 4],
      "hidden_size": 4,
      "text_config": {"num_layers": 4, "layer_types": ["a", "b"]},
    }
    found = _layers.with_layers(config, [0, 1, 1, 3, 0], 4)
    self.assertEqual(
      found,
      {
        "num_hidden_layers": 5,
        "n_layer": 5,
        "layer_types": ["a", "b", "b", "d", "a"],
        "eos_token_id": [1, 2, 3, 4],
        "hidden_size": 4,
        "text_config": {"num_layers": 5, "layer_types": ["a", "b"]},
      },
    )
    # What was given is as it was.
    self.assertEqual(config["num_hidden_layers"], 4)


if __name__ == "__main__":
  absltest.main()
