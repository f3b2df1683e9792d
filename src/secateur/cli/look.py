"""``inspect`` and ``eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import DataDir, Device, Limit, Source, Tasks, TextField, Trust
from secateur.cli.tables import print_table

if TYPE_CHECKING:
    from secateur.anatomy import Anatomy
    from secateur.evaluation.zero_shot import TaskScore


def inspect(source: Source, trust_remote_code: Trust = False) -> None:
    """Show a model's family, blocks, shapes and parameters by part, without reading weights."""
    from secateur.checkpoint import open_checkpoint
    from secateur.outputs.record import healed
    from secateur.streaming import Stream

    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    anatomy = Stream(checkpoint).anatomy
    config = checkpoint.config
    # Counted part by part: in a pruned model no block speaks for the others.
    by_part = anatomy.parameters_by_part
    total = sum(by_part.values())
    decoder = sum(count for part, count in by_part.items() if part.startswith("blocks: "))
    alike = decoder == anatomy.decoder_parameters
    kept = getattr(config, "secateur", {}).get("rotation", {}).get("kept")
    training = healed(checkpoint)
    rows = [
        ("source", str(source)),
        *([("healed", training)] if training else []),
        ("family", f"{anatomy.family.name} ({anatomy.model_type})"),
        ("parameters", f"{total:,}"),
        ("in decoder blocks", f"{decoder:,}"),
        ("file bytes", f"{checkpoint.nbytes:,}"),
        (
            "blocks",
            f"{anatomy.layers} "
            + (f"at {anatomy.block_parameters:,} parameters" if alike else "of different sizes"),
        ),
        ("hidden width", f"{config.hidden_size:,}" + (f", sliced to {kept:,}" if kept else "")),
        *_widths(anatomy, "" if alike else " in the first block"),
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
    tasks: Tasks = None,
    limit: Limit = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of a model, dense or pruned, and a sample of what it writes."""
    from secateur.checkpoint import open_checkpoint
    from secateur.evaluation import check_tasks, load_whole, require_harness, zero_shot
    from secateur.evaluation import evaluate as run
    from secateur.evaluation.speed import generate
    from secateur.outputs.record import healed
    from secateur.progress import for_terminal

    names: list[str] = []
    if tasks is not None:  # refused before the work begins
        names = check_tasks([t.strip() for t in tasks.split(",") if t.strip()], limit)
        require_harness()
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
    training = healed(checkpoint)
    if training:
        print(f"healed, so not a training-free model: {training}")
    if names:
        scores = zero_shot(
            checkpoint, names, limit=limit, data_dir=data_dir, device=device,
            progress=for_terminal(),
        )  # fmt: skip
        _print_scores(scores, limit)
    if tokens and prompt:
        sample = generate(load_whole(checkpoint), checkpoint.tokenizer, prompt, tokens)
        print(f"{prompt}{sample}")


def _print_scores(scores: list[TaskScore], limit: int | None) -> None:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    print()
    print_table(
        ("task", "acc, %", "±", "acc_norm, %", "±", "items", "of"),
        [
            (
                score.task,
                percent(score.acc),
                percent(score.acc_error),
                percent(score.acc_norm),
                percent(score.acc_norm_error),
                f"{score.items:,}",
                f"{score.of:,}" + (f" in {score.subjects} subjects" if score.subjects > 1 else ""),
            )
            for score in scores
        ],
    )
    import lm_eval

    many = "subject" if all(score.subjects > 1 for score in scores) else "task"
    which = "all items" if limit is None else f"--limit {limit}: the first {limit} of each {many}"
    if limit is not None and many == "task" and any(score.subjects > 1 for score in scores):
        which += ", of each subject of mmlu"
    origins = ", ".join(sorted({score.origin for score in scores}))
    print(
        f"zero-shot, no examples in the prompt, {which}; ± is one standard error; float32; "
        f"{origins}; lm-eval {lm_eval.__version__}"
    )
    print()


def _widths(anatomy: Anatomy, where: str) -> list[tuple[str, str]]:
    """What stands between the entry of a block and its end."""
    found = []
    if anatomy.ffn_width:
        mixer = any(dense.reads == "mixer" for dense in anatomy.denses.values())
        found.append(("inner channels" if mixer else "FFN width", f"{anatomy.ffn_width:,}{where}"))
    if anatomy.kv_heads and anatomy.coupling("values").keys:
        text = (
            f"{anatomy.query_heads} query heads in {anatomy.kv_heads} KV groups of size "
            f"{anatomy.heads_per_group}, head size {anatomy.head_size}"
        )
        found.append(("attention", text))
    elif anatomy.kv_heads:
        found.append(("scan", f"{anatomy.kv_heads} heads, head size {anatomy.head_size}{where}"))
    return found
