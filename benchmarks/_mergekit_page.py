"""The page of all that mergekit_parity measured."""

from __future__ import annotations

from typing import Any

from benchmarks import (
  _mergekit_speed,
  _mergekit_tables,
  _mergekit_times,
  _turns,
)

Json = dict[str, Any]

# What was tried of networks that mergekit-yaml fails on.
_RAW_REASONS = """\
mergekit-yaml merges no `BertModel` (bert, minilm) and no `CLIPModel` (clip).
The first ends with `TypeError: can only concatenate list (not "tuple") to
list`, where it looks for an optional tensor by its other names; the second
with a `NotImplementedError` of `get_input_embeddings`. Both do so with
mergekit 0.1.5 and transformers 5.24.0, and with mergekit 0.1.4 and transformers
4.57.6; mergekit 0.1.5 does not start with transformers 4.57.6, which has no
`transformers.initialization`. These networks are merged by `mergekit-pytorch`,
another command of mergekit, of the versions above. It takes tensors by their
names, and knows no layers: there are no gradients and no stacking.
"""

# What was looked into, entry by entry, by the tables below.
_REASONS = """\
Where more than roundings differ:

- slerp, GPT-2, BERT, CLIP, MiniLM: biases of a fresh network are zero, and that
  of MiniLM's pooler. mergekit takes a vector of zeros for orthogonal to the
  other one and multiplies that by sin(t pi / 2), jaxmerge by t.
- nuslerp, multislerp and karcher of large tensors: norms of millions of entries
  that PyTorch reckons in float32 are inexact, of 12 million by 5e-4 (on one
  thread). In the scores of the Llama of 0.1 billion parameters jaxmerge's
  results are those of mergekit with `dtype: float64`, to 1e-7; so is MiniLM's
  multislerp, to 1e-6, and its "nuslerp, rows", to 3e-6.
- arcee_fusion: mergekit's divergences, in float32, are inexact where a model
  hardly moved; entries near the threshold change sides. In the tensors of the
  tiny Llama that were looked at, about 25, jaxmerge's entries are those of a
  computation in float64; so are all of CLIP's. Of tensors of more than a
  million entries mergekit takes the threshold from a random million of them.
  With `dtype: bfloat16` mergekit writes float32.
- ties and breadcrumbs, in bfloat16, and in float32 in large tensors: changes
  have the very magnitude that is the threshold; the tools keep others of these.
  In bfloat16 that is so for 501 of 504 entries beyond one unit in the tiny
  Llama's "ties, sum", for 1,411 of 1,416 in BERT's, and for all in its
  breadcrumbs (2,088) and breadcrumbs_ties (1,447); in float32 for all 8 of
  MiniLM's breadcrumbs.
- sce, MiniLM: 885 of 888 entries are of key biases, of which mergekit weights
  the models alike, for the sum of their mean squares is below 1e-6; the others
  are at the threshold, to 3e-7.
- CLIP's `logit_scale` is one number: mergekit's breadcrumbs and sce keep none
  of its change, della fails, and karcher writes it as float32.
- model_stock, GPT-2, BERT, CLIP: biases. GPT-2's one is 8e-5 of a model's, by a
  cosine near zero, which seems to cancel.
- dare_linear, the Llama of 0.1 billion parameters: the tensor's mean is 3.8
  standard errors from the exact one, mergekit's -2.4; with 12 other seeds
  jaxmerge's was -0.5 to 1.8, so that it seems to be chance.
- dare_linear, della and della_linear, MiniLM in bfloat16: mergekit's roundings
  show in the mean squares of so many entries. Against mergekit with `dtype:
  float32` and `out_dtype: bfloat16` the deviations are at most 2.9, 3.3 and 2.7
  standard errors.
- Rounding in bfloat16: mergekit's differences from itself, in float32, are as
  many as those from jaxmerge.
"""


def page(results: Json) -> str:
  """The Markdown page of all that was measured.

  Args:
    results: "hardware", "versions", "parity" and "speed".

  Returns:
    The page.
  """
  records = results["speed"]
  versions = ", ".join(
    f"{name} {version}" for name, version in results["versions"].items()
  )
  text = [
    "# Merging checkpoints: jaxmerge and mergekit",
    "",
    "Made by `python -m benchmarks.mergekit_parity --publish`; figures from",
    "`benchmarks/results/merge_speed.json`.",
    "",
    f"Hardware: {results['hardware']}.",
    f"Versions: {versions}.",
    "",
    "```console",
    "$ python -m benchmarks.mergekit_parity --workdir=FOLDER \\",
    "    --mergekit=OTHER/bin/mergekit-yaml --python=OTHER/bin/python \\",
    "    --speed --publish",
    "```",
    "",
    "Each measurement is a process of its own: `mergekit-yaml RECIPE OUT",
    "--quiet` and `jaxmerge merge RECIPE OUT --quiet`.",
    "",
  ]
  if records:
    available = [one["available"] / 1e9 for one in records]
    text += [
      "## Goals",
      "",
      _turns.table(["goal", "measured", "met"], _mergekit_times.goals(records)),
      "",
      "## Speed and memory",
      "",
      "A Llama-type model of 1.1 billion parameters in bfloat16, 2.2 GB; three",
      "inputs, besides a base where the rule has one; slerp merges the base",
      "and one model. Seconds are medians with their range, from the start of",
      "the process to its end; nobody waits for the disk to have written. The",
      "sides take turns. The copy is `cat` of all inputs to nowhere and `cp`",
      "of one. Memory is the largest reading of `/proc/PID/status`, every 20",
      "ms: anonymous pages, and file pages, which are those of memory-mapped",
      "inputs and can be dropped by the system; the peak is `getrusage`'s, of",
      "both kinds together. jaxmerge's compiled programs are kept from run to",
      "run, as they are by default; the first run of all starts without them.",
      "mergekit knows no magmax and no TIES over the whole vector: beside them",
      "stand the times of its nearest rule, which does less.",
      "",
      f"Before the measurements {min(available):.1f} to {max(available):.1f} GB"
      " of memory were",
      "available. How busy others kept the processors is known of"
      f" {sum('others' in one for one in records)} of",
      f"{len(records)} measurements; those with more than"
      f" {_mergekit_speed.OTHERS:g} processors",
      "were made again. They were made in pieces of minutes, and long ones of",
      "mergekit once.",
      "",
    ]
    for cache, note in (
      ("warm", "The inputs were read just before."),
      (
        "cold",
        "The pages of the inputs were dropped with"
        " `posix_fadvise(POSIX_FADV_DONTNEED)`, which needs no rights.",
      ),
    ):
      here = [one for one in records if one["cache"] == cache]
      if here:
        shares = [
          100 * one["cached"] for one in here if one["cached"] is not None
        ]
        if shares:
          note += (
            f" `fincore` found {min(shares):.0f}% to {max(shares):.0f}% of"
            " their bytes cached."
          )
        text += [f"### Page cache {cache}", "", note, ""]
        text += [_mergekit_times.speed_table(here, cache), ""]
    text += ["### Numbers of inputs", ""]
    text += ["Three models; with more inputs their files are hard-linked.", ""]
    text += [_mergekit_times.inputs_table(records), ""]
  if results["parity"]:
    text += [
      "## The same numbers",
      "",
      "Models of random weights with perturbations of half a standard",
      "deviation, and MiniLM. The largest difference is taken over its",
      "tensor's largest magnitude. In float32 those entries are counted that",
      "differ by more than 1e-5 of that magnitude, in the narrow formats those",
      "that are more than one unit in the last place (ulp) apart; near zero,",
      "where terms cancel, many units are a small difference. mergekit reckons",
      "in the format of its inputs, jaxmerge in float32 before it rounds: the",
      "second group of columns is against mergekit with `dtype: float32` and",
      "the narrow `out_dtype`, the third is mergekit's own result against",
      "that one. Random methods draw differently: of what they add to the",
      "base, mean and mean square are compared in standard errors of their",
      "difference; the limit is exceeded by chance once in a hundred.",
      "",
      _RAW_REASONS,
      _REASONS,
      *_mergekit_tables.parity_tables(results["parity"]),
    ]
  return "\n".join(text).rstrip() + "\n"
