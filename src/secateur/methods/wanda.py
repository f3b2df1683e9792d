"""Wanda (Sun et al., ICLR 2024): weight times the norm of what it reads; no weight changes.

Equations and our readings stand in ``docs/wanda.md``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.sparse import SparseMethod, SparseOptions


class WandaOptions(SparseOptions):
    """Settings of Wanda."""

    compete: Literal["row", "layer"] = Field(
        "row", description="weights compete in their row, or in the whole layer"
    )


@register
class Wanda(SparseMethod):
    """See the module."""

    name = "wanda"
    summary = "zeros by weight times input norm, row by row, kept weights as they were"
    Options = WandaOptions
    options: WandaOptions

    needs = "channels"

    def sparse(self, block: Block, name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
        """S_ij = |W_ij| ||X_j||_2 (Eq. 1), lowest of each row or of each group."""
        scores = weight.abs() * self.squares(block, name).sqrt().to(weight.dtype)
        return self.zeroed(weight, scores, count)
