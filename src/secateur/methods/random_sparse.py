"""Zeros in random places: what every sparse method must be better than."""

from __future__ import annotations

import torch

from secateur.anatomy import Anatomy
from secateur.methods.base import Block
from secateur.methods.magnitude import refuse_allocation
from secateur.methods.registry import register
from secateur.methods.sparse import SparseMethod, SparseOptions


@register
class RandomSparse(SparseMethod):
    """Also called ``random`` together with a sparsity."""

    name = "random-sparse"
    summary = "zeros in random places, drawn by the seed; reads no text"
    Options = SparseOptions

    def signals(self, anatomy: Anatomy) -> set[str]:
        return set()

    def check(self, anatomy: Anatomy) -> None:
        refuse_allocation(self)
        super().check(anatomy)

    def sparse(self, block: Block, name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
        scores = torch.rand(weight.shape, generator=block.generator).to(weight.device)
        return self.zeroed(weight, scores, count)
