"""Random units: what any choice has to beat. ``docs/random.md``."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.scored import Scored, ScoredOptions, Scores


class RandomOptions(ScoredOptions):
    """Settings of random pruning."""

    shares: Literal["uniform", "global"] = Field(
        "uniform", description="the same share of each block, or one draw over all blocks"
    )


@register
class Random(Scored):
    """See the module."""

    name = "random"
    summary = "heads and neurons at random: what any choice has to beat"
    Options = RandomOptions
    options: RandomOptions

    @property
    def pooled(self) -> bool:
        return self.options.shares == "global"

    def signals(self, anatomy: Anatomy) -> set[str]:
        return set()

    def scores(self, block: Block) -> Scores:
        """Uniform in [0, 1), from the recipe's seed and the block's number."""
        anatomy, drawn = block.anatomy, {}
        for name in self._denses(anatomy):
            units = anatomy.denses[name].inputs // self._unit_width(anatomy, name)
            drawn[name] = torch.rand(units, generator=block.generator, dtype=torch.float64)
        return drawn
