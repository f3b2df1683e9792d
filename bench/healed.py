"""The healed table: methods at one share, each healed on the same text with the same steps.

    python bench/healed.py MODEL --data-dir DATA --out DIR [--steps 138] [--limit 200]

Healed models are trained ones, which is why they have a table of their own. Each row of
DIR/rows.jsonl is one model, pruned or healed; models and rows that are there are skipped, so that
the run can be killed and repeated. At the end it prints the table, and with cyllama tokens per
second of one method's model at f16 and at q4_1, pruned and healed group-wise, measured in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from secateur.evaluation import evaluate, zero_shot
from secateur.evaluation.bench import HEADER, bench_llama_cpp, table
from secateur.exporting import export
from secateur.outputs import llama_cpp
from secateur.progress import for_terminal
from secateur.pruning import prune
from secateur.recipe import make_recipe
from secateur.recovery import heal, make_settings

#: FFN neurons alone, in the blocks that each method leaves open by itself.
METHODS: dict[str, dict[str, Any]] = {
    "comp": {"groups": "keep", "layers": 0},
    "obs": {"groups": "keep", "layers": 0},
    "llm-pruner": {"groups": "keep"},
    "saap": {"groups": "keep"},
}
TEXTS = ("wikitext2", "ptb")
TASKS = ("boolq", "piqa", "sciq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--share", default="20%")
    parser.add_argument("--data", default="alpaca")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, help="default: one pass over the examples")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--windows", type=int, default=10, help="of 1024 tokens, for perplexity")
    parser.add_argument("--limit", type=int, default=200, help="items of each task; 0: no tasks")
    parser.add_argument("--groupwise", default="obs", help="healed in both ways, and timed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measure("dense", args.source, args, how="")
    for method in args.methods:
        folder = pruned(method, args)
        measure(method, folder, args, how="pruned, training-free")
        ways = ("lora", "groupwise") if method == args.groupwise else ("lora",)
        for way in ways:
            done = healed(folder, way, args)
            measure(f"{method}-{way}", done, args, how=f"healed, {way}")
    print_table(args.out)
    if args.groupwise in args.methods:
        print_speed(args.groupwise, args)


def pruned(method: str, args: argparse.Namespace) -> Path:
    """The folder of a method; rows in whole blocks of 32, so that all of it can be quantised."""
    folder: Path = args.out / "models" / method
    if not folder.exists():
        recipe = make_recipe(
            remove=args.share,
            of="decoder",
            method=method,
            round_to=32,
            options=METHODS[method],
            calibration={
                "source": "c4", "samples": 10, "length": 128, "data_dir": str(args.data_dir),
            },
        )  # fmt: skip
        prune(args.source, folder, recipe, progress=for_terminal())
    return folder


def healed(source: Path, way: str, args: argparse.Namespace) -> Path:
    folder: Path = args.out / "models" / f"{source.name}-{way}"
    if not folder.exists():
        settings = make_settings(
            method=way, data=args.data, examples=args.examples, steps=args.steps,
            length=args.length, batch=args.batch,
        )  # fmt: skip
        began = time.monotonic()
        heal(source, folder, settings, data_dir=args.data_dir, progress=for_terminal())
        print(f"{folder.name}: healed in {time.monotonic() - began:.0f} s")
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    file = out / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measure(name: str, source: str | Path, args: argparse.Namespace, how: str) -> None:
    """Add the row of one model: perplexities, and accuracies with their numbers of items."""
    if any(row["name"] == name for row in rows(args.out)):
        return
    row: dict[str, Any] = {"name": name, "how": how}
    for text in TEXTS:
        found = evaluate(
            source, text=text, windows=args.windows, data_dir=args.data_dir,
            progress=for_terminal(),
        )  # fmt: skip
        row[text] = round(found.value, 2)
    if args.limit:
        scores = zero_shot(source, TASKS, limit=args.limit, data_dir=args.data_dir)
        row |= {score.task: [round(100 * score.acc, 1), score.items] for score in scores}
    with (args.out / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def print_table(out: Path) -> None:
    """All rows as Markdown; accuracy in percent, with the items it is a share of."""
    print("| | | WikiText-2 | PTB | BoolQ | PIQA | SciQ |\n|---|---|---|---|---|---|---|")
    for row in rows(out):
        scores = [f"{row[t][0]} ({row[t][1]})" if t in row else "" for t in TASKS]
        cells = [row["name"], row["how"], *(f"{row[t]:.2f}" for t in TEXTS), *scores]
        print(f"| {' | '.join(cells)} |")


def print_speed(method: str, args: argparse.Namespace) -> None:
    """Tokens per second before and after group-wise quantisation, in turn, in one run."""
    if not llama_cpp.available():
        print(llama_cpp.NOT_RUN)
        return
    files = []
    for source, kind in ((method, "f16"), (method, "q4_1"), (f"{method}-groupwise", "q4_1")):
        file = args.out / f"{source}-{kind}.gguf"
        if not file.exists():
            export(args.out / "models" / source, file, weights=kind, verify=False)
        files.append(file)
    for line in (HEADER, *table(bench_llama_cpp(files))):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
