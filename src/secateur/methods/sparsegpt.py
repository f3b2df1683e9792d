"""SparseGPT (Frantar & Alistarh, ICML 2023): one column after the other, left to right.

Equations and our readings stand in ``docs/sparsegpt.md``.
"""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.sparse import SparseMethod, SparseOptions
from secateur.solvers.removal import Removal, remove


class SparseGptOptions(SparseOptions):
    """Settings of SparseGPT."""

    block: int = Field(128, ge=1, description="columns whose mask is chosen together")
    damping: float = Field(0.01, gt=0, description="of H, as a share of mean diag H")


@register
class SparseGpt(SparseMethod):
    """See the module."""

    name = "sparsegpt"
    summary = "zeros by Optimal Brain Surgeon, one column after the other"
    Options = SparseGptOptions
    options: SparseGptOptions

    def layer_work(self, rows: int, inputs: int) -> float:
        """Errors go to all columns on the right."""
        return super().layer_work(rows, inputs) + float(rows * inputs**2)

    def sparse(self, block: Block, name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
        """Lowest w^2 / U_jj^2 of a block of columns over all rows; errors go to the right."""
        how = Removal("S", "S", self.options.block, self.options.damping, shrinking=True)
        return remove(weight, self.second(block, name), self.pattern, count, how).weight
