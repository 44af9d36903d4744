"""`jaxmerge convert`."""

from __future__ import annotations

import click

from jaxmerge.cli import _options, _show


@click.command("convert")
@click.argument("source", metavar="IN")
@click.argument("out")
@click.option(
  "--to",
  type=click.Choice(["orbax", "safetensors"]),
  help="The layout of OUT; the other one than that of IN by default.",
)
@_options.shared(
  "overwrite",
  "max_shard_size",
  "weights_only",
  "quiet",
  "json",
  max_shard_size="Size from which on a further file of safetensors is begun.",
)
def convert_command(
  source: str,
  out: str,
  to: str | None,
  overwrite: bool,
  max_shard_size: int,
  weights_only: bool,
  quiet: bool,
  as_json: bool,
) -> int:
  """Writes the checkpoint IN of safetensors as Orbax's OUT, or back.

  Dots in names become nested mappings, and nested mappings dots; names that
  would not come back as they were are refused.
  """
  from jaxmerge import recipes

  bar = _show.Bar(False if quiet or as_json else None)
  try:
    report = recipes.convert(
      source,
      out,
      to=to,
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
    f"{report.out}: {report.layout}, {report.tensors} tensors,"
    f" {_show.size(report.bytes_written)}"
  )
  return 0
