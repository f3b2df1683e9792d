"""Secateur makes a language model smaller, on the machine at hand, without training it.

>>> import secateur
>>> recipe = secateur.Recipe(remove="20%")
>>> result = secateur.prune("path/to/model", "path/to/output", recipe)   # doctest: +SKIP
>>> secateur.evaluate(result.out).value                                  # doctest: +SKIP
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.checkpoint import open_checkpoint as open_model
    from secateur.comparison.run import compare
    from secateur.evaluation import evaluate, zero_shot
    from secateur.exporting import export, verify
    from secateur.pipeline import make_plan as plan
    from secateur.plans import Plan
    from secateur.pruning import prune
    from secateur.recipe import Recipe, load_recipe
    from secateur.recovery import heal
    from secateur.semi_structured import semi_structured

try:
    __version__ = version("secateur")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

#: Where each public name lives. They are imported when first used: torch takes a second.
_HOMES = {
    "Plan": ("secateur.plans", "Plan"),
    "Recipe": ("secateur.recipe", "Recipe"),
    "compare": ("secateur.comparison.run", "compare"),
    "evaluate": ("secateur.evaluation", "evaluate"),
    "export": ("secateur.exporting", "export"),
    "heal": ("secateur.recovery", "heal"),
    "load_recipe": ("secateur.recipe", "load_recipe"),
    "open_model": ("secateur.checkpoint", "open_checkpoint"),
    "plan": ("secateur.pipeline", "make_plan"),
    "prune": ("secateur.pruning", "prune"),
    "semi_structured": ("secateur.semi_structured", "semi_structured"),
    "verify": ("secateur.exporting", "verify"),
    "zero_shot": ("secateur.evaluation", "zero_shot"),
}

__all__ = [
    "Plan",
    "Recipe",
    "SecateurError",
    "compare",
    "evaluate",
    "export",
    "heal",
    "load_recipe",
    "open_model",
    "plan",
    "prune",
    "semi_structured",
    "verify",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
