"""Which folders can be healed: those that ``prune`` wrote, with smaller shapes, not yet healed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint, local_path, open_checkpoint
from secateur.checkpoint.packed import PACKED_TYPE
from secateur.errors import MemoryLimitError, SourceError
from secateur.estimate import BASE
from secateur.outputs.hf import RECORD
from secateur.outputs.record import check_record, healed_text, record_of, zeros_of
from secateur.streaming import Stream


@dataclass(frozen=True)
class Pruned:
    """A folder that can be healed, and the content of its ``secateur.json``."""

    checkpoint: Checkpoint
    stream: Stream
    record: dict[str, Any]


def open_pruned(source: str | Path, *, trust_remote_code: bool = False) -> Pruned:
    """Open the folder of a pruned model, to heal it.

    Raises:
        SourceError: ``prune`` did not write it, or it is of a kind that cannot be healed.
    """
    from secateur.exporting import brings_only_our_code

    place = local_path(source)
    if place.is_file():
        raise SourceError(
            f"source {source} is a file: heal the folder that secateur prune wrote, then make the "
            "file from it with secateur export"
        )
    record = record_of(place)
    if record is None:
        raise SourceError(
            f"source {source} was not written by secateur prune (it has no {RECORD}): prune the "
            "model into a folder first, then heal that"
        )
    healed = healed_text(record)
    if healed is not None:
        raise SourceError(
            f"source {source} has been healed already ({healed}): heal the pruned folder that it "
            "was made from, with more --steps"
        )
    check_record(record, source)
    zeros = zeros_of(record)
    if zeros:
        raise SourceError(
            f"source {source} has {zeros:,} zeros, which merged adapters would fill: heal a model "
            "that --remove alone made smaller"
        )
    if raw_config(place).get("model_type") == PACKED_TYPE:
        raise SourceError(
            f"source {source} is packed: write it plain with secateur export --to plain, and heal "
            "that"
        )
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if "rotation" in getattr(checkpoint.config, "secateur", {}):
        raise SourceError(
            f"source {source} has a sliced hidden width (--method slicegpt), whose shortcut "
            "matrices no healing knows: heal a model of another method"
        )
    if not trust_remote_code:
        brings_only_our_code(checkpoint)
    return Pruned(checkpoint, Stream(checkpoint), record)


def raw_config(folder: Path) -> dict[str, Any]:
    """The folder's config as it stands there; empty where none can be read."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # opening the folder says what is wrong
        return {}
    return raw if isinstance(raw, dict) else {}


def check_fits(stream: Stream, free: int | None = None) -> None:
    """Whether the whole model can be in memory, which training needs.

    Raises:
        MemoryLimitError: it cannot.
    """
    if free is None:
        import psutil

        free = int(psutil.virtual_memory().available)
    parameters = sum(p.numel() for p in stream.stored_parameters().values())
    # It is read in float32; narrower types are made of that, a tensor at a time.
    needed = 4 * parameters + BASE
    if needed > free:
        raise MemoryLimitError(
            f"healing holds the whole model: {needed / 2**20:,.0f} MiB in float32, before "
            f"activations, and {free / 2**20:,.0f} MiB are free; it is for small models, or for a "
            "machine with more memory"
        )
