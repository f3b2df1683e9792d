"""What the user asked for. Field texts here are also the command line's help."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import RecipeError
from secateur.sparsity import parse_sparsity

PARAMETER_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
BYTE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip

#: A recipe is a page of text: bytes of its file, and values in it, that are beyond reason.
MOST_BYTES = 2**16
MOST_VALUES = 10_000
#: Lists and fields inside one another; the time that PyYAML takes grows with the square of it.
MOST_DEPTH = 50


class CalibrationSpec(BaseModel):
    """Which text the statistics are taken from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "builtin",
        description="builtin, a text or JSONL file, or a name: c4, wikitext2, ptb, alpaca",
    )
    samples: int = Field(10, ge=2, description="windows of calibration text")
    length: int = Field(128, ge=8, description="tokens a window; never the model's maximum")
    text_field: str = Field("text", description="key of the text in a JSONL file")
    data_dir: str | None = Field(
        None, description="folder with local copies of the named sets; else they are fetched"
    )


class Recipe(BaseModel):
    """Everything that decides the bytes of the output, besides the model itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    remove: str | None = Field(
        None, description="share of the parameters to remove, with a percent sign: 20%"
    )
    params: str | None = Field(None, description="parameters to be left: 5.4B, 100M")
    size: str | None = Field(None, description="bytes of weights to be left: 300MB, 1.5GiB")
    sparsity: str | None = Field(
        None,
        description="zeros among the weights of each linear layer: a share, 50%, or N of every M "
        "inputs kept, 2:4; the model keeps its size",
    )
    of: Literal["model", "decoder"] = Field(
        "model", description="what --remove is a share of: all parameters, or the decoder blocks"
    )
    method: str = Field(
        "auto",
        description="pruning method; auto: obs, which measures best, or comp where structure "
        "inputs or one of its own settings is asked for",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="settings of the method; see its page in docs/"
    )
    then: str | None = Field(
        None,
        description="method that makes --sparsity zeros in what is left after --method has removed",
    )
    then_options: dict[str, Any] = Field(
        default_factory=dict, description="settings of that method"
    )
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    structure: Literal["auto", "coupled", "inputs"] = Field(
        "auto",
        description="what goes inside blocks: coupled (whole KV groups and FFN neurons), or inputs "
        "(columns of each linear layer, COMP's own form); auto: coupled",
    )
    layout: Literal["auto", "per-layer", "uniform"] = Field(
        "auto",
        description="widths: per-layer (each block its own), or uniform (all the same, for stock "
        "classes); auto: per-layer where the output can hold it",
    )
    round_to: int | Literal["auto"] = Field(
        "auto",
        description="FFN widths are multiples of this: 1, or a multiple of 32; auto: what kernels "
        "and quantisers like",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is drawn")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="type of the written weights; auto: as in the source"
    )

    @model_validator(mode="before")
    @classmethod
    def _best_method(cls, fields: Any) -> Any:
        """The method that auto stands for, so that everything downstream and on record names it."""
        if not isinstance(fields, dict):
            return fields
        for key in ("method", "then"):  # which of two methods of one name is meant, is clear
            zeros = fields.get("sparsity") is not None and (
                key == "then" or fields.get("then") is None
            )
            if zeros and fields.get(key) == "random":
                fields = {**fields, key: "random-sparse"}
        if fields.get("method", "auto") != "auto":
            return fields
        from secateur.methods import best_method

        options = fields.get("options")
        named = [str(name) for name in options] if isinstance(options, dict) else []
        zeros = fields.get("sparsity") is not None and fields.get("then") is None
        return {**fields, "method": best_method(fields.get("structure"), named, zeros=zeros)}

    @model_validator(mode="before")
    @classmethod
    def _whole_pieces(cls, fields: Any) -> Any:
        """One text for all that ``round_to`` cannot be, be it a number or not."""
        wish = fields.get("round_to", "auto") if isinstance(fields, dict) else "auto"
        if wish == "auto":
            return fields
        number = 0
        if isinstance(wish, int | str) and not isinstance(wish, bool):
            with suppress(ValueError):
                number = int(wish)
        if number != 1 and (number < 32 or number % 32):
            raise ValueError(
                f"--round-to is {wish}: allowed are auto, 1, and multiples of 32, which "
                "is the smallest piece that kernels and quantisers take; try --round-to 64"
            )
        return {**fields, "round_to": number}

    @model_validator(mode="after")
    def _one_target(self) -> Recipe:
        given = [name for name in ("remove", "params", "size") if getattr(self, name) is not None]
        zeros = self.sparsity is not None and self.then is None
        if len(given) + zeros != 1:
            said = " and ".join(f"--{name}" for name in [*given, *["sparsity"] * zeros])
            raise ValueError(
                "give exactly one of --remove, --params, --size and --sparsity, not "
                f"{said or 'none of them'}"
                + ("; --then METHOD makes zeros after a removal" if given and zeros else "")
            )
        if self.of == "decoder" and self.remove is None:
            raise ValueError("--of decoder goes with --remove")
        if self.then is not None and self.sparsity is None:
            raise ValueError(f"--then {self.then} needs the zeros to make: add --sparsity 2:4")
        if self.then_options and self.then is None:
            raise ValueError("then_options are settings of --then, which is not given")
        return self

    @model_validator(mode="after")
    def _fitting_methods(self) -> Recipe:
        """Whether methods that make zeros have a sparsity, and others something to remove."""
        from secateur.methods import check_makes_zeros

        zeros = self.sparsity is not None and self.then is None
        check_makes_zeros(self.method, zeros, "--method")
        if self.then is not None:
            check_makes_zeros(self.then, True, "--then")
        return self


def make_recipe(**fields: Any) -> Recipe:
    """A checked recipe.

    Raises:
        RecipeError: with one line that names the field.
    """
    try:
        recipe = Recipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = CalibrationSpec if where.startswith("calibration.") else Recipe
            raise RecipeError(
                f"recipe field {where} is not known: allowed are {', '.join(known.model_fields)}"
            ) from error
        text = first["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"recipe field {where} is {first.get('input')!r}: {text}" if where else text
        ) from error
    if recipe.remove is not None:
        parse_share(recipe.remove)
    if recipe.sparsity is not None:
        parse_sparsity(recipe.sparsity)
    return recipe


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a recipe from YAML; fields given here replace those in the file.

    Raises:
        RecipeError: no such file, not YAML, unknown or wrong fields.
    """
    raw = read_fields(path)
    calibration = raw.get("calibration") or {}
    if isinstance(calibration, dict):
        calibration = {**calibration, **overrides.pop("calibration", {})}
    options = raw.get("options") or {}
    if isinstance(options, dict):
        options = {**options, **overrides.pop("options", {})}
    targets = {"remove", "params", "size", "sparsity"}
    if any(overrides.get(name) is not None for name in targets):
        # A sparsity behind a removal is another matter: the one does not replace the other.
        chained = "then" in raw or overrides.get("then") is not None
        removal = any(overrides.get(name) is not None for name in targets - {"sparsity"})
        replaced = targets
        if chained:
            replaced = {"remove", "params", "size"} if removal else {"sparsity"}
        if "remove" in replaced and overrides.get("remove") is None:
            replaced = replaced | {"of"}  # says what a share is of, and there is no share any more
        raw = {k: v for k, v in raw.items() if k not in replaced}
    merged = {**raw, **overrides, "calibration": calibration, "options": options}
    return make_recipe(**merged)


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields of a recipe's file, which may be anybody's, before they are checked.

    Raises:
        RecipeError: no such file, not YAML, or far more in it than a recipe has.
    """
    import yaml

    try:
        file = Path(path).expanduser()
        if file.stat().st_size > MOST_BYTES:
            raise RecipeError(f"recipe {path} is larger than {MOST_BYTES:,} bytes: it is no recipe")
        text = file.read_text(encoding="utf-8")
        _check_depth(path, text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raw = None
        elif _values(node, {}) > MOST_VALUES:
            raise RecipeError(
                f"recipe {path} has more than {MOST_VALUES:,} values when its aliases are written "
                "out: it is no recipe"
            )
        else:
            raw = loader.construct_document(node)
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path} does not exist") from error
    except (
        yaml.YAMLError, ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError,
        RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe {path} cannot be read as YAML: {reason}") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"recipe {path} does not consist of fields: write one a line, such as 'remove: 20%'"
        )
    return {str(key): value for key, value in raw.items()}


def _check_depth(path: str | Path, text: str) -> None:
    """Read no further than to where a recipe nests deeper than any does.

    Raises:
        RecipeError: it does.
        YAMLError: it is not YAML.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise RecipeError(
                f"recipe {path} nests lists and fields deeper than {MOST_DEPTH} times: it is no "
                "recipe"
            )


def _values(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node has with its aliases written out; infinitely many in a loop.

    Args:
        known: the same of nodes by their id.
    """
    import yaml

    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: where it is met again, it holds itself
        inner: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        else:
            node.value.encode()  # YAML can write halves of surrogate pairs, which are no text
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]


def parse_share(text: str) -> float:
    """``"20%"`` as 0.2.

    Raises:
        RecipeError: not a number with a percent sign, or not between 0 and 100.
    """
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if not match:
        raise RecipeError(f"remove is {text!r}: write a share with a percent sign, such as 20%")
    if not match[2]:
        raise RecipeError(
            f"remove is {text!r}: is it {match[1]}% or {match[1]} parameters? Write --remove 20% "
            "for a share, or --params 100M for what is to be left"
        )
    value = float(match[1])
    if not 0 < value < 100:
        raise RecipeError(f"remove is {text!r}: the share must be above 0% and below 100%")
    return value / 100


def parse_amount(text: str, units: dict[str, int], field: str, example: str) -> int:
    """``"5.4B"`` or ``"300MB"`` as a whole number.

    Raises:
        RecipeError: no number, an unknown unit, or nothing left.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in units:
        raise RecipeError(
            f"{field} is {text!r}: write a number with one of the units "
            f"{', '.join(u for u in units if u)}, such as {example}"
        )
    value = int(Decimal(match[1]) * units[match[2].upper()])
    if value <= 0:
        raise RecipeError(f"{field} is {text!r}: it must be above 0")
    return value


def parameters_to_remove(recipe: Recipe, *, parameters: int, decoder: int, bytes_each: int) -> int:
    """How many parameters must go to reach the recipe's target.

    Args:
        parameters, decoder: of the model and of its decoder blocks.
        bytes_each: of one written parameter.

    Raises:
        RecipeError: nothing, or more than the decoder has, would go.
    """
    if recipe.remove is not None:
        share = parse_share(recipe.remove)
        gone = round(share * (decoder if recipe.of == "decoder" else parameters))
        asked = f"--remove {recipe.remove}"
    elif recipe.params is not None:
        gone = parameters - parse_amount(recipe.params, PARAMETER_UNITS, "params", "5.4B")
        asked = f"--params {recipe.params}"
    else:
        assert recipe.size is not None
        wanted = parse_amount(recipe.size, BYTE_UNITS, "size", "300MB")
        gone = parameters - wanted // bytes_each
        asked = f"--size {recipe.size}"
    if gone <= 0:
        raise RecipeError(
            f"{asked} removes nothing: the model has {parameters:,} parameters "
            f"({parameters * bytes_each:,} bytes at {bytes_each} bytes each)"
        )
    if gone >= decoder:
        most = math.floor(100 * decoder / (decoder if recipe.of == "decoder" else parameters))
        raise RecipeError(
            f"{asked} would remove {gone:,} parameters, but the decoder blocks hold only "
            f"{decoder:,} of {parameters:,}: ask for clearly less than {most}%"
        )
    return gone
