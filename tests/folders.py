"""What an output folder holds, for comparisons of two of them."""

from __future__ import annotations

from pathlib import Path

from secateur.report.pruning import PAGE


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file but the page, which says how long its run took."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != PAGE}
