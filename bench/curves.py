"""Seconds and memory of pruning over blocks, hidden width, FFN width and calibration tokens.

    python bench/curves.py [--methods comp obs] [--over blocks hidden ffn tokens] [--repeats 1]

Writes small seeded checkpoints to a temporary folder and prunes each in a process of its own, on
one thread, without removing whole blocks. Prints CPU seconds of the run, the peak of resident
memory less mapped file pages, and for each curve the exponent by least squares on logarithms,
beside that of the operations and bytes that ``secateur.estimate`` counts for the same runs. What a
process takes before it does anything is left out of the memory that exponents are taken of.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTH = 128
#: The shape from which one number at a time is changed, and what it is changed to.
SHAPE = {"blocks": 4, "hidden": 512, "ffn": 2048, "tokens": 1280}
CURVES = {
    "blocks": (2, 4, 8, 16),
    "hidden": (256, 512, 1024),
    "ffn": (1024, 2048, 4096),
    "tokens": (640, 1280, 2560, 5120),
}

PRUNE = """
import json, sys, time
from secateur import pipeline
from secateur.progress import process_memory
from secateur.pruning import prune
from secateur.recipe import make_recipe

counted = []
whole = pipeline.estimate
def estimate(anatomy, signals, **work):
    tokens = work["windows"] * work["length"]
    counted.append(work["solving"] + 2 * tokens * anatomy.decoder_parameters * work["passes"])
    return whole(anatomy, signals, **work)
pipeline.estimate = estimate
recipe = make_recipe(**json.loads(sys.argv[3]))
import transformers.models.llama.modeling_llama
before, began = process_memory(), time.process_time()
result = prune(sys.argv[1], sys.argv[2], recipe, verify=False)
print(json.dumps({"seconds": time.process_time() - began, "peak": result.peak_memory - before,
    "operations": counted[0], "bytes": result.estimate.memory - result.estimate.parts["program"]}))
"""


def measured(method: str, shape: dict[str, int], repeats: int) -> dict[str, float]:
    """The fastest of several runs: CPU seconds, bytes, and what was counted of both."""
    from memory_depth import write_checkpoint

    options: dict[str, Any] = {"layers": 0, "exempt_first": 0, "exempt_last": 0}
    if method == "obs":
        options |= {"copies": 0, "written": 0}
    recipe = {
        "method": method, "remove": "20%", "of": "decoder", "options": options,
        "calibration": {"samples": shape["tokens"] // LENGTH, "length": LENGTH},
    }  # fmt: skip
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        write_checkpoint(source, shape["blocks"], shape["hidden"], shape["ffn"])
        for number in range(repeats):
            run = subprocess.run(
                [sys.executable, "-c", PRUNE, str(source), str(Path(temporary) / str(number)),
                 json.dumps(recipe)],
                stdout=subprocess.PIPE, text=True, check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            runs.append(json.loads(run.stdout.splitlines()[-1]))
    return min(runs, key=lambda run: run["seconds"])


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(value) over log(size) by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["comp", "obs"])
    parser.add_argument("--over", nargs="+", choices=sorted(CURVES), default=list(CURVES))
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    known: dict[tuple[str, tuple[int, ...]], dict[str, float]] = {}  # curves share a point
    print("from " + ", ".join(f"{name} {size}" for name, size in SHAPE.items()))
    print("| method | over | sizes | CPU s | exponent | counted | MiB | exponent | counted |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method in args.methods:
        for name in args.over:
            sizes, points = list(CURVES[name]), []
            for size in sizes:
                shape = {**SHAPE, name: size}
                key = method, tuple(shape.values())
                if key not in known:
                    known[key] = measured(method, shape, args.repeats)
                points.append(known[key])

            def slope(of: str, sizes: list[int] = sizes, points: Any = tuple(points)) -> str:
                return f"{exponent(sizes, [point[of] for point in points]):.2f}"

            cells = [
                method, name, ", ".join(map(str, sizes)),
                ", ".join(f"{point['seconds']:.1f}" for point in points),
                slope("seconds"), slope("operations"),
                ", ".join(f"{point['peak'] / 2**20:.0f}" for point in points),
                slope("peak"), slope("bytes"),
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
