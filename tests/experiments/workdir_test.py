"""Tests of the files of a run's folder."""

import json
import pathlib
import tempfile

from absl.testing import absltest

from experiments import _workdir


class WriteJsonTest(absltest.TestCase):
  def test_reads_back_as_it_was(self):
    value = {
      "numbers": [1, -2.5, 1e-30, None, True],
      "infinite": [float("inf"), float("-inf")],
      "nested": [[[1, 2], []], {"a": [3]}, {}],
      "text": 'a list, "[\n 1,\n 2\n]", in a string',
      "texts": ["[1", "2]"],
      "empty": [],
    }
    path = (
      pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
      / "new"
      / "value.json"
    )
    _workdir.write_json(path, value)
    self.assertEqual(json.loads(path.read_text()), value)
    self.assertEqual([one.name for one in path.parent.iterdir()], [path.name])

  def test_a_list_of_numbers_is_a_line(self):
    path = (
      pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
      / "value.json"
    )
    _workdir.write_json(path, {"a": [[1, 2.5], [None, -1e-5]], "b": ["x"]})
    lines = [line.strip() for line in path.read_text().splitlines()]
    self.assertIn("[1, 2.5],", lines)
    self.assertIn("[null, -1e-05]", lines)
    self.assertIn('"x"', lines)


if __name__ == "__main__":
  absltest.main()
