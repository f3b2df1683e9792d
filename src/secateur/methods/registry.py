"""Methods by their names: all that there are, the best one, and one with the options of a user."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from secateur.errors import RecipeError
from secateur.forms import Form
from secateur.methods.base import AnyMethod

_REGISTRY: dict[str, type[AnyMethod]] = {}
AMethod = TypeVar("AMethod", bound=AnyMethod)


def register(method: type[AMethod]) -> type[AMethod]:
    """Class decorator that makes a method known by its name."""
    _REGISTRY[method.name] = method
    return method


def _load_all() -> None:
    import secateur.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def best_method(structure: Any, options: Sequence[str], *, zeros: bool = False) -> str:
    """The method that measures best of those that can do what is asked (docs/obs.md).

    Args:
        structure: of the recipe; only ``comp`` removes inputs of single layers.
        options: names of the settings that the user gave.
        zeros: whether weights become zero and nothing is removed.
    """
    if zeros:
        return "apt"
    _load_all()
    for name in ("obs", "comp"):
        if set(options) <= set(_REGISTRY[name].Options.model_fields) and (
            name == "comp" or structure != "inputs"
        ):
            return name
    return "obs"  # which will say what settings there are


def method_class(name: str) -> type[AnyMethod]:
    """The class of the method called ``name``.

    Raises:
        RecipeError: no such method.
    """
    names = method_names()
    if name not in _REGISTRY:
        raise RecipeError(f"method {name} is not known: choose one of {', '.join(names)}")
    return _REGISTRY[name]


def check_makes_zeros(name: str, zeros: bool, option: str) -> None:
    """Whether the method is of the kind that the recipe's target asks for; unknown ones pass.

    Args:
        zeros: whether zeros are asked for.
        option: where the user said so.

    Raises:
        ValueError: it is of the other kind.
    """
    _load_all()
    kinds = {key: cls.makes_zeros for key, cls in _REGISTRY.items()}
    if name not in kinds or kinds[name] == zeros:
        return
    others = ", ".join(sorted(key for key, kind in kinds.items() if kind == zeros))
    if zeros:
        raise ValueError(
            f"{option} {name} removes parameters and makes no zeros: with --sparsity choose one of "
            f"{others}"
        )
    raise ValueError(
        f"{option} {name} makes zeros and removes no parameters: give it --sparsity 50% or 2:4, or "
        f"choose one of {others}"
    )


def get_method(name: str, options: dict[str, Any], form: Form | None = None) -> AnyMethod:
    """The method called ``name`` with these options, for models of this form.

    Raises:
        RecipeError: no such method, or an option it does not have or allow.
    """
    from pydantic import ValidationError

    method = method_class(name)
    try:
        return method(method.Options(**options), form or Form())
    except ValidationError as error:
        raise RecipeError(explain(error, f"option of method {name}", method.Options)) from error


def explain(error: Any, what: str, model: type[BaseModel]) -> str:
    """One line for the first thing pydantic found wrong."""
    errors = error.errors()
    first = errors[0]
    # Options are flat; what stands behind the field's name is a branch of its union.
    field = first["loc"][:1]
    where = str(field[0]) if field else "(whole)"
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(model.model_fields))
        return f"{what} {where} is not known: allowed are {allowed}"
    wrong = ", or ".join(e["msg"] for e in errors if e["loc"][:1] == field)
    return f"{what} {where} is {first.get('input')!r}: {wrong}"
