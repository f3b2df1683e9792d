"""``export``, ``verify`` and ``bench``: what becomes of a pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Source, Trust
from secateur.cli.tables import print_table


def export(
    source: Source,
    out: Annotated[Path, typer.Option(help="file or folder to write; must not exist")],
    to: Annotated[
        str,
        typer.Option(help="gguf; packed: a folder less its zeros, for Secateur; plain: back"),
    ] = "gguf",
    weights: Annotated[
        str,
        typer.Option(
            "--type",
            help="weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with cyllama q4_k_m etc.",
        ),
    ] = "f16",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="run the file in llama.cpp afterwards")
    ] = True,
    trust_remote_code: Trust = False,
) -> None:
    """Write a model, dense or pruned, as one GGUF file for llama.cpp; or pack its zeros.

    The file gets its name when it is complete. With cyllama installed it is run, and its text and
    perplexity are compared with the model's own.
    """
    from secateur.exporting import export as run
    from secateur.outputs.llama_cpp import NOT_RUN
    from secateur.progress import for_terminal

    done = run(
        source,
        out,
        to=to,
        weights=weights,
        verify=verify,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
    )
    for note in done.notes:
        print(note)
    what = f"architecture {done.architecture}, " if to == "gguf" else ""
    print(f"written to {done.path}: {what}{done.bytes / 1e6:.1f} MB")
    if done.verification:
        print(done.verification.text())
    elif verify and to == "gguf":
        print(NOT_RUN)


def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="a folder or a .gguf file, pruned or not")
    ],
    against: Annotated[
        str | None,
        typer.Option(help="compare with: the source of a pruned folder, the folder of a GGUF file"),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Reopen a written model in a fresh process and compare what it computes.

    A folder is opened by transformers, a GGUF file is run by llama.cpp. Without --against, both
    are compared with what Secateur reads from the same files, block by block.
    """
    from secateur.exporting import verify as run
    from secateur.progress import for_terminal

    found = run(path, against=against, trust_remote_code=trust_remote_code, progress=for_terminal())
    print(found.text())


def bench(
    source: Source,
    against: Annotated[
        str | None, typer.Option(help="the dense model, measured in turn with the other")
    ] = None,
    weights: Annotated[
        str, typer.Option("--type", help="weights of the files that llama.cpp runs")
    ] = "f16",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="tokens of the prompt")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="times that each is measured")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="threads [all cores]")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Tokens per second, bytes and peak memory, in torch and in llama.cpp, models in turn."""
    from secateur.exporting import bench as run
    from secateur.progress import for_terminal

    for title, rows in run(
        [source] if against is None else [against, source],
        weights=weights,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
    ):
        print(title)
        if rows:
            print_table(rows[0], rows[1:])
        print()
