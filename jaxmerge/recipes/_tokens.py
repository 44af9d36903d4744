"""Networks of different vocabularies: one tokenizer, and rows in its order."""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import _folder, _models, _schema, _yaml

Tensor = Any

# Tensors with a row for each token.
_ROWS = re.compile(
  r"(^|[./])(embed_tokens|wte|word_embeddings|token_embedding|shared|lm_head"
  r"|embed_out|predictions[./]decoder|predictions)[./](weight|bias)$"
)
_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


class Tokens(NamedTuple):
  """The tokenizer of a result, and where its rows come from.

  Attributes:
    tokenizer: the tokenizer, of the `tokenizers` library.
    donor: the folder that its other files are copied from.
    size: number of rows of the embeddings.
    missing: name of a model -> tokens that it has not.
  """

  tokenizer: Any
  donor: pathlib.Path
  size: int
  missing: dict[str, int]


class _Row(NamedTuple):
  """Where the row of a token comes from, for models that lack it.

  Attributes:
    model: the model; "" for zeros, None for the mean of those that have it.
    number: the row there.
  """

  model: str | None
  number: int = -1


def _load(opened: _models.OpenModel) -> Any:
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      "Merging vocabularies needs tokenizers: pip install 'jaxmerge[merge]'."
    ) from error
  return _from_file(tokenizers, opened.folder / _TOKENIZER)


def _from_file(tokenizers: Any, path: pathlib.Path) -> Any:
  if not path.exists():
    raise _yaml.RecipeError(
      f"{path} is missing: vocabularies are merged by it. Save the tokenizer"
      " as a fast one of transformers, or leave tokenizer_source out."
    )
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library has no kind of its own.
    raise _yaml.RecipeError(
      f"{path} is no tokenizer ({error}). Download it again."
    ) from error


def _vocabulary(opened: _models.OpenModel, tokenizer: Any) -> dict[str, int]:
  """Tokens with a row of their own in a network's embeddings."""
  vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
  rows = [
    tensor.shape[0]
    for name, tensor in opened.items()
    if _ROWS.search(name) and tensor.shape
  ]
  most = max(rows, default=len(vocabulary))
  return {token: row for token, row in vocabulary.items() if row < most}


def _by_row(vocabulary: Mapping[str, int]) -> list[str]:
  return sorted(vocabulary, key=lambda token: vocabulary[token])


def _union(
  base: Any, tokenizers: Mapping[str, Any], known: Mapping[str, dict[str, int]]
) -> Any:
  """The base's tokenizer with the tokens of all others added."""
  import tokenizers as library

  found = library.Tokenizer.from_str(base.to_str())
  for name, tokenizer in tokenizers.items():
    mine = found.get_vocab(with_added_tokens=True)
    added = {
      one.content: one for one in tokenizer.get_added_tokens_decoder().values()
    }
    for token in _by_row(known[name]):
      if token in mine:
        continue
      one = added.get(token, library.AddedToken(token, normalized=False))
      if one.special:
        found.add_special_tokens([one])
      else:
        found.add_tokens([one])
  return found


def merge_tokens(
  document: _yaml.Document,
  recipe: _schema.Recipe,
  models: dict[str, _models.OpenModel],
  base: str,
) -> Tokens | None:
  """Gives all models one vocabulary: that which the recipe asks for.

  A model's row of a token that it has stays its own. Others are those of the
  base, or of the one model that has the token, or the mean of those that do.

  Args:
    document: for the lines of messages.
    recipe: the recipe.
    models: the opened models; their embeddings are replaced.
    base: the base, or the first model.

  Returns:
    The tokenizer of the result; None if the recipe asks for none.

  Raises:
    RecipeError: a tokenizer is missing or damaged, does not fit the
      embeddings, or a token's source is not there.
  """
  settings = recipe.tokenizer
  if settings is None:
    if recipe.tokenizer_source is None:
      return None
    settings = _schema.Tokenizer(
      source=recipe.tokenizer_source, pad_to_multiple_of=None
    )
  loaded = {name: _load(opened) for name, opened in models.items()}
  known = {name: _vocabulary(models[name], one) for name, one in loaded.items()}
  donor = models[base].folder
  if settings.source == "base":
    tokenizer = loaded[base]
  elif settings.source == "union":
    others = {name: one for name, one in loaded.items() if name != base}
    tokenizer = _union(loaded[base], others, known)
  else:
    opened = _models.OpenModel(settings.source)
    tokenizer, donor = _load(opened), opened.folder
  given = dict(settings.tokens or {})
  mine = tokenizer.get_vocab(with_added_tokens=True)
  tokenizer.add_tokens([token for token in given if token not in mine])
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  if settings.source == "base":
    vocabulary = {
      token: row
      for token, row in vocabulary.items()
      if token in known[base] or token in given
    }
  size = max(vocabulary.values()) + 1
  multiple = settings.pad_to_multiple_of or 1
  padded = -(-size // multiple) * multiple
  rows = _rows(document, given, vocabulary, known, base)
  own = {
    name: {
      row: known[name][token]
      for token, row in vocabulary.items()
      if token in known[name] and not _forced(given, token)
    }
    for name in models
  }
  replaced: dict[str, dict[str, Tensor]] = {name: {} for name in models}
  for name, opened in models.items():
    for tensor_name, tensor in opened.items():
      if not _ROWS.search(tensor_name) or not tensor.shape:
        continue
      if tensor.shape[0] <= max(known[name].values(), default=-1):
        raise _yaml.RecipeError(
          f"{tensor_name!r} of {name} has {tensor.shape[0]} rows, and its"
          f" {_TOKENIZER} tokens up to {max(known[name].values())}: they do not"
          " belong together."
        )
      sources = {
        other: models[other][tensor_name]
        for other in models
        if tensor_name in models[other]
      }
      replaced[name][tensor_name] = checkpoints.LoadedTensor(
        tensor_name,
        (padded, *tensor.shape[1:]),
        tensor.dtype,
        functools.partial(
          _arrange, tensor, sources, own[name], own, rows, (size, padded)
        ),
        (tensor,),
      )
  for name, tensors in replaced.items():
    models[name].replace(tensors)
  missing = {
    name: sum(token not in known[name] for token in vocabulary)
    for name in models
  }
  return Tokens(tokenizer, donor, padded, missing)


def _forced(given: Mapping[str, _schema.Token], token: str) -> bool:
  return token in given and given[token].force


def _rows(
  document: _yaml.Document,
  given: Mapping[str, _schema.Token],
  vocabulary: Mapping[str, int],
  known: Mapping[str, dict[str, int]],
  base: str,
) -> dict[int, _Row]:
  """Where rows come from that a model lacks."""
  found = {}
  for token, row in vocabulary.items():
    owners = [name for name in known if token in known[name]]
    source = given[token].source if token in given else None
    if source is not None:
      found[row] = _given(document, token, source, known)
    elif not owners:
      found[row] = _Row("")
    elif base in owners:
      found[row] = _Row(base, known[base][token])
    elif len(owners) == 1:
      found[row] = _Row(owners[0], known[owners[0]][token])
    else:
      found[row] = _Row(None)
  return found


def _given(
  document: _yaml.Document,
  token: str,
  source: _schema.TokenSource | _schema.Model,
  known: Mapping[str, dict[str, int]],
) -> _Row:
  """A row that the recipe names."""
  place = ("tokenizer", "tokens", token, "source")
  model = source if isinstance(source, _schema.Model) else source.model
  if model is None:
    return _Row("")
  name = str(model)
  if name not in known:
    raise document.error(place, f"{name} is no model of this recipe.")
  wanted = token
  if isinstance(source, _schema.TokenSource):
    if source.token_id is not None:
      return _Row(name, source.token_id)
    wanted = source.token or token
  if wanted not in known[name]:
    raise document.error(place, f"{name} has no token {wanted!r}.")
  return _Row(name, known[name][wanted])


def _arrange(
  tensor: Tensor,
  sources: Mapping[str, Tensor],
  own: Mapping[int, int],
  all_own: Mapping[str, Mapping[int, int]],
  rows: Mapping[int, _Row],
  sizes: tuple[int, int],
) -> np.ndarray:
  """A model's embeddings in the order of the new vocabulary."""
  size, padded = sizes
  arrays = {name: np.asarray(source) for name, source in sources.items()}
  found = np.zeros((padded, *tensor.shape[1:]), tensor.dtype)
  mine = sorted(own)
  found[mine] = np.asarray(tensor)[[own[row] for row in mine]]
  lacking: dict[str, list[int]] = collections.defaultdict(list)
  for row, source in rows.items():
    if row in own or source.model == "":
      continue
    if source.model is None:
      parts = [
        arrays[name][held[row]]
        for name, held in all_own.items()
        if row in held and name in arrays
      ]
      mean = np.mean([part.astype(np.float32) for part in parts], axis=0)
      found[row] = mean.astype(tensor.dtype)
    else:
      lacking[source.model].append(row)
  for name, wanted in lacking.items():
    if name not in arrays:
      continue
    numbers = [rows[row].number for row in wanted]
    if max(numbers) >= len(arrays[name]):
      raise _yaml.RecipeError(
        f"{tensor.name!r} of {name} has no row {max(numbers)}. Give the number"
        " of a token that it has."
      )
    found[wanted] = arrays[name][numbers].astype(tensor.dtype)
  if padded > size:
    # Rows of no token, at the mean of all, are never the likeliest.
    mean = found[:size].astype(np.float32).mean(axis=0)
    found[size:] = mean.astype(tensor.dtype)
  return found


def write(tokens: Tokens, folder: pathlib.Path) -> None:
  """Writes the tokenizer of a result over the copied one.

  Args:
    tokens: what `merge_tokens` returned.
    folder: of the result.
  """
  config = _read(tokens.donor / _CONFIG)
  added = config.get("added_tokens_decoder")
  if isinstance(added, dict):
    for row, one in tokens.tokenizer.get_added_tokens_decoder().items():
      added.setdefault(
        str(row),
        {
          "content": one.content,
          "lstrip": one.lstrip,
          "normalized": one.normalized,
          "rstrip": one.rstrip,
          "single_word": one.single_word,
          "special": one.special,
        },
      )
  if config:
    _folder.write_json(folder / _CONFIG, config)
  tokens.tokenizer.save(str(folder / _TOKENIZER))


def write_template(
  document: _yaml.Document,
  wanted: str,
  models: Mapping[str, _models.OpenModel],
  folder: pathlib.Path,
) -> None:
  """Writes the chat template that a recipe asks for.

  Args:
    document: for the lines of messages.
    wanted: a template, or "auto" for that of most models.
    models: the models.
    folder: of the result.
  """
  template = wanted
  if wanted == "auto":
    found = [_template_of(opened.folder) for opened in models.values()]
    counted = collections.Counter(one.strip() for one in found if one)
    if not counted:
      return
    template = counted.most_common(1)[0][0]
  config = _read(folder / _CONFIG)
  config["chat_template"] = template
  _folder.write_json(folder / _CONFIG, config)
  (folder / _TEMPLATE).unlink(missing_ok=True)


def check_template(document: _yaml.Document, wanted: str | None) -> None:
  """Raises for a chat template that is none.

  Args:
    document: for the line of the message.
    wanted: what the recipe asks for.

  Raises:
    RecipeError: it is neither a template nor "auto".
  """
  if wanted not in (None, "auto") and "{" not in str(wanted):
    raise document.error(
      ("chat_template",),
      f"{wanted!r} is no template. Write the template itself (Jinja), or auto"
      " for that of most models.",
    )


def _template_of(folder: pathlib.Path) -> str | None:
  file = folder / _TEMPLATE
  if file.exists():
    return file.read_text()
  template = _read(folder / _CONFIG).get("chat_template")
  return template if isinstance(template, str) else None


def _read(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise _yaml.RecipeError(
      f"{path} is damaged ({error}). Download it again."
    ) from error
  return found if isinstance(found, dict) else {}
