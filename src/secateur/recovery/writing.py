"""The healed folder: other weights in the layout of the pruned one, with its plan and code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import Checkpoint
from secateur.checkpoint.writer import write_bytes, write_json, write_tensors
from secateur.modules import MODELING_FILE
from secateur.outputs.hf import COPIED, INDEX, PLAN_TENSORS, RECORD, check_own, check_range
from secateur.recovery.card import healed_card
from secateur.recovery.source import Pruned, raw_config


def write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    merged: Callable[[str, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    step: Callable[[str], None],
) -> None:
    """Write config and weight files, in the same files under the same names as in the source.

    Args:
        merged: from a tensor's name and stored values to those that are to be written.
        dtype: type of all floating tensors.
        step: called with each finished file's name.

    Raises:
        OutputError: a value does not fit the type.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for path in checkpoint.files:
        tensors: dict[str, torch.Tensor] = {}
        for name in (n for n, info in checkpoint.tensors.items() if info.file == path):
            tensor = merged(name, checkpoint.read(name))
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        check_range(tensors, dtype, "the healed model", or_else=", or a lower --lr")
        write_tensors(folder / path.name, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        step(path.name)
    if (checkpoint.folder / INDEX).is_file():
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = raw_config(checkpoint.folder)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    for name in (*COPIED, MODELING_FILE, PLAN_TENSORS):
        if (checkpoint.folder / name).is_file():
            check_own(checkpoint.folder / name, checkpoint.folder)
            write_bytes(folder / name, (checkpoint.folder / name).read_bytes())


def write_record(folder: Path, pruned: Pruned, healed: dict[str, Any]) -> dict[str, Any]:
    """Write ``secateur.json`` and the model card; return the record.

    Args:
        healed: how the model was healed, which becomes the record's entry of that name.
    """
    plan = pruned.record["plan"]
    names = sorted(pruned.stream.anatomy.denses)
    # To whoever cuts the original again by this plan, all weights of these layers are new.
    blocks = [{**block, "new_weights": names} for block in plan["blocks"]]
    record = {**pruned.record, "plan": {**plan, "blocks": blocks}, "healed": healed}
    write_json(folder / RECORD, record)
    stock = not (pruned.checkpoint.folder / MODELING_FILE).is_file()
    card = healed_card(record, name=Path(pruned.checkpoint.source).name, stock=stock)
    write_bytes(folder / "README.md", card.encode())
    return record
