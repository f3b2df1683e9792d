"""COMP: coarse layers, fine input neurons, tuned masks (Xu et al., arXiv 2501.15255).

Readings where the paper is silent or cannot be meant by the letter, and what each was measured to
do, stand in ``docs/comp.md``. Equation numbers below are the paper's.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.structured import Structured, StructuredOptions, short
from secateur.plans import BlockCut
from secateur.solvers.gram import GramForm, Order, importance
from secateur.solvers.mask_tuning import MaskCurve, guarded
from secateur.statistics import are_few

#: Which linear layers lose inputs, by the signal that they read.
DENSES = {
    "all": {"attention", "heads", "ffn", "neurons", "mixer", "scan", "steps"},
    "outputs": {"heads", "neurons"},
    "neurons": {"neurons"},
}


class CompOptions(StructuredOptions):
    """Settings of COMP."""

    denses: Literal["all", "outputs", "neurons"] = Field(
        "all",
        description="structure inputs: linear layers that lose inputs: all (the paper), outputs "
        "(attention output and FFN down, whose producing rows die too), neurons (FFN down only)",
    )
    order: Order = Field("energy", description="which inputs go first")
    allocation: Literal["variance", "error"] = Field(
        "error", description="common threshold within a block: Var of the tuned mask, or error"
    )
    tune: bool = Field(True, description="mask tuning (Eq. 5)")
    damping: float = Field(0.01, gt=0, description="pull of tuned scales to 1, of mean diag G")
    order_damping: float = Field(1e-4, gt=0, description="damping of G where orders invert it")
    count: Literal["file", "columns"] = Field(
        "file", description="what counts as removed: all that leaves the file, or columns alone"
    )


@register
class Comp(Structured):
    """See the module and ``docs/comp.md``."""

    name = "comp"
    summary = "layers by cosine, then heads and neurons by what they put out, with mask tuning"
    Options = CompOptions
    options: CompOptions

    def signals_cut(self) -> set[str]:
        return DENSES[self.options.denses]

    def solving(self, anatomy: Anatomy, tokens: int) -> float:
        """W^T W and X^T X, of which halves mirror each other, and the factor of G in float64."""
        found = 0.0
        for name in self._denses(anatomy):
            rows, width = anatomy.denses[name].rows, anatomy.denses[name].inputs
            found += (rows + tokens) * width**2 + 2 * width**3 / 3
        return found

    def layer_bytes(self, rows: int, inputs: int, tokens: int) -> int:
        """Of few tokens: G, which is factorised in place, and panels of it."""
        if are_few(tokens, inputs) and self.options.order == "energy":
            return 12 * inputs**2
        return super().layer_bytes(rows, inputs, tokens)

    def _removed(self, anatomy: Anatomy, inputs: dict[str, torch.Tensor]) -> int:
        if self.options.count == "columns":  # the paper's own accounting: p per column
            return sum(
                anatomy.denses[name].rows * (anatomy.denses[name].inputs - len(kept))
                for name, kept in inputs.items()
            )
        return super()._removed(anatomy, inputs)

    def removal(self, block: Block, name: str, unit: int) -> MaskRemoval:
        options = self.options
        g = GramForm(block.weights[name], block.moments[block.anatomy.denses[name].reads])  # Eq. 4
        if options.order == "energy":
            # Inputs of a group do not cancel by chance once all of them are gone.
            scores = g.diagonal() if unit == 1 else g.of_groups(unit).repeat_interleave(unit)
        else:
            whole = g.ordered(torch.arange(len(g), device=block.weights[name].device))
            scores = importance(  # Eq. 8, 9
                options.order, whole, damping=options.order_damping, generator=block.generator
            )
            if unit > 1:
                scores = scores.reshape(-1, unit).sum(1).repeat_interleave(unit)
            del whole
        return MaskRemoval(MaskCurve(g.ordered, scores, options.damping), options)  # Eq. 5 to 7


class MaskRemoval:
    """Inputs in COMP's order, with their tuned masks."""

    def __init__(self, masks: MaskCurve, options: CompOptions) -> None:
        self._masks = masks
        self._options = options
        self.kept = masks.kept
        self.cost = masks.variance if options.allocation == "variance" else masks.error

    def finish(self, removed: int, cut: BlockCut, name: str) -> None:
        """The tuned scales, or none where the fit is ill-posed."""
        masks = self._masks
        if masks.damping > self._options.damping:
            cut.notes.setdefault("more_damping", {})[name] = masks.damping
        if not self._options.tune:
            return
        scales, good = guarded(masks.tuned(removed))
        cut.scales[name] = scales.to(torch.float32)
        if good:
            cut.notes["error"][name] = short(masks.error(removed))
        else:
            cut.notes.setdefault("not_tuned", []).append(name)
