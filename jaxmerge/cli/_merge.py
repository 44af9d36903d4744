"""`jaxmerge merge` and `jaxmerge validate`."""

from __future__ import annotations

import os
import pathlib
import time

import click

from jaxmerge.cli import _options, _show


def keep_programs() -> None:
  """Keeps compiled programs for later runs, unless told where they are kept."""
  import jax
  import platformdirs

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    folder = pathlib.Path(platformdirs.user_cache_dir("jaxmerge")) / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@click.command("merge")
@click.argument("config", type=click.Path(path_type=pathlib.Path))
@click.argument("out", type=click.Path(path_type=pathlib.Path), required=False)
@click.option(
  "--dry-run", is_flag=True, help="Print what would be done, and stop."
)
@_options.shared("overwrite", "max_shard_size")
@click.option(
  "--verify",
  is_flag=True,
  help="Compare a result (the one argument) with its checksums.",
)
@_options.shared("quiet", "weights_only", "json")
def merge_command(
  config: pathlib.Path,
  out: pathlib.Path | None,
  dry_run: bool,
  overwrite: bool,
  max_shard_size: int,
  verify: bool,
  quiet: bool,
  weights_only: bool,
  as_json: bool,
) -> int:
  """Merges models by the recipe CONFIG into the folder OUT.

  CONFIG is mergekit's YAML, see docs/checkpoints.md.
  """
  from jaxmerge import recipes

  if verify:
    return _verify(config if out is None else out, as_json)
  if dry_run:
    return _plan(config, max_shard_size, weights_only, as_json)
  if out is None:
    raise click.UsageError("Say where to: jaxmerge merge CONFIG OUT")
  keep_programs()
  bar = _show.Bar(False if quiet or as_json else None)
  start = time.monotonic()
  try:
    report = recipes.merge_checkpoints(
      config,
      out,
      overwrite=overwrite,
      max_shard_bytes=max_shard_size,
      weights_only=weights_only,
      seen=bar,
    )
  finally:
    bar.close()
  seconds = time.monotonic() - start
  if as_json:
    _show.as_json(
      {
        "out": str(report.out),
        "tensors": report.tensors,
        "bytes_written": report.bytes_written,
        "bytes_read": report.bytes_read,
        "resumed": report.resumed,
        "missing_tokens": report.missing_tokens,
        "seconds": round(seconds, 3),
      }
    )
    return 0
  rate = _show.size((report.bytes_read + report.bytes_written) / seconds)
  again = f", {report.resumed} files were there" if report.resumed else ""
  click.echo(
    f"{report.out}: {report.tensors} tensors,"
    f" {_show.size(report.bytes_written)} in {seconds:.1f} s ({rate}/s){again}"
  )
  for name, number in report.missing_tokens.items():
    if number:
      click.echo(f"{name}: {number} tokens have rows of other models")
  return 0


def _plan(
  config: pathlib.Path, shard: int, weights_only: bool, as_json: bool
) -> int:
  import dataclasses

  from jaxmerge import recipes

  plan = recipes.plan_merge(
    config, max_shard_bytes=shard, weights_only=weights_only
  )
  if as_json:
    _show.as_json(dataclasses.asdict(plan))
    return 0
  rows = [("tensor", "dtype", "shape", "method", "models")]
  rows += [
    (
      one["name"],
      one["dtype"],
      "x".join(map(str, one["shape"])) or "scalar",
      one["method"],
      ", ".join(one["models"]),
    )
    for one in plan.tensors
  ]
  click.echo(_show.table(rows))
  click.echo(
    f"\n{len(plan.tensors)} tensors in {len(plan.files)} files;"
    f" read {_show.size(plan.bytes_to_read)},"
    f" write {_show.size(plan.bytes_to_write)},"
    f" memory about {_show.size(plan.peak_bytes)} beside the program"
  )
  return 0


def _verify(out: pathlib.Path, as_json: bool) -> int:
  from jaxmerge import recipes

  problems = recipes.verify(out)
  if as_json:
    _show.as_json({"out": str(out), "problems": problems})
  else:
    for problem in problems:
      click.echo(problem, err=True)
    if not problems:
      click.echo(f"{out}: as it was merged, and so are its models.")
  return 1 if problems else 0


@click.command("validate")
@click.argument("config", type=click.Path(path_type=pathlib.Path))
@_options.shared("json")
def validate_command(config: pathlib.Path, as_json: bool) -> int:
  """Checks the recipe CONFIG without opening its models."""
  from jaxmerge import recipes

  _, recipe = recipes.load(config)
  if as_json:
    _show.as_json(recipe.model_dump(mode="json", exclude_none=True))
  else:
    click.echo(f"{config}: a recipe for {recipe.merge_method}.")
  return 0
