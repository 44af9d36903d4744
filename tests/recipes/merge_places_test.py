"""Tests of where a merge writes to, and of when it cannot."""

from __future__ import annotations

import os
import pathlib
import shutil
from unittest import mock

from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from jaxmerge.recipes import _engine, _folder, _shards
from tests.recipes import _merging


class PlacesTest(_merging.MergingTest):
  def test_output_that_is_there(self):
    _, _, recipe = self.pair()
    (self.root / "out").mkdir()
    (self.root / "out/old.txt").write_text("old")
    self.assert_refused(recipe, "out exists.*overwrite")
    self.assertEqual(
      _merging.file_bytes(self.root / "out"), {"old.txt": b"old"}
    )
    self.merge(recipe, overwrite=True)
    self.assertFalse((self.root / "out/old.txt").exists())
    (self.root / "file").write_text("x")
    self.assert_refused(recipe, "file is no folder", out="file", overwrite=True)
    self.assert_refused(recipe, "cannot be written", out="file/out")
    with self.assertRaisesRegex(ValueError, "max_shard_bytes"):
      self.merge(recipe, "other", max_shard_bytes=0)

  @parameterized.parameters("a", ".", "b")
  def test_no_model_is_overwritten(self, out):
    _, _, recipe = self.pair()
    before = _merging.file_bytes(self.root)
    with self.assertRaises(recipes.RecipeError):
      self.merge(recipe, out, overwrite=True)
    self.assertEqual(_merging.file_bytes(self.root), before)

  def test_no_model_is_overwritten_through_a_link(self):
    _, _, recipe = self.pair()
    (self.root / "link").symlink_to(self.root / "a")
    before = _merging.file_bytes(self.root)
    with self.assertRaises(recipes.RecipeError):
      self.merge(recipe, "link", overwrite=True)
    self.assertEqual(_merging.file_bytes(self.root), before)

  def test_links_out_of_the_folder(self):
    _, _, recipe = self.pair()
    shutil.move(self.root / "b/model.safetensors", self.root / "weights")
    (self.root / "b/model.safetensors").symlink_to(self.root / "weights")
    self.assert_refused(recipe, "is a link to .*weights, out of its folder")
    # As a hub's cache keeps its files.
    (self.root / "hub/blobs").mkdir(parents=True)
    shutil.move(self.root / "weights", self.root / "hub/blobs/1")
    (self.root / "hub/snapshots/x").mkdir(parents=True)
    (self.root / "hub/snapshots/x/model.safetensors").symlink_to(
      self.root / "hub/blobs/1"
    )
    self.merge(self.of("linear", ("a", "hub/snapshots/x"), weight=1))

  def test_links_beside_the_weights(self):
    _, _, recipe = self.pair()
    (self.root / "secret").write_text("{}")
    (self.root / "a/vocab.json").symlink_to(self.root / "secret")
    self.assert_refused(recipe, "vocab.json is a link to .*secret")

  def test_room(self):
    _, _, recipe = self.pair()
    full = mock.Mock(free=100)
    with mock.patch.object(shutil, "disk_usage", return_value=full):
      with self.assertRaisesRegex(recipes.RecipeError, "GB free, the result"):
        self.merge(recipe)
    self.assertFalse((self.root / "out").exists())

  def test_nothing_is_left_where_there_is_no_room(self):
    _, _, recipe = self.pair()
    full = mock.Mock(free=100)
    with mock.patch.object(shutil, "disk_usage", return_value=full):
      self.assert_refused(recipe, "GB free")

  @parameterized.parameters(
    (OSError(28, "No space left on device"), "No space is left"),
    (OSError(5, "Input/output error"), "cannot be written .*Input"),
    (OSError(30, "Read-only file system"), "cannot be written .*Read-only"),
  )
  def test_errors_while_writing(self, error, message):
    _, _, recipe = self.pair()
    with mock.patch.object(os, "pwrite", side_effect=error):
      self.assert_refused(recipe, message)
    (self.root / "out").mkdir()
    (self.root / "out/old").write_text("x")
    with mock.patch.object(os, "pwrite", side_effect=error):
      self.assert_refused(recipe, message, overwrite=True)
    self.assertEqual(_merging.file_bytes(self.root / "out"), {"old": b"x"})

  @parameterized.parameters("publish", "finished")
  def test_errors_at_the_end(self, method):
    _, _, recipe = self.pair()
    (self.root / "out").mkdir()
    error = OSError(28, "No space left on device")
    with mock.patch.object(_folder.Staging, method, side_effect=error):
      self.assert_refused(recipe, "No space is left", overwrite=True)

  def test_a_place_that_cannot_be_written(self):
    _, _, recipe = self.pair()
    error = PermissionError(13, "Permission denied")
    with mock.patch.object(pathlib.Path, "mkdir", side_effect=error):
      self.assert_refused(recipe, "cannot be written .*Permission denied")

  def test_an_input_that_goes_meanwhile(self):
    _, _, recipe = self.pair()
    write = _shards.ShardWriter.write

    def cut(writer, name, start, values):
      file = self.root / "b/model.safetensors"
      if file.exists():
        os.truncate(file, 10)
      write(writer, name, start, values)

    init = _engine.Engine.__init__

    def in_blocks(engine, *args):
      init(engine, *args, block=4)

    with (
      mock.patch.object(_engine.Engine, "__init__", in_blocks),
      mock.patch.object(_shards.ShardWriter, "write", cut),
      self.assertRaisesRegex(checkpoints.CheckpointError, "cut off at byte"),
    ):
      self.merge(recipe)
    self.assert_nothing_left("a", "b")


if __name__ == "__main__":
  absltest.main()
