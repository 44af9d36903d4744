r"""Weight matching of whole networks against the plain procedure.

  python -m benchmarks.alignment_matching [--smoke] [--out=matching.json]

Matches two networks of independent random weights, of the shapes of MLPHUGE
(3072 inputs, 1024-512-256, 10 outputs, without biases) and of ViT-B/16 (width
768, 12 layers, 12 heads), with the package and with Git Re-Basin's procedure
written plainly in NumPy and SciPy (benchmarks/_plain_matching.py). Both start
from the identity, take the groups in the same random orders, and stop by the
same rule; their permutations are compared. They take turns in one process;
medians count. Compilation is timed apart. Beside the wall time stands the time
of all cores together, which other work on the machine changes less.

What the package does otherwise: a group whose neighbours have not changed is
not solved again; leaves without other groups are compared once; assignment
problems get prices for their columns first; those of groups that share no leaf
are solved side by side.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy
from absl import app, flags

from benchmarks import _plain_matching, _turns
from jaxmerge import alignment, tree
from jaxmerge.alignment import Axis

PyTree = Any

TOLERANCE = 1e-6


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_bool("smoke", False, "Tiny networks, for seconds.")
  flags.DEFINE_list("networks", ["mlphuge", "vit"], "Which ones.")
  flags.DEFINE_integer("repeats", 3, "Turns.", lower_bound=1)
  flags.DEFINE_integer("max_sweeps", 100, "Sweeps at most.")
  flags.DEFINE_string("out", None, "Writes the JSON here, too.")


# --- Networks ----------------------------------------------------------------


def mlp_shapes(widths: tuple[int, ...]) -> dict[str, Any]:
  """Shapes of an MLP without biases."""
  return {
    f"Dense_{i}": {"kernel": (m, n)}
    for i, (m, n) in enumerate(zip(widths[:-1], widths[1:], strict=True))
  }


def vit_shapes(
  width: int, layers: int, heads: int, hidden: int, patch: int, classes: int
) -> dict[str, Any]:
  """Shapes of a ViT as Flax lays it out."""
  norm = {"scale": (width,), "bias": (width,)}
  dense = lambda m, n: {"kernel": (m, n), "bias": (n,)}  # noqa: E731
  inner = width // heads
  projection = {"kernel": (width, heads, inner), "bias": (heads, inner)}
  block = {
    "norm_1": norm,
    "attention": {
      "query": projection,
      "key": projection,
      "value": projection,
      "out": {"kernel": (heads, inner, width), "bias": (width,)},
    },
    "norm_2": norm,
    "mlp": {"up": dense(width, hidden), "down": dense(hidden, width)},
  }
  return {
    "class_token": (1, 1, width),
    "patches": {"kernel": (patch, patch, 3, width), "bias": (width,)},
    "positions": (1, 197, width),
    **{f"block_{i}": block for i in range(layers)},
    "norm": norm,
    "head": dense(width, classes),
  }


def vit_spec(layers: int) -> alignment.PermutationSpec:
  """One group for the residual stream, and each layer's heads and MLP."""
  stream = [
    Axis("class_token", 2),
    Axis("patches/kernel", 3),
    Axis("patches/bias", 0),
    Axis("positions", 2),
    Axis("norm/scale", 0),
    Axis("norm/bias", 0),
    Axis("head/kernel", 0, incoming=False),
  ]
  spec: dict[str, tuple[Axis, ...]] = {}
  for i in range(layers):
    block, attention = f"block_{i}", f"block_{i}/attention"
    heads = [Axis(f"{attention}/out/kernel", 0, incoming=False)]
    for name in ("query", "key", "value"):
      stream.append(Axis(f"{attention}/{name}/kernel", 0, incoming=False))
      heads.append(Axis(f"{attention}/{name}/kernel", 1))
      heads.append(Axis(f"{attention}/{name}/bias", 0))
    spec[f"heads_{i}"] = tuple(heads)
    spec[f"mlp_{i}"] = (
      Axis(f"{block}/mlp/up/kernel", 1),
      Axis(f"{block}/mlp/up/bias", 0),
      Axis(f"{block}/mlp/down/kernel", 0, incoming=False),
    )
    stream += [
      Axis(f"{attention}/out/kernel", 2),
      Axis(f"{attention}/out/bias", 0),
      Axis(f"{block}/mlp/up/kernel", 0, incoming=False),
      Axis(f"{block}/mlp/down/kernel", 1),
      Axis(f"{block}/mlp/down/bias", 0),
    ]
    for norm in ("norm_1", "norm_2"):
      stream += [
        Axis(f"{block}/{norm}/{leaf}", 0) for leaf in ("scale", "bias")
      ]
  return spec | {"stream": tuple(stream)}


def draw(shapes: dict[str, Any], seed: int) -> PyTree:
  """Random parameters."""
  rng = np.random.default_rng(seed)

  def one(shape: tuple[int, ...]) -> jax.Array:
    values = rng.standard_normal(shape, np.float32)
    return jax.numpy.asarray(values / np.float32(np.sqrt(shape[0])))

  return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def networks(smoke: bool) -> dict[str, tuple[dict[str, Any], Any]]:
  """Shapes and specifications by name; no specification to derive it."""
  if smoke:
    return {
      "mlphuge": (mlp_shapes((30, 20, 10, 4)), None),
      "vit": (vit_shapes(12, 2, 3, 16, 2, 5), vit_spec(2)),
    }
  return {
    "mlphuge": (mlp_shapes((3072, 1024, 512, 256, 10)), None),
    "vit": (vit_shapes(768, 12, 12, 3072, 16, 1000), vit_spec(12)),
  }


# --- Sides -------------------------------------------------------------------


def sweep_orders(
  key: jax.Array, groups: list[str], max_sweeps: int
) -> list[list[str]]:
  """The orders that `weight_matching` draws for its first run."""
  _, order_key = jax.random.split(jax.random.split(key, 1)[0])
  return [
    [groups[i] for i in jax.random.permutation(one, len(groups)).tolist()]
    for one in jax.random.split(order_key, max_sweeps)
  ]


def _named(params: PyTree) -> dict[str, np.ndarray]:
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
  return dict(zip(tree.leaf_names(params), leaves, strict=True))


def measure(
  shapes: dict[str, Any], spec: Any, *, repeats: int, max_sweeps: int
) -> dict[str, Any]:
  """Times both sides on one network."""
  reference, model = draw(shapes, 0), draw(shapes, 1)
  spec = alignment.derive_spec(reference) if spec is None else spec
  sizes = alignment.group_sizes(spec, reference)
  key = jax.random.key(0)
  orders = sweep_orders(key, list(spec), max_sweeps)
  plain_args = _named(reference), _named(model), spec, sizes, orders, TOLERANCE
  found: dict[str, Any] = {}

  def plain() -> None:
    found["plain"] = _plain_matching.weight_matching(*plain_args)

  def ours() -> None:
    _, found["info"] = jax.block_until_ready(
      alignment.weight_matching(
        reference,
        model,
        spec,
        key=key,
        restarts=0,
        max_sweeps=max_sweeps,
        tolerance=TOLERANCE,
      )
    )

  cpu: dict[str, list[float]] = {"plain": [], "jaxmerge": []}

  def timed(name: str, fn: Callable[[], None]) -> float:
    start = time.process_time()
    seconds = _seconds(fn)
    cpu[name].append(time.process_time() - start)
    return seconds

  first = _seconds(ours)
  times = _turns.take_turns(
    {
      "plain": functools.partial(timed, "plain", plain),
      "jaxmerge": functools.partial(timed, "jaxmerge", ours),
    },
    repeats,
  )
  permutations, sweeps = found["plain"]
  info = found["info"]
  seconds = {name: statistics.median(values) for name, values in times.items()}
  cores = {name: statistics.median(values) for name, values in cpu.items()}
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(reference)),
    "groups": len(spec),
    "sweeps": {"plain": sweeps, "jaxmerge": info.n_iters},
    "same_permutations": {
      "equal": sum(
        np.array_equal(permutations[group], info.permutations[group])
        for group in spec
      ),
      "of": len(spec),
    },
    "objectives": info.objectives.tolist(),
    "first_call": first,
    "times": times,
    "seconds": seconds,
    "ratio": seconds["plain"] / seconds["jaxmerge"],
    "cpu_seconds": cores,
    "cpu_ratio": cores["plain"] / cores["jaxmerge"],
    "ratio_range": [
      fn(a / b for a, b in zip(times["plain"], times["jaxmerge"], strict=True))
      for fn in (min, max)
    ],
  }


def _seconds(fn: Callable[[], None]) -> float:
  start = time.perf_counter()
  fn()
  return time.perf_counter() - start


def report(name: str, cell: dict[str, Any]) -> list[str]:
  """A row of the table."""
  low, high = cell["ratio_range"]
  same, sweeps = cell["same_permutations"], cell["sweeps"]
  return [
    name,
    f"{cell['parameters'] / 1e6:.1f}",
    f"{sweeps['plain']}, {sweeps['jaxmerge']}",
    f"{same['equal']} of {same['of']}",
    f"{cell['seconds']['plain']:.2f}",
    f"{cell['seconds']['jaxmerge']:.2f}",
    f"{cell['ratio']:.2f} ({low:.2f} to {high:.2f})",
    f"{cell['cpu_seconds']['plain']:.2f}",
    f"{cell['cpu_seconds']['jaxmerge']:.2f}",
    f"{cell['cpu_ratio']:.2f}",
    f"{cell['first_call']:.1f}",
  ]


HEADER = [
  "network",
  "million parameters",
  "sweeps, plain and ours",
  "equal permutations",
  "plain, s",
  "jaxmerge, s",
  "ratio",
  "plain, s of all cores",
  "jaxmerge, s of all cores",
  "ratio of these",
  "first call, s",
]


def main(argv: list[str]) -> None:
  """Measures, prints the table, then the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  known = networks(flags.FLAGS.smoke)
  for name in flags.FLAGS.networks:
    if name not in known:
      raise app.UsageError(
        f"--networks: {name!r} is none of {', '.join(known)}"
      )
  hardware = (
    f"{platform.processor() or platform.machine()},"
    f" {len(os.sched_getaffinity(0))} cores; jax {jax.__version__} on"
    f" {jax.devices()[0].device_kind}, numpy {np.__version__}, scipy"
    f" {scipy.__version__}"
  )
  print(f"{hardware}\n", flush=True)
  results: dict[str, Any] = {"hardware": hardware, "networks": {}}
  rows = []
  for name in flags.FLAGS.networks:
    cell = measure(
      *known[name],
      repeats=flags.FLAGS.repeats,
      max_sweeps=flags.FLAGS.max_sweeps,
    )
    results["networks"][name] = cell
    rows.append(report(name, cell))
  print(_turns.table(HEADER, rows) + "\n", flush=True)
  text = json.dumps(results, indent=2)
  if flags.FLAGS.out:
    with open(flags.FLAGS.out, "w") as file:
      file.write(text + "\n")
  else:
    print(f"## JSON\n\n```json\n{text}\n```")


if __name__ == "__main__":
  define_flags()
  app.run(main)
