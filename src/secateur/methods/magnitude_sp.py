"""Structured magnitude pruning: units whose weights are small go. ``docs/magnitude-sp.md``."""

from __future__ import annotations

from secateur.anatomy import Anatomy
from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.scored import Scored, ScoredOptions, Scores, by_unit


@register
class MagnitudeSp(Scored):
    """See the module."""

    name = "magnitude-sp"
    summary = "heads and neurons by the norms of their output weights; no calibration"
    Options = ScoredOptions
    options: ScoredOptions

    def signals(self, anatomy: Anatomy) -> set[str]:
        return set()

    def scores(self, block: Block) -> Scores:
        """||W_:j||_2 of the attention output and the FFN's last layer, summed over a group."""
        return {
            name: by_unit(
                block.weights[name].double().norm(dim=0), self._unit_width(block.anatomy, name)
            )
            for name in self._denses(block.anatomy)
        }
