"""Options that commands share, and the recipe that they make together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from secateur.recipe import Recipe

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="model: a folder, a .gguf file, or a hub id")
]
Remove = Annotated[
    str | None, typer.Option(help="share of the parameters to remove: 20% [one of these three]")
]
Params = Annotated[str | None, typer.Option(help="parameters to be left: 5.4B, 100M")]
Size = Annotated[str | None, typer.Option(help="bytes of weights to be left: 300MB, 1.5GiB")]
Sparsity = Annotated[
    str | None,
    typer.Option(
        help="zeros instead: a share of each layer, 50%, or N of every M inputs kept, 2:4; the "
        "model keeps its size"
    ),
]
Then = Annotated[
    str | None,
    typer.Option(help="method that makes --sparsity zeros in what --method has left"),
]
Solution = Annotated[
    str | None, typer.Option(help="apt: mask and compensation by single or multiple removal: MM")
]
Allocation = Annotated[
    str | None,
    typer.Option(help="sparsity of layers: uniform, error, or owl [auto]"),
]
Of = Annotated[str | None, typer.Option(help="--remove is a share of: model, or decoder")]
MethodName = Annotated[
    str | None, typer.Option("--method", help="pruning method [auto: the best, obs]")
]
Layers = Annotated[
    str | None, typer.Option(help="whole blocks to remove: a number, or auto [auto]")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="a setting of the method, as name=value; may be repeated"),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="builtin, a text or JSONL file, or c4, wikitext2, ptb, alpaca [builtin]"),
]
TextField = Annotated[str | None, typer.Option(help="key of the text in JSONL [text]")]
DataDir = Annotated[
    str | None, typer.Option(help="local copies of the named sets; else fetched from the hub")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="zero-shot accuracy through lm-eval: boolq, piqa, sciq, winogrande, logiqa, mmlu, "
        "with commas between them"
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="items of each task, of each subject of mmlu [all]"),
]
Samples = Annotated[int | None, typer.Option(help="windows of calibration text [10]")]
Length = Annotated[int | None, typer.Option(help="tokens a window [128]")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with all of this; options here win")
]
Structure = Annotated[
    str | None,
    typer.Option(help="inside blocks: coupled (KV groups, FFN neurons), inputs, or auto [auto]"),
]
Layout = Annotated[
    str | None,
    typer.Option(help="widths: per-layer, uniform (for stock classes), or auto [auto]"),
]
RoundTo = Annotated[
    str | None, typer.Option(help="FFN widths are multiples of: 1, 32, 64, 256 ..., or auto [auto]")
]
Seed = Annotated[int | None, typer.Option(help="seed of everything that is drawn [0]")]
Dtype = Annotated[
    str | None, typer.Option(help="type of the weights: auto, float32, float16, bfloat16 [auto]")
]
Device = Annotated[str, typer.Option(help="where blocks run: cpu, cuda, cuda:1, mps")]
MaxMemory = Annotated[
    str | None, typer.Option(help="refuse to start if the estimate is above this: 4GB")
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="processes at a time, which share out threads and --max-memory [1; on a cluster, one "
        "a node]",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="spread the work over a Ray: ray (the one of RAY_ADDRESS, or else one that is started "
        "here), or ray://HOST:PORT; all nodes must see the same files"
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that lies in the checkpoint")
]


def recipe_of(
    file: Path | None, layers: str | None, settings: list[str] | None, **fields: Any
) -> Recipe:
    """A recipe from a file and options; options that were not given are left out."""
    from secateur.recipe import load_recipe, make_recipe

    given = recipe_fields(layers, settings, **fields)
    return make_recipe(**given) if file is None else load_recipe(file, **given)


def recipe_fields(layers: str | None, settings: list[str] | None, **fields: Any) -> dict[str, Any]:
    """The recipe's fields that options give; options that were not given are left out."""
    import yaml

    from secateur.errors import RecipeError

    options: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting} is not name=value, such as --set order=energy")
        try:
            options[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"--set {setting}: {value!r} cannot be read as YAML") from error
    if layers is not None:
        options["layers"] = int(layers) if layers.isdecimal() else layers
    for_zeros = {
        name: fields.pop(name)
        for name in ("solution", "allocation")
        if fields.get(name) is not None
    }
    then = {n.removeprefix("then."): options.pop(n) for n in [*options] if n.startswith("then.")}
    if fields.get("then") is None:
        options |= for_zeros
        if then:
            raise RecipeError(
                f"--set then.{next(iter(then))} is a setting of --then, which is not given"
            )
    else:
        fields["then_options"] = then | for_zeros
    calibration = {
        name: fields.pop(key)
        for key, name in (
            ("calibration", "source"), ("text_field", "text_field"), ("data_dir", "data_dir"),
            ("samples", "samples"), ("length", "length"),
        )
        if fields.get(key) is not None
    }  # fmt: skip
    given = {key: value for key, value in fields.items() if value not in (None, {})}
    return {**given, "calibration": calibration, "options": options}
