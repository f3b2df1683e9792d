"""Peak memory of pruning over the number of blocks of one shape.

    python bench/memory_depth.py [--depths 8 16 32] [--hidden 1024] [--ffn 4096]

Writes random bf16 checkpoints to a temporary folder, prunes each in a process of its own, and
prints peak resident memory less mapped file pages, the boundary activations that grow with depth
by design, and the rest, which should be flat.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SAMPLES, LENGTH = 10, 128

PRUNE = """
import json, sys
from secateur.pruning import prune
from secateur.recipe import make_recipe
recipe = make_recipe(method="comp", remove="20%%", of="decoder",
                     options={"layers": 1, "exempt_first": 0, "exempt_last": 0},
                     calibration={"samples": %d, "length": %d})
result = prune(sys.argv[1], sys.argv[2], recipe, verify=False)
print(json.dumps({"peak": result.peak_memory, "estimate": result.estimate.memory}))
""" % (SAMPLES, LENGTH)  # noqa: UP031 (braces in the script)


def write_checkpoint(folder: Path, depth: int, hidden: int, ffn: int) -> None:
    """A random LLaMA of the given shape, block by block, in bf16 shards."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=hidden, intermediate_size=ffn,
        num_hidden_layers=depth, num_attention_heads=hidden // 64, num_key_value_heads=4,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    weight_map: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        shard = f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors"
        weight_map[name] = shard
        groups.setdefault(shard, {})[name] = parameter
    for shard, group in groups.items():
        values = {
            name: (
                torch.ones(p.shape)
                if p.ndim == 1
                else torch.randn(p.shape, generator=generator) * 0.02
            ).bfloat16()
            for name, p in group.items()
        }
        save_file(values, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shapes(description: str, length: int) -> argparse.Namespace:
    """Depths, and width and FFN of all, from the command line; said in a line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--depths", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=4096)
    args = parser.parse_args()
    print(f"hidden {args.hidden}, FFN {args.ffn}, {SAMPLES} x {length} tokens, bf16 source")
    return args


def checkpoints(args: argparse.Namespace) -> Iterator[tuple[int, Path]]:
    """Each depth with a checkpoint of it, which is gone when the next is asked for."""
    for depth in args.depths:
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "source"
            source.mkdir()
            write_checkpoint(source, depth, args.hidden, args.ffn)
            yield depth, source


def main() -> None:
    args = shapes(__doc__.splitlines()[0], LENGTH)
    print("| blocks | peak, MiB | boundary activations, MiB | rest, MiB | estimate, MiB |")
    print("|---|---|---|---|---|")
    for depth, source in checkpoints(args):
        run = subprocess.run(
            [sys.executable, "-c", PRUNE, str(source), str(source.with_name("out"))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(run.stdout.splitlines()[-1])
        boundaries = SAMPLES * LENGTH * args.hidden * 4 * (depth + 1) / 2**20
        peak = found["peak"] / 2**20
        print(
            f"| {depth} | {peak:.0f} | {boundaries:.0f} | {peak - boundaries:.0f} | "
            f"{found['estimate'] / 2**20:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
