"""The model card of a result."""

from __future__ import annotations

from jaxmerge.recipes import _plan


def make_card(plan: _plan.Plan, text: str, name: str) -> str:
  """Writes what was merged, and how.

  Args:
    plan: the plan.
    text: the recipe as YAML.
    name: of the result.

  Returns:
    README.md.
  """
  models = "\n".join(f"- {model}" for model in plan.models)
  listed = "\n".join(f"  - {model!r}" for model in plan.models)
  base = plan.recipe.base_model
  from_base = f", from the base {base}" if base is not None else ""
  return f"""---
base_model:
{listed}
tags:
  - merge
  - jaxmerge
---
# {plan.recipe.name or name}

Merged by jaxmerge with the method `{plan.method.name}`{from_base}.

{models}

```yaml
{text.strip()}
```
"""
