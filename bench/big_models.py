"""Memory and seconds of pruning a model of several billion parameters, by its shape.

    python bench/big_models.py write FOLDER --shape llama-2-7b [--blocks 32]
    python bench/big_models.py prune FOLDER --out DIR [--method comp] [--set copies=0 ...]
        [--device cuda]

``write`` makes a checkpoint of seeded random weights in float16: matrices whose inputs have a
spectrum that falls, and a few rows of an early block's FFN output that make massive activations,
since flat noise has neither. ``prune`` removes 20% of the parameters of the blocks in a process of
its own and prints the peak of resident memory less mapped file pages (of a GPU, what torch has
allocated at most), seconds by stage, and seconds by kind of work (``bench/stages.py``) beside their
floor: bytes over the measured bandwidth of reading and writing, operations over the measured rate
of matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stages import floor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SAMPLES, LENGTH = 10, 128

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    },
    "opt-6.7b": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384,
        "num_hidden_layers": 32, "num_attention_heads": 32, "word_embed_proj_dim": 4096,
        "do_layer_norm_before": True, "max_position_embeddings": 2048,
    },
}  # fmt: skip

PRUNE = """
import json, sys, time
sys.path.insert(0, sys.argv[4])
import torch
from secateur.pruning import prune
from secateur.recipe import make_recipe
from stages import Stages

settings = json.loads(sys.argv[3])
kinds = Stages()
kinds.watch()
began = time.time()
result = prune(sys.argv[1], sys.argv[2], make_recipe(**settings["recipe"]), verify=False,
    device=settings["device"])
found = {"peak": result.peak_memory, "estimate": result.estimate.memory,
    "estimated_seconds": result.estimate.seconds, "stages": result.seconds,
    "kinds": kinds.seconds, "counts": kinds.counts,
    "seconds": time.time() - began, "removed": result.plan.gone}
if settings["device"].startswith("cuda"):
    found["gpu"] = [torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()]
print(json.dumps(found))
"""


def write_checkpoint(folder: Path, shape: str, blocks: int | None) -> None:
    """Seeded float16 shards, one a block."""
    import tiny
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(SHAPES[shape])
    if blocks is not None:
        fields["num_hidden_layers"] = blocks
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, dtype="float16")
    config.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups: dict[str, list[str]] = {}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name in shapes:
        number = next((part for part in name.split(".") if part.isdigit()), "rest")
        groups.setdefault(f"model-{number}.safetensors", []).append(name)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for shard, names in groups.items():
        values = {name: _weights(name, shapes[name], generator).half() for name in names}
        save_file(values, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights(name: str, shape: Any, generator: Any) -> Any:
    import torch

    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    values = torch.randn(shape, generator=generator) * 0.02
    if "embed" in name or "lm_head" in name:
        return values
    # Inputs are not alike: their scales fall by a power law, in random order.
    place = torch.randperm(shape[1], generator=generator).float()
    values *= ((1 + place) / shape[1]).pow(-0.3).clamp(max=8)
    if ".1." in name and name.endswith(("down_proj.weight", "fc2.weight")):
        values[:3] *= 40  # three massive channels of the stream from the second block on
    return values


def measured_rates(folder: Path, out: Path, device: str) -> dict[str, float]:
    """Bytes a second read from one folder and written to another; operations a second."""
    import torch

    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    began = time.perf_counter()
    with shard.open("rb", buffering=0) as file:
        size = 0
        while part := file.read(2**24):
            size += len(part)
    reading = size / (time.perf_counter() - began)
    rates = {"bytes read": reading}
    scratch = out / "scratch"
    began = time.perf_counter()
    with scratch.open("wb") as file:
        for _ in range(32):
            file.write(bytes(2**24))
        file.flush()
        os.fsync(file.fileno())
    rates["bytes written"] = 2**29 / (time.perf_counter() - began)
    scratch.unlink()
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        a = torch.randn(1536, 1536, dtype=dtype, device=device)
        float((a @ a)[0, 0])
        began = time.perf_counter()
        for _ in range(5):
            b = a @ a
        float(b[0, 0])  # a GPU has done it when it says so
        rates[name] = 5 * 2 * 1536**3 / (time.perf_counter() - began)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["write", "prune"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--method", default="comp")
    parser.add_argument("--remove", default="20%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], dest="options")
    args = parser.parse_args()
    if args.verb == "write":
        args.folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(args.folder, args.shape, args.blocks)
        return
    import yaml

    options = {key: yaml.safe_load(value) for key, value in (o.split("=") for o in args.options)}
    recipe = {
        "method": args.method, "remove": args.remove, "of": "decoder", "options": options,
        "calibration": {"samples": SAMPLES, "length": LENGTH},
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", PRUNE, str(args.folder), str(args.out),
         json.dumps({"recipe": recipe, "device": args.device}), str(Path(__file__).parent)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(run.stdout.splitlines()[-1])
    rates = measured_rates(args.folder, args.out, args.device)
    print(f"removed {found['removed']:,} parameters in {found['seconds']:.0f} s")
    print(f"peak {found['peak'] / 2**20:.0f} MiB, estimate {found['estimate'] / 2**20:.0f} MiB")
    if "gpu" in found:
        name, peak = found["gpu"]
        print(f"{name}: peak {peak / 2**20:.0f} MiB allocated")
    for stage, seconds in found["stages"].items():
        print(f"  {stage}: {seconds:.1f} s")
    print("by kind of work, and its floor:")
    for kind, seconds in sorted(found["kinds"].items(), key=lambda item: -item[1]):
        least = floor(kind, found["counts"].get(kind, 0), rates)
        print(f"  {kind}: {seconds:.1f} s" + (f", floor {least:.1f} s" if least else ""))
    print(f"  all else: {found['seconds'] - sum(found['kinds'].values()):.1f} s")
    print(
        f"rates: reading {rates['bytes read'] / 1e9:.2f} GB/s, writing "
        f"{rates['bytes written'] / 1e9:.2f} GB/s, products {rates['float32'] / 1e9:.0f} (float32) "
        f"and {rates['float64'] / 1e9:.0f} (float64) billions a second"
    )


if __name__ == "__main__":
    main()
