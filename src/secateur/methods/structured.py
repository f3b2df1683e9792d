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
from typing import Annotated, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block, Quotas
from secateur.methods.units import Exempt, Units, group_width, not_exempt
from secateur.plans import BlockCut
from secateur.solvers.budget import Curve, LazyValues, share_out, threshold_search
from secateur.solvers.ladder import solving_for

#: First and last blocks that COMP spares of 32.
EXEMPT = (2, 1)


class StructuredOptions(BaseModel):
    """Settings that structured methods have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="whole blocks to remove; auto: chosen by the loss on held-out windows"
    )
    compensate: bool = Field(
        True,
        description="blocks behind a removed one add as much less to the hidden state as that made "
        "it grow",
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
    exempt_first: Exempt = Field(
        "auto", description="first blocks that lose no inputs; auto: 2 of 32, fewer of few"
    )
    exempt_last: Exempt = Field(
        "auto", description="last blocks that lose no inputs; auto: 1 of 32, none of few"
    )
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


class Structured(Units):
    """Whole blocks first, then units inside the rest."""

    @property
    def identical_inputs(self) -> bool:
        return bool(self.options.inputs == "identical")

    @abstractmethod
    def removal(self, block: Block, name: str, unit: int) -> Removal:
        """The order of the inputs of layer ``name`` in pieces of ``unit`` inputs, and its costs."""

    # ---- layer stage -------------------------------------------------------------------------

    @property
    def compensates(self) -> bool:
        return bool(self.options.compensate)

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
        prunable: Sequence[int] = layers
        if not self.form.uniform:
            prunable = not_exempt(layers, options, EXEMPT, anatomy.layers)
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

    # ---- neuron stage ------------------------------------------------------------------------

    def _heads_lost(self, anatomy: Anatomy, quota: int) -> int | None:
        """Inputs of the attention output that must go; None where the threshold decides.

        Uniform widths need one number for all blocks before any is looked at: as few groups as
        leave the FFN a share that it can lose.
        """
        width, groups = group_width(anatomy), self.options.groups
        if isinstance(groups, int):
            return (anatomy.kv_heads - groups) * width
        if not self.form.uniform:
            return None
        heads, neurons = anatomy.consumers("values", "neurons")
        most = self._legal(anatomy, neurons)
        legal = [count for count in most if count <= self.options.cap * most[-1]]
        full = {name: torch.arange(anatomy.denses[name].inputs) for name in (heads, neurons)}
        ffn = self._removed(anatomy, {neurons: full[neurons][legal[-1] :]})
        for lost in self._legal(anatomy, heads):
            rest = {heads: full[heads][lost:]} if lost else {}
            if self._removed(anatomy, rest) + ffn >= quota:
                return lost
        return self._legal(anatomy, heads)[-1]

    def prepare(self, block: Block) -> dict[str, Removal]:
        """The order of removal and its costs, for each layer that loses inputs."""
        anatomy = block.anatomy
        removals: dict[str, Removal] = {}
        for name in self._denses(anatomy):
            unit = group_width(anatomy) if self._in_groups(anatomy, name) else 1
            with solving_for(name):
                removals[name] = self.removal(block, name, unit)
        return removals

    def cut(self, block: Block, quota: int) -> BlockCut:
        """COMP's Algorithm 1 on one block: a common threshold, raised until the quota is met."""
        anatomy = block.anatomy
        if quota <= 0:
            return BlockCut(block.source)
        removals = self.prepare(block) if block.prepared is None else block.prepared
        curves: dict[str, Curve] = {}
        for name in self._denses(anatomy):
            whole = self._in_groups(anatomy, name)
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
        cut = self._block_cut(block.source, anatomy, inputs)
        cut.notes = {"threshold": short(threshold), "error": {}}
        for name in inputs:
            with solving_for(name):
                removals[name].finish(counts[name], cut, name)
        for name in cut.inputs.keys() - inputs.keys():
            with solving_for(name):
                self.finish_reader(block, cut, name)
        return cut

    def finish_reader(self, block: Block, cut: BlockCut, name: str) -> None:
        """Make up for inputs that another layer reads and that went for its sake."""

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


def short(value: float) -> float:
    """Six digits: enough for a report, and the same text on every machine of one kind."""
    return float(f"{value:.6g}")
