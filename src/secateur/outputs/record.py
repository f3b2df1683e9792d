"""What ``secateur.json`` in a written folder says of how the model came to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.outputs.hf import RECORD


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that ``prune`` or ``heal`` wrote, if there is one that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "plan" in record else None


def healed_text(record: dict[str, Any] | None) -> str | None:
    """How a model was healed, in a few words; None where it was not."""
    if record is None or "healed" not in record:
        return None
    healed = record["healed"]
    settings, text = healed["settings"], healed["text"]
    tokens = healed["steps"] * settings["batch"] * settings["length"]
    return f"{settings['method']}, {healed['steps']} steps, {tokens:,} tokens of {text['origin']}"
