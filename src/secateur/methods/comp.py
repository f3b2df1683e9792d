"""COMP: coarse layers, fine input neurons, tuned masks (Xu et al., arXiv 2501.15255).

Readings where the paper is silent or cannot be meant by the letter, and what each was measured to
do, stand in ``docs/comp.md``. Equation numbers below are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block, Method, Quotas, register
from secateur.plans import BlockCut, live_rows, removed_by_counts
from secateur.solvers.budget import Curve, LazyValues, share_out, threshold_search
from secateur.solvers.gram import Order, gram, importance
from secateur.solvers.mask_tuning import MaskCurve, guarded

#: Which linear layers lose inputs, by the signal that they read.
DENSES = {
    "all": {"attention", "heads", "ffn", "neurons"},
    "outputs": {"heads", "neurons"},
    "neurons": {"neurons"},
}


class CompOptions(BaseModel):
    """Settings of COMP."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="whole blocks to remove; auto: chosen by the loss on held-out windows"
    )
    max_layers: int = Field(4, ge=0, description="most blocks that auto tries to remove")
    denses: Literal["all", "outputs", "neurons"] = Field(
        "neurons",
        description="linear layers that lose inputs: all (the paper), outputs (attention output "
        "and FFN down, whose producing rows die too), neurons (FFN down only)",
    )
    order: Order = Field("energy", description="which inputs go first")
    allocation: Literal["variance", "error"] = Field(
        "error", description="common threshold within a block: Var of the tuned mask, or error"
    )
    shares: Literal["importance", "uniform"] = Field(
        "importance", description="share of each block: by 1/importance (Eq. 10), or the same"
    )
    inputs: Literal["identical", "sequential"] = Field(
        "identical", description="statistics from the uncut model (the paper), or the cut prefix"
    )
    exempt_first: int = Field(2, ge=0, description="first blocks that lose no inputs")
    exempt_last: int = Field(1, ge=0, description="last blocks that lose no inputs")
    cap: float = Field(0.85, gt=0, lt=1, description="largest share that one block may lose")
    tune: bool = Field(True, description="mask tuning (Eq. 5)")
    damping: float = Field(0.01, gt=0, description="pull of tuned scales to 1, of mean diag G")
    order_damping: float = Field(1e-4, gt=0, description="damping of G where orders invert it")
    grid: int = Field(64, ge=4, description="steps of c in Algorithm 1, per linear layer")
    count: Literal["file", "columns"] = Field(
        "file", description="what counts as removed: all that leaves the file, or columns alone"
    )


@register
class Comp(Method):
    """See the module and ``docs/comp.md``."""

    name = "comp"
    summary = "layers by cosine, then input neurons by condition number, with mask tuning"
    Options = CompOptions
    options: CompOptions

    @property
    def identical_inputs(self) -> bool:
        return self.options.inputs == "identical"

    # ---- layer stage -------------------------------------------------------------------------

    def layer_counts(self, most: int) -> Sequence[int]:
        if self.options.layers == "auto":
            return range(min(most, self.options.max_layers) + 1)
        if self.options.layers > most:
            raise RecipeError(
                f"layers is {self.options.layers}, but the share that was asked for is worth at "
                f"most {most} blocks: lower --layers or raise --remove"
            )
        return (self.options.layers,)

    def layer_importance(self, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        """Eq. 3: I_l = 1 - E_t cos(x_t^l, x_t^{l+1})."""
        cosine = torch.nn.functional.cosine_similarity(inputs, outputs, dim=-1)
        return 1 - float(cosine.double().mean())

    def quotas(self, anatomy: Anatomy, importances: dict[int, float], total: int) -> Quotas:
        """Eq. 10: r_l = w_l (r N - n N^) / N^ with w_l proportional to 1 / I_l."""
        layers = list(importances)
        end = max(0, len(layers) - self.options.exempt_last)
        prunable = layers[self.options.exempt_first : end]
        cap = int(self.options.cap * self._most_removable(anatomy))
        if total > cap * len(prunable):
            raise RecipeError(
                f"{total:,} parameters should leave {len(prunable)} blocks, which can lose at most "
                f"{cap * len(prunable):,}: ask for less, remove whole blocks with --layers, or set "
                f"denses: all, exempt_first and exempt_last in a recipe"
            )
        if self.options.shares == "uniform":
            weights = dict.fromkeys(prunable, 1.0)
        else:
            # An importance of zero (a block that changes nothing) would take the whole budget.
            floor = 1e-6
            weights = {i: 1 / max(importances[i], floor) for i in prunable}
        shared = share_out(total, weights, dict.fromkeys(prunable, cap))
        return {i: shared.get(i, 0) for i in layers}

    def unit(self, anatomy: Anatomy) -> int:
        """Parameters of one input, where all inputs that may go cost the same; else 1."""
        denses = self._denses(anatomy)
        if len(denses) > 1:
            return 1
        inputs = anatomy.denses[denses[0]].inputs
        return self._removed(anatomy, {denses[0]: torch.arange(inputs - 1)})

    def _most_removable(self, anatomy: Anatomy) -> int:
        """Parameters gone if every layer that may lose inputs kept only one."""
        inputs = {n: torch.arange(1) for n in self._denses(anatomy)}
        return self._removed(anatomy, inputs)

    # ---- neuron stage ------------------------------------------------------------------------

    def _denses(self, anatomy: Anatomy) -> list[str]:
        wanted = DENSES[self.options.denses]
        return [name for name, dense in anatomy.denses.items() if dense.reads in wanted]

    def signals(self, anatomy: Anatomy) -> set[str]:
        return {anatomy.denses[name].reads for name in self._denses(anatomy)}

    def _removed(self, anatomy: Anatomy, inputs: dict[str, torch.Tensor]) -> int:
        counts = {name: len(kept) for name, kept in inputs.items()}
        if self.options.count == "columns":  # the paper's own accounting: p per column
            return sum(
                anatomy.denses[name].rows * (anatomy.denses[name].inputs - left)
                for name, left in counts.items()
            )
        rows = {name: len(kept) for name, kept in live_rows(anatomy, inputs).items()}
        return removed_by_counts(anatomy, counts, rows)

    def cut(self, block: Block, quota: int) -> BlockCut:
        """Algorithm 1 on one block."""
        options, anatomy = self.options, block.anatomy
        if quota == 0:
            return BlockCut(block.source)
        tuned: dict[str, MaskCurve] = {}
        curves: dict[str, Curve] = {}
        for name in self._denses(anatomy):
            covariance = block.moments[anatomy.denses[name].reads].covariance
            g = gram(block.weights[name], covariance)  # Eq. 4
            scores = importance(  # Eq. 8, 9
                options.order, g, damping=options.order_damping, generator=block.generator
            )
            tuned[name] = MaskCurve(g, scores, options.damping)  # Eq. 5 to 7, every c
            curves[name] = self._curve(tuned[name])

        def kept(counts: dict[str, int]) -> dict[str, torch.Tensor]:
            return {name: tuned[name].kept(c) for name, c in counts.items() if c}

        counts, threshold = threshold_search(
            curves, lambda counts: self._removed(anatomy, kept(dict(counts))), quota
        )
        cut = BlockCut(block.source, inputs=kept(counts))
        cut.rows = live_rows(anatomy, cut.inputs)
        cut.notes = {"threshold": _short(threshold), "error": {}}
        for name, kept_inputs in cut.inputs.items():
            if tuned[name].damping > options.damping:
                cut.notes.setdefault("more_damping", {})[name] = tuned[name].damping
            if options.tune:
                scales, good = guarded(tuned[name].tuned(counts[name]))
                cut.scales[name] = scales.to(torch.float32)
                if good:
                    cut.notes["error"][name] = _short(tuned[name].error(counts[name]))
                else:
                    cut.notes.setdefault("not_tuned", []).append(name)
            cut.inputs[name] = kept_inputs
        return cut

    def _curve(self, masks: MaskCurve) -> Curve:
        """Values of the stopping rule at c = 0, step, 2 step, ... up to all but one input."""
        step = max(1, len(masks) // self.options.grid)
        counts = [*range(0, len(masks) - 1, step), len(masks) - 1]
        rule = masks.variance if self.options.allocation == "variance" else masks.error
        return Curve(counts, LazyValues(rule, counts))


def _short(value: float) -> float:
    """Six digits: enough for a report, and the same text on every machine of one kind."""
    return float(f"{value:.6g}")
