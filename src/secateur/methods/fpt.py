"""FPT (Kwon et al., NeurIPS 2022, arXiv 2204.09656): mask search, rearrangement, mask tuning.

Made for encoders with a task; here for decoders with their own loss. ``docs/fpt.md`` has the
equations, our readings, and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.methods.base import Block
from secateur.methods.by_gradient import ByGradient, GradientOptions
from secateur.methods.registry import register
from secateur.methods.scored import Scores
from secateur.methods.units import Exempt
from secateur.plans import BlockCut
from secateur.solvers.budget import nearest
from secateur.solvers.gram import gram, ordering
from secateur.solvers.ladder import solving_for
from secateur.solvers.mask_search import fisher_diagonal, rearranged, search
from secateur.solvers.mask_tuning import MaskCurve, guarded
from secateur.solvers.pooling import lowest


class FptOptions(GradientOptions):
    """Settings of FPT."""

    shares: Literal["search", "uniform"] = Field(
        "search", description="mask search over all blocks, or the same share of each"
    )
    rearrange: bool = Field(
        True, description="swap units within a layer by the block-diagonal Fisher matrix"
    )
    tune: bool = Field(True, description="mask tuning: a scale for each kept group and neuron")
    damping: float = Field(0.01, gt=0, description="pull of tuned scales to 1, of mean diag G")
    inputs: Literal["sequential", "identical"] = Field(
        "sequential", description="mask tuning on the cut prefix, or on the uncut model"
    )
    batch: int = Field(1, ge=1, description="windows whose gradients are one vector of Fisher's")
    exempt_first: Exempt = Field(0, description="first blocks that lose nothing; auto: 4 of 32")
    exempt_last: Exempt = Field(0, description="last blocks that lose nothing; auto: 2 of 32")


@register
class Fpt(ByGradient):
    """See the module."""

    name = "fpt"
    summary = "heads and neurons by Fisher information, searched over all blocks, with mask tuning"
    Options = FptOptions
    options: FptOptions

    @property
    def pooled(self) -> bool:
        return self.options.shares == "search"

    @property
    def identical_inputs(self) -> bool:
        return self.options.inputs == "identical" or not self.options.tune

    @property
    def windows_per_gradient(self) -> int | None:
        return self.options.batch

    def signals(self, anatomy: Anatomy) -> set[str]:
        """Of the pass that cuts: what mask tuning reads."""
        read = {anatomy.denses[name].reads for name in self._denses(anatomy)}
        return read if self.options.tune else set()

    # ---- mask search ---------------------------------------------------------------------------

    def scores(self, block: Block) -> Scores:
        """Gradients of the mask variables by batch, (batches, units), float64.

        A variable that multiplies inputs j of W multiplies their columns, so that its gradient is
        the sum over them of W_ij dL/dW_ij: weight gradients are enough.
        """
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self._denses(block.anatomy)}
        for gradients in block.gradients:
            for name, batches in found.items():
                columns = (block.weights[name].double() * gradients[name]).sum(0)
                width = self._unit_width(block.anatomy, name)
                batches.append(columns.reshape(-1, width).sum(1).cpu())
        return {name: torch.stack(batches) for name, batches in found.items()}

    def ranked(self, surveys: Mapping[int, Any]) -> dict[int, Scores]:
        return {
            layer: {name: fisher_diagonal(gradients) for name, gradients in survey.items()}
            for layer, survey in surveys.items()
        }

    def _pooled(
        self, anatomy: Anatomy, costs: dict[str, int], surveys: Mapping[int, Scores], total: int
    ) -> dict[int, dict[str, int]]:
        heads, neurons = (anatomy.coupling(kind).consumer for kind in ("values", "neurons"))
        if heads not in costs or isinstance(self.options.groups, int):
            return super()._pooled(anatomy, costs, surveys, total)
        pieces = self._unit_counts(anatomy, neurons)
        own = {i: scores[neurons] for i, scores in surveys.items()}

        def left(groups: Mapping[int, int]) -> int:
            return total - costs[heads] * sum(groups.values())

        def fill(groups: Mapping[int, int]) -> dict[int, int]:
            return lowest(
                own,
                lambda _, count: nearest(pieces, count),
                lambda counts: costs[neurons] * sum(counts.values()),
                left(groups),
            )

        def miss(groups: Mapping[int, int], found: Mapping[int, int]) -> int:
            return abs(left(groups) - costs[neurons] * sum(found.values()))

        groups, found = search(
            {i: scores[heads] for i, scores in surveys.items()},
            own,
            most=self._unit_counts(anatomy, heads)[-1],
            fill=fill,
            miss=miss,
            tolerance=costs[neurons] * (pieces[1] if len(pieces) > 1 else 1),
        )
        return {i: {heads: groups[i], neurons: found[i]} for i in surveys}

    def chosen(self, survey: Any, scores: Scores, name: str, count: int) -> torch.Tensor:
        if not self.options.rearrange:
            return super().chosen(survey, scores, name, count)
        return rearranged(survey[name], count)

    # ---- mask tuning ---------------------------------------------------------------------------

    def finish(self, block: Block, cut: BlockCut) -> None:
        """min_m E|| W_S Diag(m) x_S - W x ||^2, one variable a unit; not of block 0's attention."""
        if not self.options.tune:
            return
        for name, kept in cut.inputs.items():
            dense = block.anatomy.denses[name]
            if dense.reads == "heads" and block.source == 0:
                continue
            width = self._unit_width(block.anatomy, name)
            whole = gram(block.weights[name], block.moments[dense.reads].covariance)
            units = len(whole) // width
            g = whole.reshape(units, width, units, width).sum((1, 3))
            stays = torch.zeros(units, device=g.device)
            stays[kept[::width] // width] = 1
            with solving_for(name):
                curve = MaskCurve(ordering(g), stays, self.options.damping)
                scales, good = guarded(curve.tuned(units - len(kept) // width))
            cut.notes.setdefault("tuned", {})[name] = good
            if good:
                cut.scales[name] = scales.repeat_interleave(width).to(torch.float32)
