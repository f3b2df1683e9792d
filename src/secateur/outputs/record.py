"""What ``secateur.json`` in a written folder says of how the model came to be.

A folder may have come from anywhere, so nothing in the file is taken to be of the type that it
should have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.errors import SourceError
from secateur.outputs.hf import RECORD

SIZES = ("parameters", "decoder_parameters")


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that ``prune`` or ``heal`` wrote, if there is one that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "plan" in record else None


def healed_text(record: dict[str, Any] | None) -> str | None:
    """How a model was healed, in a few words; None where it was not."""
    if record is None or "healed" not in record:
        return None
    try:
        healed = record["healed"]
        settings, origin = healed["settings"], healed["text"]["origin"]
        numbers = [healed["steps"], settings["batch"], settings["length"]]
        if not all(isinstance(number, int) and abs(number) < 2**63 for number in numbers):
            raise TypeError("no numbers")
        steps, batch, length = numbers
        tokens = steps * batch * length
        return f"{settings['method']}, {steps} steps, {tokens:,} tokens of {origin}"
    except (KeyError, IndexError, TypeError):  # that it was healed, it says still
        return f"{RECORD} is damaged where it says how"


def healed(checkpoint: Checkpoint) -> str | None:
    """How an opened model was healed, by its folder's record or by its file's own mark."""
    return checkpoint.healed or healed_text(record_of(checkpoint.folder))


def zeros_of(record: dict[str, Any] | None) -> int:
    """How many zeros ``prune`` has made in what it left; 0 where the record does not say."""
    reached = (record or {}).get("reached")
    zeros = reached.get("zeros") if isinstance(reached, dict) else None
    return zeros if isinstance(zeros, int) and 0 < zeros < 2**63 else 0


def check_record(record: dict[str, Any], source: object) -> None:
    """Whether a record says what the card of a healed model tells of it, in these types.

    Args:
        source: what the user called the folder.

    Raises:
        SourceError: it does not.
    """
    wanted: list[tuple[str, type]] = [
        ("recipe.method", str),
        ("versions.secateur", str),
        ("asked.parameters_removed", int),
        ("plan.share_removed", float),
        ("plan.decoder_share_removed", float),
        *[(f"plan.{size}.{when}", int) for size in SIZES for when in ("before", "after")],
    ]
    for path, kind in wanted:
        value: Any = record
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not (isinstance(value, kind) and _is_no_large_number(value)):
            raise SourceError(
                f"source {source} has a damaged {RECORD}: its {path} is {str(value)[:80]!r}, and "
                f"should be of type {kind.__name__}; prune the model again"
            )


def _is_no_large_number(value: Any) -> bool:
    """Whether a value, if it is a number, is finite and of a size that can be counted to."""
    return not isinstance(value, int | float) or -(2**63) < value < 2**63
