"""A frozen head of the embeddings of class names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.models import _transformer


def class_embeddings(
  embed_fn: Callable[[list[str]], Any],
  class_names: Sequence[str],
  templates: Sequence[str] = ("{}",),
) -> jax.Array:
  r"""Embeddings of class names, the frozen head of a zero-shot classifier.

  .. math::
    w_c = \frac{m_c}{\|m_c\|}, \quad
    m_c = \frac{1}{P} \sum_{p=1}^P
      \frac{e(\mathrm{template}_p(c))}{\|e(\mathrm{template}_p(c))\|}

  The logits of an input of the unit embedding :math:`z` are
  :math:`s \cdot z^T w_c`, with the model's scale :math:`s`.

  Args:
    embed_fn: ``embed_fn(texts) -> [n, dim]``, called once a class with as many
      texts as there are templates.
    class_names: The names, each once.
    templates: Texts with one ``{}`` for the name.

  Returns:
    float32 ``[classes, dim]``, rows of length 1.

  Raises:
    ValueError: If a name is absent or occurs twice, or a template has no place
      for it.

  References:
    Radford et al., `Learning transferable visual models from natural language
    supervision <https://arxiv.org/abs/2103.00020>`_, 2021

  >>> embed = lambda texts: jnp.array([[len(text), 0.0] for text in texts])
  >>> print(class_embeddings(embed, ["cat", "dog"], ["a {}", "the {}"]))
  [[1. 0.]
   [1. 0.]]
  """
  names = list(class_names)
  if not names:
    raise ValueError("there is no class name; give one for each class")
  for place, name in enumerate(names):
    if not isinstance(name, str) or not name.strip():
      raise ValueError(
        f"class {place} has no name ({name!r}); give one for each class"
      )
    if name in names[:place]:
      raise ValueError(
        f"classes {names.index(name)} and {place} are both named {name!r}: no"
        " head can tell them apart; give each its own name"
      )
  if not len(templates):
    raise ValueError("there is no template; give '{}' for the name alone")
  for template in templates:
    if template.count("{}") != 1:
      raise ValueError(
        f"the template {template!r} must have one {{}}, for the name"
      )
  rows = []
  for name in names:
    texts = [template.replace("{}", name) for template in templates]
    found = _transformer.unit(jnp.asarray(embed_fn(texts)))
    rows.append(np.asarray(found.mean(axis=0)))
  return _transformer.unit(jnp.asarray(np.stack(rows)))
