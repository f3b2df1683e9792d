"""The cells of a comparison: one setting of one method, one share, one seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.recipe import Recipe, load_recipe, make_recipe


@dataclass(frozen=True)
class Cell:
    """One model to be made and measured.

    Attributes:
        label: the setting's name in the table: a method, or a recipe's file.
        recipe: everything that decides the bytes of the model.
    """

    label: str
    recipe: Recipe

    @property
    def asked(self) -> str:
        """What is to go or to be left, for the table: ``20% of the decoder``."""
        recipe = self.recipe
        zeros = f"{recipe.sparsity} zeros" if recipe.sparsity is not None else ""
        if zeros and recipe.then is None:
            return zeros
        if recipe.remove is not None:
            gone = f"{recipe.remove} of {'the decoder' if recipe.of == 'decoder' else 'all'}"
        else:
            left = recipe.params if recipe.params is not None else recipe.size
            gone = f"{left} {'parameters' if recipe.params is not None else ''}".strip() + " left"
        return f"{gone}, {zeros}" if zeros else gone

    @property
    def name(self) -> str:
        """Name of the cell's files: ``comp-20-of-decoder-seed0``."""
        asked = self.asked.replace(" of the decoder", " of decoder").replace(" of all", "")
        text = f"{self.label}-{asked.replace('%', '')}-seed{self.recipe.seed}"
        return re.sub(r"[^\w.]+", "-", text)


def make_cells(
    *,
    methods: Sequence[str] = (),
    recipes: Sequence[str | Path] = (),
    remove: Sequence[str] = (),
    sparsity: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    **fields: Any,
) -> list[Cell]:
    """All cells, in the order in which they are run: a whole grid for the first seed comes first.

    Args:
        methods: names of methods; each is a setting.
        recipes: YAML files; each is a setting called by the file's name. Fields given here win
            over those in the file.
        remove: shares, such as ``20%``. A recipe that has its own target needs none.
        sparsity: zeros, such as ``50%`` or ``2:4``, for the methods that make them.
        seeds: of everything that is drawn; by default a recipe's own, and 0.
        fields: recipe fields that hold for every cell. In ``options``, ``comp.order`` is the
            option ``order`` of the rows of method ``comp`` alone.

    Raises:
        RecipeError: nothing to compare, an unknown method, option or field, or two settings of one
            name.
    """
    from secateur.methods import get_method, method_class

    _check(methods, recipes, remove, sparsity, fields)
    own: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {}
    for name, value in (fields.pop("options", None) or {}).items():
        method, dot, option = name.partition(".")
        if dot:
            own.setdefault(method, {})[option] = value
        else:
            common[name] = value

    def makes_zeros(setting: str | Path) -> bool:
        if isinstance(setting, Path):
            return _asks_for_zeros(setting)
        # Of random there are two; where nothing is to be removed, zeros are meant.
        name = "random-sparse" if setting == "random" and not remove else setting
        return method_class(name).makes_zeros

    def cell(setting: str | Path, target: tuple[str, str] | None, seed: int | None) -> Cell:
        given: dict[str, Any] = {**fields, "options": dict(common)}
        if target is not None:
            given[target[0]] = target[1]
            if target[0] == "sparsity":
                given.pop("of", None)  # says what the other rows' shares are of
        if seed is not None:
            given["seed"] = seed
        if isinstance(setting, str):
            given["options"] |= own.get(setting, {})
            return Cell(setting, make_recipe(method=setting, **given))
        try:
            method = load_recipe(setting, **given).method
            given["options"] |= own.get(method, {})
            recipe = load_recipe(setting, **given)
            get_method(recipe.method, recipe.options)
        except RecipeError as error:  # of several files it should be said which
            if str(setting) in str(error):
                raise
            raise RecipeError(f"recipe {setting}: {error}") from error
        return Cell(setting.stem, recipe)

    settings: list[str | Path] = list(dict.fromkeys(methods))
    settings += dict.fromkeys(Path(recipe) for recipe in recipes)
    every_seed: list[int | None] = list(dict.fromkeys(seeds)) if seeds else [None]
    targets = [("remove", share) for share in dict.fromkeys(remove)]
    targets += [("sparsity", zeros) for zeros in dict.fromkeys(sparsity)]
    kinds = {setting: "sparsity" if makes_zeros(setting) else "remove" for setting in settings}
    for setting, kind in kinds.items():
        if isinstance(setting, str) and kind not in {name for name, _ in targets}:
            other = "--remove 20%" if kind == "remove" else "--sparsity 50%,2:4"
            raise RecipeError(f"--methods {setting} needs a target of its kind: give {other}")
    alone = [s for s, kind in kinds.items() if kind not in {name for name, _ in targets}]
    found = [
        cell(setting, target, seed)
        for seed in every_seed
        for target in [None, *targets]
        for setting in settings
        if (setting in alone if target is None else kinds[setting] == target[0])
    ]
    _check_cells(found, own)
    return found


def _check(
    methods: Sequence[str],
    recipes: Sequence[str | Path],
    remove: Sequence[str],
    sparsity: Sequence[str],
    fields: Mapping[str, Any],
) -> None:
    if not methods and not recipes:
        raise RecipeError(
            "there is nothing to compare: name methods with --methods comp,obs, or recipe files "
            "with --recipes a.yaml,b.yaml"
        )
    if methods and not remove and not sparsity:
        raise RecipeError("--methods needs shares to remove: give --remove 10%,20%,30%")
    for single, several in (("seed", "seeds"), ("method", "methods")):
        if single in fields:
            raise RecipeError(f"a comparison takes {several}, a list, and not {single}")


def _asks_for_zeros(file: Path) -> bool:
    """Whether a recipe makes zeros alone; what is wrong with the file, its cells will say."""
    from secateur.methods import method_class
    from secateur.recipe import read_fields

    try:
        raw = read_fields(file)
        if raw.get("sparsity") is not None:
            return raw.get("then") is None
        return method_class(raw["method"]).makes_zeros
    except Exception:  # no such file, not YAML, no method named, an unknown one
        return False


def _check_cells(cells: Sequence[Cell], own: Mapping[str, Any]) -> None:
    from secateur.methods import get_method

    for cell in cells:
        get_method(cell.recipe.method, cell.recipe.options)
    known = sorted({cell.recipe.method for cell in cells})
    for method, options in own.items():
        if method not in known:
            raise RecipeError(
                f"--set {method}.{next(iter(options))} is for method {method}, which is not "
                f"compared: methods here are {', '.join(known)}"
            )
    names: dict[str, Cell] = {}
    for cell in cells:
        other = names.setdefault(cell.name.lower(), cell)
        if other is not cell:
            raise RecipeError(
                f"two rows would be called {cell.label} at {cell.asked}: give the recipe files "
                "names of their own, which are the names of the rows"
            )
