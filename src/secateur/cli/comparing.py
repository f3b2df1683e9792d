"""``compare``: methods, shares and seeds side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import (
    Calibration,
    Cluster,
    DataDir,
    Device,
    Dtype,
    Layers,
    Layout,
    Length,
    Limit,
    MaxMemory,
    Of,
    RoundTo,
    Samples,
    Source,
    Structure,
    Tasks,
    TextField,
    Trust,
    Workers,
    recipe_fields,
)
from secateur.cli.tables import print_table

if TYPE_CHECKING:
    from secateur.comparison.table import Table

#: Some cells of a comparison failed; the others are in the table.
SOME_FAILED = 1


def compare(
    source: Source,
    out: Annotated[Path, typer.Option(help="folder of the tables and the page; may be continued")],
    methods: Annotated[
        str | None, typer.Option(help="pruning methods, with commas between them: comp,obs")
    ] = None,
    recipes: Annotated[
        str | None,
        typer.Option(help="recipe files, with commas between them; each is a row by its name"),
    ] = None,
    remove: Annotated[
        str | None, typer.Option(help="shares to remove: 10%,20%,30% [a recipe's own target]")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="zeros to make, for methods that make them: 50%,2:4"),
    ] = None,
    of: Of = None,
    seeds: Annotated[
        str | None, typer.Option(help="seeds of everything that is drawn: 0,1,2 [0]")
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="texts for perplexity besides the built-in passages: files, or c4, wikitext2, "
            "ptb, alpaca"
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=0, help="windows, from the start of each text; 0: all")
    ] = 10,
    window_length: Annotated[
        int, typer.Option(min=2, help="tokens a window of these texts")
    ] = 1024,
    tasks: Tasks = None,
    limit: Limit = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="a setting of every method, as name=value, or of one, as comp.order=energy; may "
            "be repeated",
        ),
    ] = None,
    layers: Layers = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    data_dir: DataDir = None,
    samples: Samples = None,
    length: Length = None,
    structure: Structure = None,
    layout: Layout = None,
    round_to: RoundTo = None,
    dtype: Dtype = None,
    keep: Annotated[bool, typer.Option("--keep", help="let the models stay in OUT/models")] = False,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workers: Workers = None,
    cluster: Cluster = None,
    trust_remote_code: Trust = False,
) -> None:
    """Prune a model in several ways and lay the results side by side.

    Every method at every share with every seed, and the dense model, each in a process of its own:
    shares reached, perplexities, accuracies, seconds, peak memory. Writes compare.md, compare.csv,
    compare.json and report.html. A killed run continues with the same command, and a longer
    command adds to what is there.

    Exit code 0: all measured. 1: some failed, and their rows say why. 2: nothing was run.
    """
    from secateur.comparison.run import compare as run
    from secateur.progress import for_terminal

    found = run(
        source,
        out,
        methods=_listed(methods),
        recipes=_listed(recipes),
        remove=_listed(remove),
        sparsity=_listed(sparsity),
        seeds=_seeds(seeds),
        texts=_listed(texts),
        text_field=text_field or "text",
        data_dir=data_dir,
        windows=windows or None,
        window_length=window_length,
        tasks=None if tasks is None else _listed(tasks),
        limit=limit,
        keep=keep,
        device=device,
        max_memory=max_memory,
        workers=workers,
        cluster=cluster,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
        **recipe_fields(
            layers, settings, of=of, calibration=calibration, samples=samples, length=length,
            structure=structure, layout=layout, round_to=round_to, dtype=dtype,
        ),
    )  # fmt: skip
    _print(found.table)
    for note in found.notes:
        print(note)
    print(f"written to {found.out}: report.html, compare.md, compare.csv, compare.json")
    if found.failed:
        raise typer.Exit(SOME_FAILED)


def _print(table: Table) -> None:
    head = ("", "asked", *(column.title for column in table.columns))
    print_table(head, [(r.label, r.asked, *r.texts(table.columns)) for r in table.rows])
    for row in table.rows:
        for remark in row.remarks():
            print(f"{row.label}, {row.asked}: {remark}")


def _listed(text: str | None) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _seeds(text: str | None) -> list[int] | None:
    from secateur.errors import RecipeError

    try:
        return [int(part) for part in _listed(text)] or None
    except ValueError as error:
        raise RecipeError(
            f"--seeds is {text!r}: write whole numbers with commas between them, such as 0,1,2"
        ) from error
