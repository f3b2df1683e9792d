"""What a method is: options, the share of each block, and a pure step for one block."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.forms import Form
from secateur.plans import BlockCut
from secateur.statistics import Moments

Quotas = dict[int, int]


@dataclass(frozen=True)
class Block:
    """What a method sees of a block.

    Attributes:
        source: its number in the original model.
        anatomy: of the model.
        weights: weight of each linear layer by path, (p, q), float32.
        moments: statistics of each signal that the method asked for.
        held_out: the same of the windows that a method keeps apart (:attr:`Method.held_out`); they
            are in ``moments`` too.
        generator: for methods that draw; seeded from the recipe's seed and the block's number.
    """

    source: int
    anatomy: Anatomy
    weights: dict[str, torch.Tensor]
    moments: dict[str, Moments]
    generator: torch.Generator
    held_out: dict[str, Moments] = field(default_factory=dict)


class AnyMethod(ABC):
    """A pruning method. It never opens a file, moves a device or prints.

    Attributes:
        name: what the user types.
        summary: one line for ``--help`` and the docs.
        Options: pydantic model of its own settings.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[BaseModel]]

    def __init__(self, options: BaseModel, form: Form) -> None:
        self.options: Any = options
        self.form = form

    def check(self, anatomy: Anatomy) -> None:  # noqa: B027, most have nothing to refuse
        """Refuse options that this model cannot have, before any work is done.

        Raises:
            RecipeError: with what is allowed.
        """


class Method(AnyMethod):
    """A method that removes whole blocks, or units inside each block by itself."""

    #: Share of the windows whose statistics a method also wants apart, to judge fits by.
    held_out: ClassVar[float] = 0.0

    @abstractmethod
    def layer_counts(self, most: int) -> Sequence[int]:
        """Numbers of whole blocks to try removing, none above ``most``; one means: no choice."""

    @abstractmethod
    def layer_importance(self, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        """Importance of a block from what goes in and comes out, (windows, length, hidden)."""

    @abstractmethod
    def signals(self, anatomy: Anatomy) -> set[str]:
        """Signals of which second moments are needed."""

    @abstractmethod
    def quotas(self, anatomy: Anatomy, importances: dict[int, float], total: int) -> Quotas:
        """Parameters that each remaining block shall lose, ``total`` together.

        Raises:
            RecipeError: the blocks cannot lose that much.
        """

    def unit(self, anatomy: Anatomy) -> int:
        """Parameters of the smallest piece that can go; quotas are made multiples of it."""
        return 1

    @property
    def carries(self) -> bool:
        """Whether a block's miss of its quota is made up for by the next: pieces of two sizes."""
        return False

    @abstractmethod
    def cut(self, block: Block, quota: int) -> BlockCut:
        """Choose what stays of one block so that ``quota`` parameters go."""

    @property
    @abstractmethod
    def identical_inputs(self) -> bool:
        """Whether statistics come from the uncut model rather than from the cut prefix."""


_REGISTRY: dict[str, type[AnyMethod]] = {}
AMethod = TypeVar("AMethod", bound=AnyMethod)


def register(method: type[AMethod]) -> type[AMethod]:
    """Class decorator that makes a method known by its name."""
    _REGISTRY[method.name] = method
    return method


def _load_all() -> None:
    import secateur.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "base":
            importlib.import_module(f"{package.__name__}.{module.name}")


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def method_class(name: str) -> type[AnyMethod]:
    """The class of the method called ``name``.

    Raises:
        RecipeError: no such method.
    """
    names = method_names()
    if name not in _REGISTRY:
        raise RecipeError(f"method {name} is not known: choose one of {', '.join(names)}")
    return _REGISTRY[name]


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
