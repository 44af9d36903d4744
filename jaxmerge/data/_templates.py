"""Texts around class names, as CLIP's authors published them."""

from __future__ import annotations

import functools
import importlib.resources
import json

from jaxmerge.data._dataset import DataError


@functools.lru_cache(maxsize=1)
def _sets() -> dict[str, list[str]]:
  file = importlib.resources.files("jaxmerge.data") / "clip_templates.json"
  return json.loads(file.read_text(encoding="utf-8"))


def clip_templates(name: str) -> tuple[str, ...]:
  """The texts that CLIP's authors put a set's class names into.

  Args:
    name: "cifar100", "imagenet" (for ImageNet-R, too), "cars" or "birds".

  Returns:
    The templates, each with one `{}`.

  Raises:
    DataError: the name is unknown.

  References:
    Radford et al., `Learning transferable visual models from natural language
    supervision <https://arxiv.org/abs/2103.00020>`_, 2021; the files
    data/prompts.md and notebooks/Prompt_Engineering_for_ImageNet.ipynb of
    github.com/openai/CLIP (MIT).

  >>> clip_templates("cars")[3]
  'i love my {}!'
  """
  found = _sets()
  if name not in found:
    raise DataError(
      f"there are no templates {name!r}: choose one of {', '.join(found)}."
    )
  return tuple(found[name])
