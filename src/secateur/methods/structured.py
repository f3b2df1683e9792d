"""What structured methods share: whole blocks, shares of the rest, units and their legal numbers.

A method of this kind says in which order the units at the entry of a linear layer go and what that
costs (:meth:`Structured.removal`); how many go of each is decided here, by COMP's Algorithm 1
(arXiv 2501.15255).
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block, Method, Quotas
from secateur.plans import BlockCut, live_rows, removed_by_counts
from secateur.solvers.budget import Curve, LazyValues, share_out, threshold_search


class StructuredOptions(BaseModel):
    """Settings that structured methods have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="whole blocks to remove; auto: chosen by the loss on held-out windows"
    )
    max_layers: int = Field(4, ge=0, description="most blocks that auto tries to remove")
    groups: Annotated[int, Field(ge=1)] | Literal["auto", "keep"] = Field(
        "auto",
        description="structure coupled: KV groups that each cut block keeps; auto: by the common "
        "threshold, and with layout uniform as many as the FFN's width allows; keep: all",
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
    grid: int = Field(64, ge=4, description="steps of c in Algorithm 1, per linear layer")


class Removal(Protocol):
    """Units of one linear layer, least important first, and what their removal costs."""

    def kept(self, removed: int) -> torch.Tensor:
        """The inputs left when ``removed`` are gone, ascending."""

    def cost(self, removed: int) -> float:
        """Value of the stopping rule, rising from 0."""

    def finish(self, removed: int, cut: BlockCut, name: str) -> None:
        """Write scales or weights of the kept inputs, and notes, into ``cut``."""


class Structured(Method):
    """Whole blocks first, then units inside the rest."""

    options: Any

    @property
    def identical_inputs(self) -> bool:
        return bool(self.options.inputs == "identical")

    @abstractmethod
    def removal(self, block: Block, name: str, unit: int) -> Removal:
        """The order of the inputs of layer ``name`` in pieces of ``unit`` inputs, and its costs."""

    def signals_cut(self) -> set[str]:
        """With structure inputs: signals whose readers lose inputs."""
        return {"neurons"}

    # ---- layer stage -------------------------------------------------------------------------

    def layer_counts(self, worth: float) -> Sequence[int]:
        most = int(worth)
        if self.options.layers == "auto":
            return range(min(most, self.options.max_layers) + 1)
        if self.options.layers > most:
            raise RecipeError(
                f"layers is {self.options.layers}, but the share that was asked for is worth at "
                f"most {most} blocks: lower --layers or raise --remove"
            )
        return (self.options.layers,)

    def quotas(self, anatomy: Anatomy, importances: dict[int, float], total: int) -> Quotas:
        """COMP's Eq. 10: r_l = w_l (r N - n N^) / N^ with w_l proportional to 1 / I_l.

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
            wanted = self.signals_cut()
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
        """COMP's Algorithm 1 on one block: a common threshold, raised until the quota is met."""
        anatomy = block.anatomy
        if quota <= 0:
            return BlockCut(block.source)
        removals: dict[str, Removal] = {}
        curves: dict[str, Curve] = {}
        for name in self._denses(anatomy):
            whole = self._in_groups(anatomy, name)
            removals[name] = self.removal(block, name, _group_width(anatomy) if whole else 1)
            lost = self._heads_lost(anatomy, quota) if whole else None
            curves[name] = (
                Curve((lost,), (math.inf,))
                if lost is not None
                else self._curve(removals[name], self._legal(anatomy, name))
            )

        def kept(counts: dict[str, int]) -> dict[str, torch.Tensor]:
            return {name: removals[name].kept(c) for name, c in counts.items() if c}

        counts, threshold = threshold_search(
            curves, lambda counts: self._removed(anatomy, kept(dict(counts))), quota
        )
        inputs = kept(counts)
        groups = self._groups(anatomy, inputs)
        cut = BlockCut(block.source, inputs, rows=live_rows(anatomy, inputs, groups), groups=groups)
        cut.notes = {"threshold": short(threshold), "error": {}}
        for name in cut.inputs:
            removals[name].finish(counts[name], cut, name)
        return cut

    def _in_groups(self, anatomy: Anatomy, name: str) -> bool:
        """Whether the inputs of a layer go in whole KV groups."""
        return self.form.structure == "coupled" and anatomy.denses[name].reads == "heads"

    def _curve(self, removal: Removal, legal: Sequence[int]) -> Curve:
        """Values of the stopping rule at up to ``grid`` legal numbers of removed inputs.

        For whole units the value at c is the rule at the *next* c: a layer goes on only while its
        next step costs least. By the letter, every layer takes its first step at a threshold of
        nearly zero, which is nothing for one input and a tragedy for a KV group.
        """
        step = max(1, len(legal) // self.options.grid)
        counts = [*legal[:-1:step], legal[-1]]
        rule = removal.cost
        if self.form.structure == "inputs":
            return Curve(counts, LazyValues(rule, counts), legal)
        following = dict(itertools.pairwise(counts))

        def next_step(count: int) -> float:
            return rule(following[count]) if count in following else math.inf

        return Curve(counts, LazyValues(next_step, counts), legal)


def _group_width(anatomy: Anatomy) -> int:
    """Inputs of the attention output that one KV group makes, through all its query heads."""
    return anatomy.heads_per_group * anatomy.head_size


def short(value: float) -> float:
    """Six digits: enough for a report, and the same text on every machine of one kind."""
    return float(f"{value:.6g}")
