"""`jaxmerge methods`."""

from __future__ import annotations

from typing import Any

import click

from jaxmerge.cli import _options, _show


@click.command("methods")
@click.argument("name", required=False)
@_options.shared("json")
def methods_command(name: str | None, as_json: bool) -> int:
  """Lists the merge methods, or the options of one."""
  import inspect

  from jaxmerge import recipes
  from jaxmerge.recipes import _methods

  found = recipes.methods()
  if name is not None and name not in found:
    raise recipes.RecipeError(
      f"There is no method {name!r}. {_methods.near(name, sorted(found))}"
    )

  def default(value: Any) -> Any:
    return "required" if value is inspect.Parameter.empty else value

  chosen = [found[name]] if name else list(found.values())
  rows: list[dict[str, Any]] = [
    {
      "name": one.name,
      "summary": one.summary,
      "base": one.base,
      "models": f"{one.least} or more"
      if one.most is None
      else f"{one.least}"
      if one.least == one.most
      else f"{one.least} to {one.most}",
      "parameters": {k: default(v) for k, v in one.parameters.items()},
      "of_models": {k: default(v) for k, v in one.of_models.items()},
    }
    for one in chosen
  ]
  if as_json:
    _show.as_json(rows)
  elif name is None:
    lines = [("method", "base", "models", "what it does")]
    lines += [
      (row["name"], row["base"], row["models"], row["summary"]) for row in rows
    ]
    click.echo(_show.table(lines))
  else:
    (row,) = rows
    click.echo(
      f"{row['name']}: {row['summary']}\n"
      f"base_model: {row['base']}; models: {row['models']}"
    )
    options = [("parameter", "of", "default")]
    for kind, owner in (("parameters", "the merge"), ("of_models", "a model")):
      options += [(key, owner, str(value)) for key, value in row[kind].items()]
    click.echo(_show.table(options))
  return 0
