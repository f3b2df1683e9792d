"""Peak memory of a backward pass, streamed and on the whole model, over the number of blocks.

    python bench/memory_backward.py [--depths 8 16 32] [--hidden 1024] [--ffn 4096]

Writes random bf16 checkpoints to a temporary folder and takes the gradients of all block weights,
in float32, on 10 windows of 64 tokens, once block by block and once with the model and all its
gradients in memory, each in a process of its own. Prints peak resident memory less mapped file
pages, seconds, and the largest relative difference of a block's gradient norm between the two.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from memory_depth import checkpoints, shapes

SAMPLES, LENGTH = 10, 64

COMMON = f"""
import json, sys, time
import torch
from secateur.checkpoint import open_checkpoint
from secateur.progress import PeakMemory
checkpoint = open_checkpoint(sys.argv[1])
size = int(checkpoint.config.vocab_size)
tokens = torch.randint(size, ({SAMPLES}, {LENGTH}), generator=torch.Generator().manual_seed(0))
norms = {{}}
began = time.monotonic()
with PeakMemory() as memory:
    RUN
seconds = time.monotonic() - began
print(json.dumps({{"peak": memory.peak, "seconds": seconds, "norms": norms}}))
"""

STREAMED = """
    from secateur.backward import backward
    from secateur.streaming import Stream

    def use(layer, module, gradients):
        total = {}
        for found in gradients:
            for name, gradient in found.items():
                total[name] = total[name].add_(gradient) if name in total else gradient
        norms[layer] = sum(float(g.double().square().sum()) for g in total.values()) ** 0.5

    backward(Stream(checkpoint), tokens, use)
"""

WHOLE = """
    from secateur.evaluation import load_whole
    model = load_whole(checkpoint)
    blocks = model.model.layers
    model.requires_grad_(False)
    for block in blocks:
        block.requires_grad_(True)
    for window in tokens.split(1):
        model(input_ids=window, labels=window, use_cache=False).loss.backward()
    for layer, block in enumerate(blocks):
        squares = [float(p.grad.double().square().sum()) for p in block.parameters()]
        norms[layer] = sum(squares) ** 0.5
"""


def measure(script: str, source: Path) -> dict[str, object]:
    """Run one of the scripts in a fresh process."""
    code = COMMON.replace("    RUN\n", script)
    run = subprocess.run(
        [sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    args = shapes(__doc__.splitlines()[0], LENGTH)
    print("| blocks | streamed, MiB | whole model, MiB | ratio | streamed, s | whole, s | norms |")
    print("|---|---|---|---|---|---|---|")
    for depth, source in checkpoints(args):
        streamed, whole = measure(STREAMED, source), measure(WHOLE, source)
        apart = max(abs(whole["norms"][i] / norm - 1) for i, norm in streamed["norms"].items())
        one, other = streamed["peak"] / 2**20, whole["peak"] / 2**20
        print(
            f"| {depth} | {one:.0f} | {other:.0f} | {other / one:.1f} | "
            f"{streamed['seconds']:.0f} | {whole['seconds']:.0f} | {apart:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
