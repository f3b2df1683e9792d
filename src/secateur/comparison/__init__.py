"""Methods, shares and seeds side by side under one protocol."""

from __future__ import annotations

from secateur.comparison.run import Comparison, compare

__all__ = ["Comparison", "compare"]
