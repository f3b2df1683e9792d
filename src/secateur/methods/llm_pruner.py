"""LLM-Pruner (Ma et al., NeurIPS 2023, arXiv 2305.11627): coupled groups by what the loss gains.

``docs/llm-pruner.md`` has the equations, our readings, where the authors' code differs, and what
was measured. Without the fine-tuning that follows in the paper.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.methods.base import Block
from secateur.methods.by_gradient import ByGradient, GradientOptions
from secateur.methods.registry import register
from secateur.methods.scored import Scores
from secateur.methods.units import members
from secateur.solvers.taylor import GradientSums, Order, Reduction, loss_change, over_units, reduced

#: Term of the Taylor series by the name of the score.
ORDERS: dict[str, Order] = {
    "vector": "first", "param_first": "first", "param_second": "second", "param_mix": "mixed",
}  # fmt: skip


class LlmPrunerOptions(GradientOptions):
    """Settings of LLM-Pruner."""

    score: Literal["param_first", "param_second", "param_mix", "vector"] = Field(
        "param_first",
        description="of each weight: |W g|, |W^2 F|, |W g - W^2 F / 2|; vector: |sum of W g| of "
        "each row or column",
    )
    reduction: Reduction = Field(
        "sum", description="of the scores that a unit has in the layers that it is made of"
    )
    shares: Literal["local", "global"] = Field(
        "local", description="the same share of each block, or one order over all blocks"
    )


@register
class LlmPruner(ByGradient):
    """See the module."""

    name = "llm-pruner"
    summary = "heads and neurons by gradient times weight, over all layers that a unit is made of"
    Options = LlmPrunerOptions
    options: LlmPrunerOptions
    same_shares = "local"

    @property
    def pooled(self) -> bool:
        return self.options.shares == "global"

    @property
    def _order(self) -> Order:
        return ORDERS[self.options.score]

    @property
    def gradients_held(self) -> int:
        return 2 if self._order == "first" else 3

    @property
    def windows_per_gradient(self) -> int | None:
        return None if self._order == "first" else 1  # squares are of each window

    def scores(self, block: Block) -> Scores:
        """Of each KV group and each neuron, from g = mean of g_s and F = mean of g_s^2.

        Means over windows only set the two terms of param_mix against each other; without F the
        number of windows is a factor that orders nothing, and g is their sum.
        """
        sums = GradientSums.of(block.gradients, squares=self._order != "first")
        found = {}
        for name in self._denses(block.anatomy):
            parts = []
            for member in members(block.anatomy, name):
                path, squares = member.path, sums.squares.get(member.path)
                change = loss_change(
                    block.weights[path],
                    sums.total[path] / sums.calls,
                    None if squares is None else squares / sums.calls,
                    self._order,
                )
                vector = self.options.score == "vector"
                parts.append(over_units(change, member.axis, member.width, vector=vector))
            found[name] = reduced(parts, self.options.reduction)
        return found
