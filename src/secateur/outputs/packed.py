"""A folder whose files shrink by its zeros, and back: ``export --to packed``, ``--to plain``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from secateur.checkpoint import Checkpoint
from secateur.checkpoint.packed import PACKED_TYPE, TYPE_KEY, pack, worth_packing
from secateur.checkpoint.safetensors_folder import SafetensorsCheckpoint, read_header
from secateur.checkpoint.writer import copy_file, sync_folder, write_json, write_tensors
from secateur.errors import OutputError
from secateur.outputs.hf import INDEX, check_own

NOTE = (
    "only Secateur opens a packed folder: no program that is maintained stores zeros; "
    "secateur export --to plain makes the folder that transformers opens"
)


def repack(
    checkpoint: Checkpoint, out: Path, *, packed: bool, step: Callable[[str], None]
) -> tuple[int, int]:
    """Write every file of a folder again, with matrices packed or plain.

    It is written beside and renamed when it is complete.

    Args:
        checkpoint: a folder, packed or plain.
        out: the new folder.
        step: called with each file's name when it stands.

    Returns:
        bytes of the weight files before and after.

    Raises:
        OutputError: the source is no folder of safetensors.
    """
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise OutputError(
            f"source {checkpoint.source} is no folder of safetensors, which alone can be packed"
        )
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        weights = {path.name for path in checkpoint.files}
        for path in sorted(checkpoint.folder.iterdir()):
            if path.is_file() and path.name not in {*weights, INDEX, "config.json"}:
                check_own(path, checkpoint.folder)
                copy_file(path, beside / path.name)
        weight_map: dict[str, str] = {}
        total = 0
        for file in checkpoint.files:
            made: dict[str, torch.Tensor] = {}
            for name in sorted(n for n, info in checkpoint.tensors.items() if info.file == file):
                tensor = checkpoint.read(name)
                made |= pack(name, tensor) if packed and worth_packing(tensor) else {name: tensor}
            write_tensors(beside / file.name, made)
            for name, info in read_header(beside / file.name).items():
                weight_map[name] = file.name
                total += info.nbytes
            step(file.name)
        if (checkpoint.folder / INDEX).is_file():
            write_json(
                beside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == PACKED_TYPE:
            config["model_type"] = config.pop(TYPE_KEY)
        if packed:
            config |= {"model_type": PACKED_TYPE, TYPE_KEY: config["model_type"]}
        write_json(beside / "config.json", config)
        sync_folder(beside)
        os.replace(beside, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return checkpoint.nbytes, sum((out / name).stat().st_size for name in weights)
