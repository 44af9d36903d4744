"""Tests of planes through three networks, and of metrics on them."""

from __future__ import annotations

import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import curves, training, tree
from jaxmerge.curves import _plane_values


def _nets(dtype=np.float32):
  generator = np.random.default_rng(0)
  return [
    {
      "w": generator.normal(size=(3, 4)).astype(dtype),
      "b": generator.normal(size=4).astype(dtype),
    }
    for _ in range(3)
  ]


def _flat(params):
  leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(params)]
  return np.concatenate(leaves).astype(np.float64)


def _basis(nets):
  a, b, c = map(_flat, nets)
  u = (b - a) / np.linalg.norm(b - a)
  v = (c - a) - (c - a) @ u * u
  return a, u, v / np.linalg.norm(v)


class PlaneTest(parameterized.TestCase):
  def test_basis(self):
    nets = _nets()
    plane = curves.Plane.through(*nets)
    a, u, v = _basis(nets)
    for x, y in ((0, 0), (1, 0), (0, 1), (-2.5, 0.7)):
      np.testing.assert_allclose(
        _flat(plane.params(x, y)), a + x * u + y * v, atol=2e-6
      )

  def test_meets_the_three(self):
    nets = _nets()
    plane = curves.Plane.through(*nets)
    corners = [(0, 0), (plane.width, 0), (plane.shift, plane.height)]
    for net, corner in zip(nets, corners, strict=True):
      jax.tree.map(np.testing.assert_array_equal, plane.params(*corner), net)
      np.testing.assert_allclose(plane.coordinates(net), corner, atol=1e-5)

  def test_projection(self):
    nets = _nets()
    plane = curves.Plane.through(*nets)
    a, u, v = _basis(nets)
    other = _nets()[0] | {"b": np.float32([5, -1, 2, 0])}
    offset = _flat(other) - a
    np.testing.assert_allclose(
      plane.coordinates(other), (offset @ u, offset @ v), rtol=1e-5
    )

  def test_half_types(self):
    """The axes are those of the rounded networks, not rounded themselves."""
    nets = _nets(jnp.bfloat16)
    plane = curves.Plane.through(*nets)
    wide = curves.Plane.through(
      *(jax.tree.map(lambda leaf: leaf.astype(np.float32), net) for net in nets)
    )
    for name in ("width", "shift", "height"):
      np.testing.assert_allclose(
        getattr(plane, name), getattr(wide, name), rtol=1e-5
      )
    np.testing.assert_allclose(
      plane.coordinates(nets[2]), (plane.shift, plane.height), rtol=1e-4
    )
    self.assertEqual(plane.params(0.3, 0.4)["w"].dtype, jnp.bfloat16)

  def test_axes(self):
    plane = curves.Plane.through(*_nets())
    xs, ys = plane.axes()
    np.testing.assert_allclose(
      xs[[0, -1]], plane.width * np.array([-0.25, 1.25])
    )
    np.testing.assert_allclose(
      ys[[0, -1]], plane.height * np.array([-0.25, 1.25])
    )
    self.assertLen(xs, 21)
    with self.assertRaisesRegex(ValueError, "at least 2 points"):
      plane.axes(1)

  @parameterized.parameters((0.5,), (1.0,), (0.0,), (7.0,), (-2.0,))
  def test_collinear(self, share):
    a, b, _ = _nets()
    with self.assertRaisesRegex(ValueError, "straight line.*another c"):
      curves.Plane.through(a, b, tree.lerp(a, b, share))

  def test_rounding_is_no_plane(self):
    # Fine-tuned networks: small changes of large parameters.
    rng = np.random.default_rng(0)
    a = {"w": rng.normal(size=1000).astype(np.float32)}
    b = {"w": a["w"] + 1e-3 * rng.normal(size=1000).astype(np.float32)}
    c = tree.lerp(a, b, 0.3)
    with self.assertRaisesRegex(ValueError, "straight line"):
      curves.Plane.through(a, b, c)
    off = {"w": c["w"] + 1e-4 * rng.normal(size=1000).astype(np.float32)}
    self.assertGreater(curves.Plane.through(a, b, off).height, 1e-3)

  def test_of_mixed_dtypes(self):
    # What is small and coarse does not hide what is large and fine.
    rng = np.random.default_rng(0)
    nets = [
      {
        "w": rng.normal(size=1000).astype(np.float32) * np.float32(size) + 1,
        "b": jnp.zeros(4, jnp.bfloat16),
      }
      for size in (0, 1e-3, 1e-3)
    ]
    self.assertGreater(curves.Plane.through(*nets).height, 1e-2)

  def test_without_floats(self):
    nets = [{"n": np.array([i, i * i])} for i in range(3)]
    with self.assertRaisesRegex(ValueError, "straight line"):
      curves.Plane.through(*nets)

  def test_complex(self):
    a, b, c = ({"w": np.array([1j, i], np.complex64)} for i in range(3))
    with self.assertRaisesRegex(ValueError, "'w' is complex"):
      curves.Plane.through(a, b, c)

  def test_equal_ends(self):
    a, _, c = _nets()
    with self.assertRaisesRegex(ValueError, "straight line"):
      curves.Plane.through(a, a, c)

  def test_bad_networks(self):
    a, b, c = _nets()
    with self.assertRaisesRegex(ValueError, "not finite"):
      curves.Plane.through(a, b, c | {"b": np.full(4, np.nan, np.float32)})
    with self.assertRaisesRegex(tree.TreeMismatchError, "'b' has shape"):
      curves.Plane.through(a, b, c | {"b": c["b"][:3]})
    with self.assertRaisesRegex(tree.TreeMismatchError, "'b' has shape"):
      curves.Plane.through(a, b, c).coordinates(c | {"b": c["b"][:3]})


def _metric(params, batch):
  logits = jax.nn.relu(batch["x"] @ params["w"] + params["b"][None])
  return {"loss": logits.sum(axis=-1), "first": logits[:, 0]}


def _data(examples, seed):
  x = np.random.default_rng(seed).normal(size=(examples, 3))
  return {"x": x.astype(np.float32)}


_SETS = {"train": _data(11, 1), "test": _data(6, 2)}
_XS, _YS = [-0.5, 0.0, 1.0, 2.0], [0.0, 0.25, 3.0]


def _values(plane=None, xs=_XS, ys=_YS, sets=None, **options):
  plane = plane or curves.Plane.through(*_nets())
  options = {"chunk": 5, "devices": 1} | options
  return curves.plane_values(_metric, plane, sets or _SETS, xs, ys, **options)


class PlaneValuesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "plane.npz"

  def test_against_a_loop(self):
    found = _values()
    a, u, v = _basis(_nets())
    for name, data in _SETS.items():
      for i, y in enumerate(_YS):
        for j, x in enumerate(_XS):
          flat = a + x * u + y * v  # b comes first in the flattened tree
          hidden = data["x"] @ flat[4:].reshape(3, 4) + flat[:4]
          logits = np.maximum(hidden, 0)
          want = {"loss": logits.sum(1).mean(), "first": logits[:, 0].mean()}
          for metric, value in want.items():
            got = found.values[name][metric][i, j]
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
    self.assertEqual(
      found.non_finite, dict.fromkeys(_SETS, {"loss": 0, "first": 0})
    )

  @parameterized.parameters(1, 12, 1000)
  def test_chunks_change_nothing(self, chunk):
    one, other = _values(), _values(chunk=chunk)
    for name in _SETS:
      for metric in ("loss", "first"):
        np.testing.assert_allclose(
          one.values[name][metric], other.values[name][metric], rtol=1e-5
        )

  def test_devices(self):
    one, two = _values(), _values(devices=2)
    np.testing.assert_allclose(
      one.values["train"]["loss"], two.values["train"]["loss"], rtol=1e-5
    )

  def test_resume(self):
    """Broken off after each chunk, it goes on where the file ends."""
    whole = _values()
    write = _plane_values._File.add
    chunks, rounds = [], 0

    def broken(file, name, start, *args):
      if len(chunks) > rounds:
        raise KeyboardInterrupt
      write(file, name, start, *args)
      chunks.append((name, start))

    while True:
      with mock.patch.object(_plane_values._File, "add", broken):
        try:
          found = _values(path=self.path)
          break
        except KeyboardInterrupt:
          rounds += 1
    # Twelve points of two sets in chunks of four, each written once.
    self.assertEqual(
      chunks, [(name, start) for name in _SETS for start in (0, 4, 8)]
    )
    self.assertEqual(rounds, 5)
    jax.tree.map(np.testing.assert_array_equal, found.values, whole.values)
    with mock.patch.object(_plane_values._File, "add", side_effect=TypeError):
      again = _values(path=self.path)
    jax.tree.map(np.testing.assert_array_equal, again.values, whole.values)
    self.assertEqual([self.path], list(self.path.parent.iterdir()))

  def test_file_of_something_else(self):
    _values(path=self.path)
    a, b, c = _nets()
    with self.assertRaisesRegex(ValueError, "another grid"):
      _values(path=self.path, xs=[0.0, 1.0])
    with self.assertRaisesRegex(ValueError, "another plane"):
      _values(curves.Plane.through(b, a, c), path=self.path)
    with self.assertRaisesRegex(ValueError, "another data"):
      _values(path=self.path, sets=_SETS | {"test": _data(6, 3)})
    with self.assertRaisesRegex(ValueError, "another data"):
      _values(path=self.path, sets={"train": _SETS["train"]})
    with self.assertRaisesRegex(ValueError, "another indices"):
      _values(path=self.path, indices=[0, 1])
    doubled = lambda params: jax.tree.map(lambda x: 2 * x, params)  # noqa: E731
    with self.assertRaisesRegex(ValueError, "another metric_fn or prepare"):
      _values(path=self.path, prepare=doubled)
    _values(path=self.path, indices=None)
    self.path.unlink()
    _values(path=self.path, indices=[0, 1])
    _values(path=self.path, indices=np.array([0, 1], np.int32))

  def test_names_with_a_slash(self):
    with self.assertRaisesRegex(ValueError, "'mnist/train' of a data set"):
      _values(path=self.path, sets={"mnist/train": _SETS["train"]})

  @parameterized.parameters(b"", b"PK\x03\x04", b"half a file")
  def test_damaged_file(self, content):
    self.path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, "is damaged.*Remove it"):
      _values(path=self.path)

  def test_non_finite_values_are_kept_and_counted(self):
    def metric(params, batch):
      value = params["w"].sum() * batch["x"][:, 0]
      bad = params["w"][0, 0] > 0
      return {"loss": jnp.where(bad, jnp.nan, value)}

    plane = curves.Plane.through(*_nets())
    found = curves.plane_values(metric, plane, _SETS, _XS, _YS, devices=1)
    corner = [[plane.params(x, y)["w"][0, 0] for x in _XS] for y in _YS]
    bad = np.array(corner) > 0
    self.assertBetween(bad.sum(), 1, bad.size - 1)
    for name in _SETS:
      np.testing.assert_array_equal(np.isnan(found.values[name]["loss"]), bad)
      self.assertEqual(found.non_finite[name], {"loss": bad.sum()})

  @parameterized.parameters(
    ({"chunk": 0}, "chunk must be at least 1"),
    ({"xs": []}, "xs must be a list of finite"),
    ({"ys": [0.0, np.inf]}, "ys must be a list of finite"),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _values(**options)

  def test_other_errors(self):
    plane = curves.Plane.through(*_nets())
    with self.assertRaisesRegex(ValueError, "datasets is empty"):
      curves.plane_values(_metric, plane, {}, _XS, _YS)
    with self.assertRaisesRegex(ValueError, "must return a dictionary"):
      curves.plane_values(
        lambda params, batch: batch["x"], plane, _SETS, _XS, _YS, devices=1
      )


class PrepareTest(absltest.TestCase):
  """Batch statistics re-estimated at every network between the given ones."""

  def test_batch_norm(self):
    sample = _data(40, 5)["x"]

    def prepare(params):
      hidden = jnp.asarray(sample) @ params["w"]
      return params, (hidden.mean(axis=0), hidden.var(axis=0))

    def metric(ready, batch):
      params, (mean, var) = ready
      hidden = batch["x"] @ params["w"] - mean[None]
      hidden = hidden * jax.lax.rsqrt(var + 1e-5)[None] + params["b"][None]
      return {"loss": jax.nn.relu(hidden).sum(axis=-1)}

    def oracle(flat, data):
      w, b = flat[4:].reshape(3, 4), flat[:4]
      mean, var = (sample @ w).mean(0), (sample @ w).var(0)
      hidden = (data["x"] @ w - mean) / np.sqrt(var + 1e-5) + b
      return np.maximum(hidden, 0).sum(1).mean()

    nets = _nets()
    # Curves of three networks; the second seed's are doubled.
    line = curves.PolyChain.through(*nets)
    both = curves.PolyChain.through(
      *(jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), n) for n in nets)
    )
    ts, found = curves.profile(
      metric, line, _SETS["train"], 7, prepare=prepare, devices=2
    )
    a, b, c = map(_flat, nets)
    for t, loss in zip(ts, found["loss"], strict=True):
      flat = a + 2 * t * (b - a) if t < 0.5 else b + (2 * t - 1) * (c - b)
      np.testing.assert_allclose(loss, oracle(flat, _SETS["train"]), rtol=1e-4)
    _, seeds = curves.profile(
      metric,
      both,
      _SETS["train"],
      7,
      prepare=prepare,
      seed_axis=True,
      devices=1,
    )
    np.testing.assert_allclose(seeds["loss"][0], found["loss"], rtol=1e-4)
    np.testing.assert_allclose(
      seeds["loss"][1][0], oracle(2 * a, _SETS["train"]), rtol=1e-4
    )
    plane = curves.Plane.through(*nets)
    values = curves.plane_values(
      metric, plane, _SETS, [0.5], [0.0, 2.0], prepare=prepare, devices=1
    )
    origin, u, v = _basis(nets)
    np.testing.assert_allclose(
      values.values["test"]["loss"][1, 0],
      oracle(origin + 0.5 * u + 2 * v, _SETS["test"]),
      rtol=1e-4,
    )

  def test_evaluate(self):
    data = {"x": np.arange(4, dtype=np.float32)}
    found = training.evaluate(
      lambda params, batch: params * batch["x"],
      jnp.float32(2),
      data,
      prepare=lambda params: params + 1,
    )
    np.testing.assert_allclose(found, 4.5)
    with self.assertRaisesRegex(ValueError, "variants need prepare"):
      training.evaluate(
        lambda params, batch: params * batch["x"],
        jnp.float32(2),
        data,
        variants=np.ones(3, np.float32),
      )


if __name__ == "__main__":
  absltest.main()
