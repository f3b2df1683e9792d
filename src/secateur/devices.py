"""Which device a user may name."""

from __future__ import annotations

import torch

from secateur.errors import RecipeError


def check_device(name: str) -> str:
    """A device that exists.

    Raises:
        RecipeError: torch does not know it, or there is none here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # as unusable as an unknown one
    if device.type not in ("cpu", "cuda", "mps"):
        raise RecipeError(f"device is {name!r}: choose cpu, cuda, cuda:1 or mps")
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }[device.type]
    if count == 0:
        raise RecipeError(f"device is {name!r}, but torch sees no GPU here: use --device cpu")
    if (device.index or 0) >= count:
        last = f"{device.type}:{count - 1}" if device.type == "cuda" else device.type
        raise RecipeError(f"device is {name!r}, but the last one here is {last}")
    return name
