"""COMP: coarse layers, fine input neurons, tuned masks (Xu et al., arXiv 2501.15255).

Readings where the paper is silent or cannot be meant by the letter, and what each was measured to
do, stand in ``docs/comp.md``. Equation numbers below are the paper's.
"""

from __future__ import annotations

import itertools
import math
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
        "all",
        description="structure inputs: linear layers that lose inputs: all (the paper), outputs "
        "(attention output and FFN down, whose producing rows die too), neurons (FFN down only)",
    )
    groups: Annotated[int, Field(ge=1)] | Literal["auto", "keep"] = Field(
        "auto",
        description="structure coupled: KV groups that each cut block keeps; auto: by the common "
        "threshold, and with layout uniform as many as the FFN's width allows; keep: all",
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
    summary = "layers by cosine, then heads and neurons by what they put out, with mask tuning"
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
        """Eq. 10: r_l = w_l (r N - n N^) / N^ with w_l proportional to 1 / I_l.

        Uniform widths leave nothing to share out: every block loses the same.
        """
        options, layers = self.options, list(importances)
        end = len(layers) if self.form.uniform else max(0, len(layers) - options.exempt_last)
        prunable = layers[0 if self.form.uniform else options.exempt_first : end]
        cap = int(options.cap * self._most_removable(anatomy))
        if total > cap * len(prunable):
            settings = "exempt_first, exempt_last and cap"
            if self.form.structure == "inputs":
                settings = "denses: all, exempt_first and exempt_last"
            elif self.form.uniform:
                settings = "cap"
            raise RecipeError(
                f"{total:,} parameters should leave {len(prunable)} blocks, which can lose at most "
                f"{cap * len(prunable):,}: ask for less, remove whole blocks with --layers, "
                f"or set {settings} in a recipe"
            )
        if self.form.uniform:
            return dict.fromkeys(layers, round(total / len(layers)))
        if options.shares == "uniform":
            weights = dict.fromkeys(prunable, 1.0)
        else:
            # An importance of zero (a block that changes nothing) would take the whole budget.
            floor = 1e-6
            weights = {i: 1 / max(importances[i], floor) for i in prunable}
        shared = share_out(total, weights, dict.fromkeys(prunable, cap))
        return {i: shared.get(i, 0) for i in layers}

    def check(self, anatomy: Anatomy) -> None:
        """Whether blocks of this model can keep the wanted number of KV groups."""
        wanted = self.options.groups
        legal = self.form.groups or tuple(range(1, anatomy.kv_heads + 1))
        if isinstance(wanted, int) and wanted not in legal:
            raise RecipeError(
                f"groups is {wanted}, but the stock class of {anatomy.model_type} holds "
                f"{', '.join(map(str, legal))} KV groups: choose one of these, auto or keep"
                if self.form.uniform
                else f"groups is {wanted}, but every block has {anatomy.kv_heads} KV groups: "
                f"allowed are 1 to {anatomy.kv_heads}, auto and keep"
            )

    def unit(self, anatomy: Anatomy) -> int:
        """Parameters of one piece, where all pieces that may go cost the same; else 1."""
        denses = self._denses(anatomy)
        if len(denses) > 1:
            return 1
        dense = anatomy.denses[denses[0]]
        step = self.form.multiple if dense.reads == "neurons" else 1
        return self._removed(anatomy, {denses[0]: torch.arange(dense.inputs - step)})

    @property
    def carries(self) -> bool:
        """Heads and neurons differ in size: a block meets its quota only to half a piece."""
        return self.form.structure == "coupled" and not self.form.uniform

    def _most_removable(self, anatomy: Anatomy) -> int:
        """Parameters gone if every layer that may lose inputs kept the least it can."""
        least = {name: self._legal(anatomy, name)[-1] for name in self._denses(anatomy)}
        inputs = {n: torch.arange(anatomy.denses[n].inputs - c) for n, c in least.items()}
        return self._removed(anatomy, inputs)

    # ---- neuron stage ------------------------------------------------------------------------

    def _denses(self, anatomy: Anatomy) -> list[str]:
        if self.form.structure == "inputs":
            wanted = DENSES[self.options.denses]
        else:
            keep = self.options.groups in ("keep", anatomy.kv_heads) or (
                self.form.groups == (anatomy.kv_heads,)
            )
            wanted = {"neurons"} if keep else {"heads", "neurons"}
        return [name for name, dense in anatomy.denses.items() if dense.reads in wanted]

    def signals(self, anatomy: Anatomy) -> set[str]:
        return {anatomy.denses[name].reads for name in self._denses(anatomy)}

    def _legal(self, anatomy: Anatomy, name: str) -> Sequence[int]:
        """Numbers of inputs that a layer may lose, rising from 0."""
        dense = anatomy.denses[name]
        if dense.reads == "neurons":
            widths = range(self.form.multiple, dense.inputs, self.form.multiple)
            return [0, *(dense.inputs - width for width in reversed(widths))]
        if self.form.structure == "coupled":
            kept = self.form.groups or range(1, anatomy.kv_heads + 1)
            return [dense.inputs - _group_width(anatomy) * n for n in reversed(kept)]
        return range(dense.inputs)

    def _removed(self, anatomy: Anatomy, inputs: dict[str, torch.Tensor]) -> int:
        counts = {name: len(kept) for name, kept in inputs.items()}
        if self.options.count == "columns":  # the paper's own accounting: p per column
            return sum(
                anatomy.denses[name].rows * (anatomy.denses[name].inputs - left)
                for name, left in counts.items()
            )
        live = live_rows(anatomy, inputs, self._groups(anatomy, inputs))
        rows = {name: len(kept) for name, kept in live.items()}
        return removed_by_counts(anatomy, counts, rows)

    def _groups(self, anatomy: Anatomy, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The KV groups that make the kept inputs of the attention output, if some went."""
        kept = inputs.get(anatomy.coupling("values").consumer)
        if self.form.structure == "inputs" or kept is None:
            return None
        return kept[:: _group_width(anatomy)] // _group_width(anatomy)

    def _heads_lost(self, anatomy: Anatomy, quota: int) -> int | None:
        """Inputs of the attention output that must go; None where the threshold decides.

        Uniform widths need one number for all blocks before any is looked at: as few groups as
        leave the FFN a share that it can lose.
        """
        width, groups = _group_width(anatomy), self.options.groups
        if isinstance(groups, int):
            return (anatomy.kv_heads - groups) * width
        if not self.form.uniform:
            return None
        heads, neurons = (anatomy.coupling(kind).consumer for kind in ("values", "neurons"))
        most = self._legal(anatomy, neurons)
        legal = [count for count in most if count <= self.options.cap * most[-1]]
        full = {name: torch.arange(anatomy.denses[name].inputs) for name in (heads, neurons)}
        ffn = self._removed(anatomy, {neurons: full[neurons][legal[-1] :]})
        for lost in self._legal(anatomy, heads):
            rest = {heads: full[heads][lost:]} if lost else {}
            if self._removed(anatomy, rest) + ffn >= quota:
                return lost
        return self._legal(anatomy, heads)[-1]

    def cut(self, block: Block, quota: int) -> BlockCut:
        """Algorithm 1 on one block."""
        options, anatomy = self.options, block.anatomy
        if quota <= 0:
            return BlockCut(block.source)
        tuned: dict[str, MaskCurve] = {}
        curves: dict[str, Curve] = {}
        for name in self._denses(anatomy):
            reads = anatomy.denses[name].reads
            g = gram(block.weights[name], block.moments[reads].covariance)  # Eq. 4
            scores = importance(  # Eq. 8, 9
                options.order, g, damping=options.order_damping, generator=block.generator
            )
            whole = self.form.structure == "coupled" and reads == "heads"
            if whole:
                scores = group_scores(options.order, g, scores, _group_width(anatomy))
            tuned[name] = MaskCurve(g, scores, options.damping)  # Eq. 5 to 7, every c
            lost = self._heads_lost(anatomy, quota) if whole else None
            curves[name] = (
                Curve((lost,), (math.inf,))
                if lost is not None
                else self._curve(tuned[name], self._legal(anatomy, name))
            )

        def kept(counts: dict[str, int]) -> dict[str, torch.Tensor]:
            return {name: tuned[name].kept(c) for name, c in counts.items() if c}

        counts, threshold = threshold_search(
            curves, lambda counts: self._removed(anatomy, kept(dict(counts))), quota
        )
        inputs = kept(counts)
        groups = self._groups(anatomy, inputs)
        cut = BlockCut(block.source, inputs, rows=live_rows(anatomy, inputs, groups), groups=groups)
        cut.notes = {"threshold": _short(threshold), "error": {}}
        for name in cut.inputs:
            if tuned[name].damping > options.damping:
                cut.notes.setdefault("more_damping", {})[name] = tuned[name].damping
            if options.tune:
                scales, good = guarded(tuned[name].tuned(counts[name]))
                cut.scales[name] = scales.to(torch.float32)
                if good:
                    cut.notes["error"][name] = _short(tuned[name].error(counts[name]))
                else:
                    cut.notes.setdefault("not_tuned", []).append(name)
        return cut

    def _curve(self, masks: MaskCurve, legal: Sequence[int]) -> Curve:
        """Values of the stopping rule at up to ``grid`` legal numbers of removed inputs.

        For whole units the value at c is the rule at the *next* c: a layer goes on only while its
        next step costs least. By the letter, every layer takes its first step at a threshold of
        nearly zero, which is nothing for one input and a tragedy for a KV group.
        """
        step = max(1, len(legal) // self.options.grid)
        counts = [*legal[:-1:step], legal[-1]]
        rule = masks.variance if self.options.allocation == "variance" else masks.error
        if self.form.structure == "inputs":
            return Curve(counts, LazyValues(rule, counts), legal)
        following = dict(itertools.pairwise(counts))

        def next_step(count: int) -> float:
            return rule(following[count]) if count in following else math.inf

        return Curve(counts, LazyValues(next_step, counts), legal)


def _group_width(anatomy: Anatomy) -> int:
    """Inputs of the attention output that one KV group makes, through all its query heads."""
    return anatomy.heads_per_group * anatomy.head_size


def group_scores(order: Order, g: torch.Tensor, scores: torch.Tensor, width: int) -> torch.Tensor:
    """Scores of whole groups of inputs, repeated for each of their inputs.

    Args:
        g: Gram matrix, (q, q).
        scores: of single inputs, (q,).
        width: inputs of a group.

    Returns:
        (q,): for ``energy`` what the group puts out together, 1^T G_gg 1, since its inputs do not
        cancel by chance once all of them are gone; for other orders the sum over the group.
    """
    count = len(g) // width
    if order == "energy":
        of_group = g.reshape(count, width, count, width).sum((1, 3)).diagonal()
    else:
        of_group = scores.reshape(count, width).sum(1)
    return of_group.repeat_interleave(width)


def _short(value: float) -> float:
    """Six digits: enough for a report, and the same text on every machine of one kind."""
    return float(f"{value:.6g}")
