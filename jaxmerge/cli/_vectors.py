"""`jaxmerge extract` and `jaxmerge apply`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jaxmerge.cli import _info, _options, _show

if TYPE_CHECKING:
  from jaxmerge.recipes import LoraReport

_DTYPES = ("bfloat16", "float16", "float32", "float64")


@click.command("extract")
@click.argument("base")
@click.argument("tuned")
@click.argument("out")
@click.option(
  "--rank",
  type=click.IntRange(min=1),
  help="Write an adapter (LoRA) of this rank, in PEFT's layout.",
)
@click.option(
  "--save-rest",
  is_flag=True,
  help="Put tensors that are no linear layers into the adapter as they are.",
)
@click.option(
  "--select",
  metavar="REGEX",
  help="Take the tensors alone in whose names it finds a match.",
)
@click.option(
  "--dtype",
  type=click.Choice(_DTYPES),
  default="float32",
  show_default=True,
  help="Of the result.",
)
@_options.shared("overwrite", "max_shard_size", "weights_only", "quiet", "json")
def extract_command(
  base: str,
  tuned: str,
  out: str,
  rank: int | None,
  save_rest: bool,
  select: str | None,
  dtype: str,
  overwrite: bool,
  max_shard_size: int,
  weights_only: bool,
  quiet: bool,
  as_json: bool,
) -> int:
  """Writes what TUNED differs in from BASE into the folder OUT.

  A task vector, TUNED - BASE, as a checkpoint; with --rank the nearest adapter
  of that rank. Both can be added to a network by jaxmerge apply.
  """
  from jaxmerge import recipes

  if save_rest and rank is None:
    raise click.UsageError(
      "--save-rest is for adapters: give --rank, or leave it out."
    )
  options: dict[str, Any] = {
    "dtype": dtype,
    "select": select,
    "overwrite": overwrite,
    "weights_only": weights_only,
  }
  bar = _show.Bar(False if quiet or as_json else None)
  try:
    if rank is not None:
      lora = recipes.extract_lora(
        base, tuned, out, rank, save_rest=save_rest, seen=bar, **options
      )
    else:
      vector = recipes.extract(
        base, tuned, out, max_shard_bytes=max_shard_size, seen=bar, **options
      )
  finally:
    bar.close()
  if rank is not None:
    _print_lora(lora, as_json)
  elif as_json:
    _show.as_json(vector._asdict())
  else:
    click.echo(
      f"{vector.out}: {len(vector.tensors)} tensors,"
      f" {_show.size(vector.bytes_written)}"
    )
    for name, why in vector.left_out.items():
      click.echo(f"left out: {name}, {why}")
  return 0


def _print_lora(report: LoraReport, as_json: bool) -> None:
  if as_json:
    _show.as_json(
      {
        **report._asdict(),
        "kept": [one._asdict() for one in report.kept],
        "left_out": [one._asdict() for one in report.left_out],
      }
    )
    return
  rows = [("tensor", "shape", "norm", "kept")]
  rows += [
    (one.name, _info.shape(one.shape), f"{one.norm:.4g}", f"{one.share:.2%}")
    for one in report.kept
  ]
  click.echo(_show.table(rows, right=[2, 3]))
  for other in report.left_out:
    what = "saved whole" if other.saved else "left out"
    click.echo(f"{what}: {other.name}, norm {other.norm:.4g} ({other.why})")
  click.echo(
    f"{report.out}: rank {report.rank}, {_show.size(report.bytes_written)},"
    f" {report.share:.2%} of the squared norm of all changes"
  )
  if any(not one.saved for one in report.left_out):
    click.echo("What is left out can be put in whole by --save-rest.")


@click.command("apply")
@click.argument("base")
@click.argument("vector")
@click.argument("out")
@click.option(
  "--scale",
  type=float,
  default=1.0,
  show_default=True,
  help="What the vector is multiplied by.",
)
@_options.shared("overwrite", "max_shard_size", "weights_only", "quiet", "json")
def apply_command(
  base: str,
  vector: str,
  out: str,
  scale: float,
  overwrite: bool,
  max_shard_size: int,
  weights_only: bool,
  quiet: bool,
  as_json: bool,
) -> int:
  """Adds VECTOR to BASE, and writes the network into the folder OUT.

  VECTOR is what jaxmerge extract wrote, or an adapter (LoRA) in PEFT's layout.
  """
  from jaxmerge import recipes

  bar = _show.Bar(False if quiet or as_json else None)
  try:
    report = recipes.apply_vector(
      base,
      vector,
      out,
      scale=scale,
      overwrite=overwrite,
      max_shard_bytes=max_shard_size,
      weights_only=weights_only,
      seen=bar,
    )
  finally:
    bar.close()
  if as_json:
    _show.as_json(report._asdict())
    return 0
  click.echo(
    f"{report.out}: {len(report.changed)} tensors changed,"
    f" {len(report.copied)} copied, {_show.size(report.bytes_written)}"
  )
  return 0
