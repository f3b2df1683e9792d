"""What goes into each block, kept for a later pass; on disk once it is too much."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from secateur.scratch import scratch

#: Bytes of activations held in memory before the rest goes to a temporary file each.
IN_MEMORY = 2**28


class Boundaries:
    """Activations (windows, length, hidden) by block number."""

    def __init__(self, limit: int = IN_MEMORY) -> None:
        self._limit = limit
        self._held: dict[int, torch.Tensor] = {}
        self._spilled: dict[int, Path] = {}
        self._folder: Path | None = None
        self._open = ExitStack()

    def __setitem__(self, block: int, hidden: torch.Tensor) -> None:
        self._held.pop(block, None)
        self._spilled.pop(block, None)
        size = hidden.numel() * hidden.element_size()
        if size + sum(h.numel() * h.element_size() for h in self._held.values()) <= self._limit:
            self._held[block] = hidden
            return
        if self._folder is None:
            self._folder = self._open.enter_context(scratch())
        from safetensors.torch import save_file

        path = self._folder / f"{block}.safetensors"
        save_file({"hidden": hidden.contiguous().cpu()}, path)
        self._spilled[block] = path

    def __getitem__(self, block: int) -> torch.Tensor:
        if block in self._held:
            return self._held[block]
        from safetensors.torch import load_file

        return load_file(self._spilled[block])["hidden"]

    def pop(self, block: int) -> torch.Tensor:
        """What went into this block, for the last time."""
        hidden = self[block]
        self._held.pop(block, None)
        spilled = self._spilled.pop(block, None)
        if spilled is not None:
            spilled.unlink()
        return hidden

    def close(self) -> None:
        """Forget everything, on disk too."""
        self._held.clear()
        self._spilled.clear()
        self._folder = None
        self._open.close()
