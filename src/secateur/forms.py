"""The form of a pruned model: what may go inside blocks, in which widths, so that it can run.

A recipe asks; the output and the family decide what can be had. :func:`resolve` answers before
any work is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from secateur.anatomy import Anatomy
from secateur.errors import OutputError, RecipeError
from secateur.recipe import Recipe
from secateur.sparsity import Pattern, parse_sparsity

#: Widths of the FFN are multiples of this where nobody wishes otherwise: tiles of matrix kernels.
KERNEL = 64
#: Values in a block of a K-quant; narrower rows fall back to larger types.
SUPERBLOCK = 256
#: The smallest multiple worth having: a block of a simple quantised type.
FLOOR = 32
#: An automatic multiple leaves at least so many widths to choose from.
FEWEST_STEPS = 6


@dataclass(frozen=True)
class Target:
    """What is to be written: a Hugging Face folder, or a GGUF file of some type."""

    kind: Literal["hf", "gguf"] = "hf"
    weights: str = ""

    @property
    def in_superblocks(self) -> bool:
        """Whether weights are stored in K-quants, whose blocks are 256 values wide."""
        return self.kind == "gguf" and ("_k" in self.weights or self.weights.startswith("iq"))


@dataclass(frozen=True)
class Form:
    """What a method may cut.

    Attributes:
        structure: ``coupled``: whole KV groups and FFN neurons; ``inputs``: columns of each layer.
        layout: ``per-layer`` or ``uniform`` widths.
        multiple: kept FFN neurons are a multiple of this.
        reason: why that multiple, for the user.
        groups: numbers of KV groups that a block may keep, rising; None: any.
        sparsity: the zeros that a sparse method makes.
        no_biases: why the output cannot hold a bias where the model has none; empty: it can.
    """

    structure: Literal["coupled", "inputs"] = "coupled"
    layout: Literal["per-layer", "uniform"] = "per-layer"
    multiple: int = 1
    reason: str = ""
    groups: tuple[int, ...] | None = None
    no_biases: str = ""
    sparsity: Pattern | None = None

    @property
    def uniform(self) -> bool:
        return self.layout == "uniform"


def resolve(
    recipe: Recipe, anatomy: Anatomy, target: Target, *, tied: bool, stock_groups: tuple[int, ...]
) -> Form:
    """The form that ``recipe`` means for this model and output.

    Args:
        tied: whether the head is the embedding.
        stock_groups: numbers of KV groups that the stock class accepts.

    Raises:
        RecipeError: wishes that contradict each other.
        OutputError: the output cannot hold what was asked.
    """
    pattern = parse_sparsity(recipe.sparsity) if recipe.sparsity is not None else None
    if pattern is not None and recipe.then is None:
        return _same_shapes(recipe, pattern)
    if recipe.structure == "coupled" and "denses" in recipe.options:
        raise RecipeError(
            "denses names the layers that lose inputs one by one, which --structure coupled does "
            "not do: leave out denses, or use --structure inputs"
        )
    per_layer = True
    if target.kind == "gguf":
        from secateur.outputs.gguf_arch import home_of

        home = home_of(anatomy.model_type)
        per_layer = home.per_layer is not None and (home.per_layer != "openelm" or tied)
        if recipe.structure == "inputs" or "denses" in recipe.options:
            raise OutputError(
                "a GGUF file cannot hold --structure inputs, whose layers read through an index: "
                "use --structure coupled, or give --out a folder name"
            )
        if recipe.layout == "per-layer" and not per_layer:
            raise OutputError(
                f"llama.cpp has no architecture for {anatomy.model_type} blocks of different "
                "widths: use --layout uniform, or give --out a folder name"
            )
    structure = recipe.structure
    if structure == "auto":
        # Options that only make sense for inputs say what is meant.
        structure = "inputs" if "denses" in recipe.options else "coupled"
    if structure == "inputs" and recipe.options.get("groups", "auto") != "auto":
        raise RecipeError(
            "groups counts whole KV groups, of which --structure inputs takes single columns: "
            "leave out groups, or use --structure coupled"
        )
    layout = recipe.layout
    if layout == "auto":
        layout = "per-layer" if per_layer else "uniform"
    if structure == "inputs" and layout == "uniform":
        raise RecipeError(
            "--structure inputs leaves layers that read through an index, which no stock class "
            "has: use --structure coupled with --layout uniform"
        )
    multiple, reason = _multiple(recipe, anatomy, target, structure, layout)
    if pattern is not None and pattern.grouped and recipe.round_to == "auto":
        whole = math.lcm(multiple, pattern.group)
        if whole != multiple:
            multiple, reason = whole, f"{pattern} wants whole groups of {pattern.group}"
    groups = stock_groups if layout == "uniform" else None
    no_biases = _no_biases(anatomy.model_type, target, layout)
    return Form(structure, layout, multiple, reason, groups, no_biases, pattern)


def _same_shapes(recipe: Recipe, pattern: Pattern) -> Form:
    """The form of a model that only gets zeros.

    Raises:
        RecipeError: a wish about shapes, which all stay.
    """
    for name in ("structure", "layout", "round_to"):
        if getattr(recipe, name) != "auto":
            option = f"--{name.replace('_', '-')}"
            raise RecipeError(
                f"{option} says what shapes blocks get, but --sparsity {recipe.sparsity} makes "
                f"zeros and keeps all shapes: leave out {option}, or remove units first with "
                "--remove and let --then make zeros"
            )
    return Form(layout="uniform", reason="all shapes stay", sparsity=pattern)


def _no_biases(model_type: str, target: Target, layout: str) -> str:
    if target.kind == "gguf":
        from secateur.outputs.gguf_arch import without_new_biases

        arch = without_new_biases(model_type, per_layer=layout == "per-layer")
        return f"llama.cpp's architecture {arch} has no place for it, a folder has" if arch else ""
    if layout == "uniform":
        return f"the stock class of {model_type} has none there; --layout per-layer has"
    return ""


def _multiple(
    recipe: Recipe, anatomy: Anatomy, target: Target, structure: str, layout: str
) -> tuple[int, str]:
    width = anatomy.ffn_width
    if recipe.round_to == "auto" and structure == "inputs":
        return 1, "columns go one at a time"
    if recipe.round_to != "auto":
        if not width and recipe.round_to != 1:
            raise RecipeError(
                f"--round-to is {recipe.round_to}, but blocks of {anatomy.model_type} have no FFN "
                "whose width it could round: leave it out"
            )
        if recipe.round_to >= width and recipe.round_to != 1:
            legal = [m for m in (1, FLOOR, KERNEL, SUPERBLOCK) if m < width]
            allowed = (
                f"are {', '.join(map(str, legal))} and other multiples of {FLOOR} below {width}"
            )
            raise RecipeError(
                f"--round-to is {recipe.round_to}, but the FFN is only {width} wide: allowed here "
                + (allowed if len(legal) > 1 else "is 1")
            )
        return recipe.round_to, "as asked"
    if not width:
        return 1, "there is no FFN"
    wanted, why = KERNEL, "tiles of matrix kernels, and whole blocks of q8_0 and q4_0"
    if target.in_superblocks:
        wanted, why = SUPERBLOCK, f"{target.weights} stores rows in blocks of {SUPERBLOCK}"
    elif layout == "uniform" and width < 64 * KERNEL:
        wanted, why = FLOOR, "one width for all blocks needs small steps to meet the share"
    multiple = wanted
    while multiple >= FLOOR and width < FEWEST_STEPS * multiple:
        multiple //= 2
    if multiple < FLOOR:
        return 1, f"an FFN of {width} is too narrow for multiples of {FLOOR}"
    if multiple < wanted:
        why = f"an FFN of {width} has too few multiples of {wanted}"
    return multiple, why
