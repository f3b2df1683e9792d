"""Methods on the small trained models of the tests: perplexity of what is left of them.

    python bench/tiny_models.py tests/models/tiny-mamba --text stdlib
    python bench/tiny_models.py tests/models/tiny-mamba --sparsity 2:4 50%
    python bench/tiny_models.py tests/models/tiny-opt --text builtin

With ``stdlib``, calibration is the documentation in Python's standard library, and perplexity is
taken on modules that the models have not been trained on (``stdlib_text.py``); with ``builtin``,
both are the built-in passages. Shares are of the decoder; ``--sparsity`` makes zeros instead.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import stdlib_text

from secateur import evaluate
from secateur.errors import SecateurError
from secateur.pruning import prune
from secateur.recipe import make_recipe

#: Calibration: as many windows, of so many tokens.
SAMPLES, LENGTH = 16, 128
#: Evaluation.
WINDOWS = 40
WITHIN = {"layers": 0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "shortgpt": ("shortgpt", {}),
    "sleb": ("sleb", {}),
    "comp, whole blocks too": ("comp", {}),
    "comp": ("comp", WITHIN),
    "comp, inputs": ("comp", {**WITHIN, "denses": "all"}),
    "random": ("random", {}),
    "magnitude-sp": ("magnitude-sp", {}),
    "wanda-sp": ("wanda-sp", {}),
    "flap": ("flap", {}),
    "fpt": ("fpt", {}),
    "llm-pruner": ("llm-pruner", {}),
    "saap": ("saap", {}),
    "slicegpt": ("slicegpt", {}),
    "obs": ("obs", WITHIN),
    "obs, whole blocks too": ("obs", {}),
}
#: Those that make zeros.
SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "ria": ("ria", {}),
    "sparsegpt": ("sparsegpt", {}),
    "apt SM": ("apt", {"solution": "SM"}),
    "apt MS": ("apt", {"solution": "MS"}),
    "apt": ("apt", {}),
}


def texts(kind: str, folder: Path) -> tuple[str, str]:
    """Names of the calibration and the evaluation text."""
    if kind == "builtin":
        return "builtin", "builtin"
    train, held_out = stdlib_text.documents()
    calibration, evaluation = folder / "calibration.jsonl", folder / "evaluation.txt"
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in train), "utf-8")
    evaluation.write_text("\n\n".join(held_out), "utf-8")
    return str(calibration), str(evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", choices=["stdlib", "builtin"], default="stdlib")
    parser.add_argument("--shares", nargs="+", default=["10%", "20%"])
    parser.add_argument("--sparsity", nargs="+", help="zeros to make, such as 2:4 and 50%%")
    parser.add_argument("--leave", nargs="+", default=[], help="linear layers without zeros")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SPARSE])
    args = parser.parse_args()
    known = SPARSE if args.sparsity else METHODS
    targets = args.sparsity or args.shares
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        calibration, evaluation = texts(args.text, folder)
        measure = {"text": evaluation, "length": LENGTH, "windows": WINDOWS}
        print(f"dense: {evaluate(args.source, **measure).value:.1f}", flush=True)
        print("| method |" + "".join(f" {target} |" for target in targets))
        print("|---|" + "---|" * len(targets), flush=True)
        for name in args.methods or list(known):
            row = f"| {name} |"
            for target in targets:
                method, options = known[name]
                options = {**options, "leave": args.leave} if args.sparsity else options
                asked = (
                    {"sparsity": target} if args.sparsity else {"remove": target, "of": "decoder"}
                )
                recipe = make_recipe(
                    **asked,
                    method=method,
                    options=options,
                    calibration={"source": calibration, "samples": SAMPLES, "length": LENGTH},
                )
                out = folder / f"{name}-{target}"
                try:
                    done = prune(args.source, out, recipe, verify=False)
                except SecateurError as error:
                    row += f" {error} |"
                    continue
                sizes, before = done.plan.sizes(), done.plan.sizes_before()
                lost = sizes.decoder_share_removed(before)
                if args.sparsity:
                    lost = done.plan.zeros / sizes.decoder
                row += f" {evaluate(out, **measure).value:.1f} ({lost:.1%}) |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
