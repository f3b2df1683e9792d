"""What methods share that give each unit a score and remove those with the lowest.

How many go of which kind is fixed for all blocks before any is cut: the same share of each, or as
one order over all blocks says.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.finite import all_finite
from secateur.methods.base import Block, Share, Shares, SurveyBy
from secateur.methods.units import Units, group_width
from secateur.plans import BlockCut
from secateur.solvers.budget import nearest
from secateur.solvers.pooling import lowest

#: Score of every unit of a linear layer, by its path: KV groups or neurons, (units,).
Scores = dict[str, torch.Tensor]


class ScoredOptions(BaseModel):
    """Settings that methods with scores have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: Annotated[int, Field(ge=1)] | Literal["auto", "keep"] = Field(
        "auto",
        description="KV groups that each block keeps; auto: by the block's share, rounded up, or "
        "by score where all blocks are ranked together; keep: all, so that FFN neurons go alone",
    )


class Scored(Units):
    """See the module."""

    ranking = None
    #: What the option ``shares`` is called where every block loses the same share.
    same_shares = "uniform"

    @property
    def pooled(self) -> bool:
        """Whether the units of all blocks stand in one order; else each block loses the same."""
        return False

    def survey_by(self, anatomy: Anatomy, tokens: int) -> SurveyBy | None:
        return "statistics" if self.pooled else None

    @abstractmethod
    def scores(self, block: Block) -> Scores:
        """Of every unit that may go; the lowest go first."""

    def check(self, anatomy: Anatomy) -> None:
        if self.form.structure == "inputs":
            raise RecipeError(
                f"method {self.name} removes whole units, not inputs of single layers: leave out "
                "--structure, or use --method comp"
            )
        if self.form.uniform and self.pooled:
            raise RecipeError(
                f"method {self.name} ranks all blocks together (shares {self.options.shares}), "
                f"which gives each its own widths: use --layout per-layer, or --set shares="
                f"{self.same_shares}"
            )
        super().check(anatomy)

    @property
    def carries(self) -> bool:
        return False  # all is counted beforehand

    def extra(self, anatomy: Anatomy, name: str) -> int:
        """Parameters that come on top where a layer loses anything."""
        return 0

    # ---- how many ----------------------------------------------------------------------------

    def survey(self, block: Block) -> Scores:
        return self._finite_scores(block)

    def _finite_scores(self, block: Block) -> Scores:
        found = self.scores(block)
        if not all(all_finite(scores) for scores in found.values()):
            raise ArithmeticError("scores of its units are not finite")
        return found

    def allocate(
        self,
        anatomy: Anatomy,
        layers: Sequence[int],
        importances: dict[int, float],
        surveys: Mapping[int, Any],
        total: int,
    ) -> Shares:
        """Numbers of units that reach ``total`` as nearly as whole units can."""
        costs = {name: self._cost(anatomy, name) for name in self._denses(anatomy)}
        most = {name: self._unit_counts(anatomy, name)[-1] for name in costs}
        room = sum(costs[n] * most[n] - self.extra(anatomy, n) for n in costs if most[n])
        if total > room * len(layers):
            raise RecipeError(
                f"{total:,} parameters should leave {len(layers)} blocks, which can lose at most "
                f"{room * len(layers):,}: {', or '.join(('ask for less', *self._ways_out()))}"
            )
        if self.pooled:
            counts = self._pooled(anatomy, costs, surveys, total)
        else:
            counts = self._alike(anatomy, costs, layers, total)
        shares = {}
        for layer in layers:
            gone = {name: n for name, n in counts[layer].items() if n}
            parameters = sum(costs[n] * gone[n] - self.extra(anatomy, n) for n in gone)
            widths = {n: self._unit_width(anatomy, n) for n in gone}
            shares[layer] = Share(parameters, {n: gone[n] * widths[n] for n in gone})
        return shares

    def _ways_out(self) -> list[str]:
        """What else than asking for less makes room."""
        return ["leave out groups"] if "groups" in self.options.model_fields_set else []

    def _alike(
        self, anatomy: Anatomy, costs: dict[str, int], layers: Sequence[int], total: int
    ) -> dict[int, dict[str, int]]:
        """The same share of each block: of its groups, rounded down, the rest in neurons.

        Neurons go in pieces; with widths of their own, blocks take turns in losing a piece more.
        Where blocks have units of one kind, these are what goes in pieces.
        """
        heads, neurons = self._kinds(anatomy)
        groups = self._groups_lost(anatomy, costs, total / len(layers))
        each = costs[heads] * groups - self.extra(anatomy, heads) if heads and groups else 0
        legal = self._unit_counts(anatomy, neurons)
        goal = (total / len(layers) - each + self.extra(anatomy, neurons)) / costs[neurons]
        if self.form.uniform:
            widths = [nearest(legal, goal)] * len(layers)
        else:
            widths = []
            for reached in accumulate([goal] * len(layers)):
                widths.append(nearest(legal, reached - sum(widths)))
        return {
            layer: {neurons: lost} | ({heads: groups} if heads else {})
            for layer, lost in zip(layers, widths, strict=True)
        }

    @staticmethod
    def _kinds(anatomy: Anatomy) -> tuple[str | None, str]:
        """Where units go of which one is worth many of the other kind, and where the others go."""
        *coarse, fine = anatomy.consumers("values", "neurons")
        return (coarse[0] if coarse else None), fine

    def _groups_lost(self, anatomy: Anatomy, costs: dict[str, int], part: float) -> int:
        """KV groups that each block loses when it loses ``part`` parameters."""
        heads, neurons = self._kinds(anatomy)
        if heads is None or heads not in costs:
            return 0
        if isinstance(self.options.groups, int):
            return anatomy.kv_heads - self.options.groups
        legal, ffn = (self._unit_counts(anatomy, name) for name in (heads, neurons))
        units = costs[heads] * anatomy.kv_heads + costs[neurons] * anatomy.ffn_width
        wanted = math.floor(part / units * anatomy.kv_heads + 1e-9)
        room = costs[neurons] * ffn[-1] - self.extra(anatomy, neurons)
        needed = [n for n in legal if costs[heads] * n - self.extra(anatomy, heads) + room >= part]
        allowed = [n for n in legal if n <= wanted]
        return max(allowed[-1], needed[0])

    def _pooled(
        self, anatomy: Anatomy, costs: dict[str, int], surveys: Mapping[int, Scores], total: int
    ) -> dict[int, dict[str, int]]:
        """One order over the units of all blocks: the lowest go, whatever block they are in.

        A KV group is worth hundreds of neurons, so once the groups stand, the neurons are cut again
        for what is left: the last unit of the common order would miss the total by half a group.
        """
        heads, neurons = self._kinds(anatomy)
        legal = {name: self._unit_counts(anatomy, name) for name in costs}

        def removed(counts: Mapping[tuple[int, str], int]) -> int:
            units = sum(costs[name] * count for (_, name), count in counts.items())
            return units - sum(self.extra(anatomy, name) for (_, name), n in counts.items() if n)

        def lowest_of(names: list[str], goal: int) -> dict[tuple[int, str], int]:
            ranked = {(i, name): scores[name] for i, scores in surveys.items() for name in names}
            return lowest(ranked, lambda key, n: nearest(legal[key[1]], n), removed, goal)

        groups: dict[tuple[int, str], int] = {}
        if heads is None or heads not in costs:
            pass
        elif isinstance(self.options.groups, int):
            groups = {(i, heads): self._groups_lost(anatomy, costs, 0) for i in surveys}
        else:
            together = lowest_of([heads, neurons], total)
            groups = {key: count for key, count in together.items() if key[1] == heads}
        found = groups | lowest_of([neurons], total - removed(groups))
        return {i: {name: found[i, name] for name in costs} for i in surveys}

    def _unit_width(self, anatomy: Anatomy, name: str) -> int:
        return group_width(anatomy) if self._in_groups(anatomy, name) else 1

    def _unit_counts(self, anatomy: Anatomy, name: str) -> list[int]:
        """Numbers of units that a layer may lose, rising from 0."""
        width = self._unit_width(anatomy, name)
        return [count // width for count in self._legal(anatomy, name)]

    def _cost(self, anatomy: Anatomy, name: str) -> int:
        """Parameters of one unit: its inputs, and all rows that exist for them."""
        left = anatomy.denses[name].inputs - self._unit_width(anatomy, name)
        return self._removed(anatomy, {name: torch.arange(left)})

    # ---- which -------------------------------------------------------------------------------

    def cut(self, block: Block, quota: int) -> BlockCut:
        """Remove the units with the lowest scores, as many as was allotted; ties by position."""
        anatomy, inputs = block.anatomy, {}
        unnamed = block.lose.keys() - block.units.keys()
        scores = self._finite_scores(block) if unnamed else {}
        for name, lost in block.lose.items():
            width = self._unit_width(anatomy, name)
            if name in unnamed:
                gone = lowest_units(scores[name], lost // width)
            else:
                gone = torch.tensor(block.units[name], device=block.weights[name].device)
            count = anatomy.denses[name].inputs // width
            left = torch.ones(count, dtype=torch.bool, device=gone.device)
            left[gone] = False
            units = left.nonzero()[:, 0]
            places = torch.arange(width, device=units.device)
            inputs[name] = (units[:, None] * width + places).flatten()
        cut = self._block_cut(block.source, anatomy, inputs)
        self.finish(block, cut)
        return cut

    def finish(self, block: Block, cut: BlockCut) -> None:
        """Make up for what went, in ``cut``."""


def lowest_units(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` units with the lowest scores, ascending, ties by position, (count,) int64."""
    return scores.argsort(stable=True)[:count].sort().values


def by_unit(channels: torch.Tensor, width: int) -> torch.Tensor:
    """Sums over the channels (q,) of each unit of ``width``, (q / width,)."""
    return channels.reshape(-1, width).sum(1)
