"""Wanda-SP: Wanda's score (Sun et al., arXiv 2306.11695) summed over whole units, as the authors of
FLAP (arXiv 2312.11983) compare with. ``docs/wanda-sp.md``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.scored import Scored, ScoredOptions, Scores, by_unit


class WandaSpOptions(ScoredOptions):
    """Settings of Wanda-SP."""

    inputs: Literal["sequential", "identical"] = Field(
        "sequential", description="statistics from the cut prefix, or from the uncut model"
    )


@register
class WandaSp(Scored):
    """See the module."""

    name = "wanda-sp"
    summary = "heads and neurons by weight times input norm, the same share of every block"
    Options = WandaSpOptions
    options: WandaSpOptions
    needs: ClassVar[Literal["moments", "channels"]] = "channels"

    @property
    def identical_inputs(self) -> bool:
        return self.options.inputs == "identical"

    def scores(self, block: Block) -> Scores:
        """mean_i |W_ij| * ||x_j||_2, summed over a group."""
        anatomy, found = block.anatomy, {}
        for name in self._denses(anatomy):
            norms = block.channels[anatomy.denses[name].reads].norm
            score = block.weights[name].double().abs().mean(0) * norms
            found[name] = by_unit(score, self._unit_width(anatomy, name))
        return found
