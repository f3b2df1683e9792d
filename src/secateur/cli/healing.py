"""``heal``: the optional training of a pruned folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import DataDir, Device, TextField, Trust


def heal(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="a folder that secateur prune wrote")
    ],
    data: Annotated[
        str,
        typer.Option(help="text: builtin, a text or JSONL file, or c4, wikitext2, ptb, alpaca"),
    ],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    method: Annotated[
        str,
        typer.Option(
            help="lora: adapters through peft, merged; groupwise: groups of columns quantised, "
            "adapters folded into their zero points"
        ),
    ] = "lora",
    steps: Annotated[
        int | None, typer.Option(help="steps of the optimiser [one pass over the text]")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="examples from the start of the text, at most [2000]")
    ] = None,
    length: Annotated[int | None, typer.Option(help="tokens a window [256]")] = None,
    batch: Annotated[int | None, typer.Option(help="windows a step [4]")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of the adapters [8]")] = None,
    lr: Annotated[float | None, typer.Option(help="largest learning rate [0.001]")] = None,
    bits: Annotated[
        int | None, typer.Option(help="groupwise: bits of a weight, 4, 5 or 8 [4]")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="groupwise: columns to a scale and a zero point; with 32 a q4_1 file holds the "
            "same weights [32]"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="seed of the adapters and of the text's order [0]")
    ] = None,
    text_field: TextField = None,
    data_dir: DataDir = None,
    compute: Annotated[
        str | None,
        typer.Option(help="type the model runs in meanwhile: float32, bfloat16 [float32]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="type of the written weights: auto (as in DIR, for groupwise float32), float32, "
            "float16, bfloat16 [auto]"
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(min=1, help="steps after which a killed run can go on")
    ] = 25,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Train a pruned folder for a while and write it in the same layout.

    Optional: nothing else here trains, and a healed model is not a training-free one, which its
    card says. A killed run continues with the same command.
    """
    from secateur.progress import for_terminal
    from secateur.recovery import heal as run
    from secateur.recovery import make_settings

    settings = make_settings(
        method=method, data=data, text_field=text_field, examples=examples, steps=steps,
        length=length, batch=batch, rank=rank, lr=lr, seed=seed, bits=bits, group=group,
        compute=compute, dtype=dtype,
    )  # fmt: skip
    done = run(
        source,
        out,
        settings,
        data_dir=data_dir,
        device=device,
        every=save_every,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
    )
    healed = done.record["healed"]
    windows = healed["text"]["held_out"]
    print(
        f"healed by {settings.method}: {healed['steps']} steps on {healed['text']['origin']}; loss "
        f"on {windows} windows kept out {done.before:.4f} before, {done.after:.4f} after"
    )
    for note in done.notes:
        print(note)
    print(f"peak memory {done.peak_memory / 2**20:.0f} MiB; trained, so not a training-free model")
    if done.verification is not None:
        print(done.verification.text())
    print(f"written to {done.out}")
