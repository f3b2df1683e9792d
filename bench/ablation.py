"""Perplexity of methods and their variants on one model, in one run, on the same tokens.

    python bench/ablation.py SOURCE --data-dir DIR --out results.jsonl [--cells cells.yaml]

Every cell is a set of options of the method with a share of the decoder. Nothing is written to
disk but a line per cell; cells that are in the results file already are skipped, so the run can
be killed and repeated. Perplexity is taken in float32 on consecutive windows of 1024 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from secateur.calibration import consecutive_windows, draw_windows, load_text
from secateur.checkpoint import open_checkpoint
from secateur.engine import Engine
from secateur.forms import Form
from secateur.methods import Method, get_method
from secateur.progress import Progress
from secateur.sparsity import parse_sparsity
from secateur.streaming import Stream


def expand(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lists among the values stand for all their combinations."""
    out = []
    for cell in cells:
        axes = {k: v if isinstance(v, list) else [v] for k, v in cell.items()}
        out += [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cells", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--sets", nargs="+", default=["wikitext2", "ptb"])
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.source)
    stream = Stream(checkpoint)
    evaluation = {
        name: consecutive_windows(
            load_text(name, use="evaluation", data_dir=args.data_dir),
            checkpoint.tokenizer,
            length=args.window_length,
            most=args.windows,
        ).tokens
        for name in args.sets
    }
    probe = torch.cat(list(evaluation.values()))
    calibration = load_text("c4", use="calibration", data_dir=args.data_dir)
    done = set()
    if args.out.exists():
        lines = args.out.read_text().splitlines()
        done = {json.dumps(json.loads(line)["cell"], sort_keys=True) for line in lines}
    for cell in expand(yaml.safe_load(args.cells.read_text())):
        if json.dumps(cell, sort_keys=True) in done:
            continue
        began = time.monotonic()
        options = dict(cell)
        share = float(options.pop("share", 0))  # cells with a sparsity have none
        seed = int(options.pop("seed", 0))
        samples, length = int(options.pop("samples", 10)), int(options.pop("length", 128))
        windows = draw_windows(
            calibration, checkpoint.tokenizer, samples=samples, length=length, seed=seed
        )
        sparsity = options.pop("sparsity", None)
        form = Form(
            options.pop("structure", "inputs" if "denses" in options else "coupled"),
            options.pop("layout", "per-layer"),
            int(options.pop("round_to", 1)),
            sparsity=parse_sparsity(str(sparsity)) if sparsity is not None else None,
        )
        method = get_method(str(options.pop("method", "comp")), options, form)
        assert isinstance(method, Method)
        method.check(stream.anatomy)
        engine = Engine(
            stream,
            method,
            to_remove=round(share * stream.anatomy.decoder_parameters),
            seed=seed,
            dtype=torch.float32,
            progress=Progress(),
        )
        choice = engine.choose_layers(windows.tokens)
        hidden: list[torch.Tensor] = []
        plan = engine.neuron_stage(
            choice.layers,
            engine.shares(choice, windows.tokens),
            windows.tokens,
            probe=probe,
            probe_out=hidden,
        )
        losses = stream.losses(hidden[0], probe)
        row: dict[str, Any] = {"cell": cell, "removed": choice.removed, "trials": engine.trials}
        start = 0
        for name, tokens in evaluation.items():
            part = losses[start : start + len(tokens)]
            row[name] = round(math.exp(float(part.sum()) / (tokens.numel() - len(tokens))), 2)
            start += len(tokens)
        before, after = plan.sizes_before(), plan.sizes()
        row["decoder_share"] = round(after.decoder_share_removed(before), 4)
        if plan.zeros:
            row["zeros"] = plan.zeros
        row["seconds"] = round(time.monotonic() - began, 1)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
