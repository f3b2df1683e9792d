"""First a method that removes, then one that makes zeros in what is left, in one pass.

What a block's linear layers read does not change when units that feed other inputs go, so the
second moments that the first method saw hold for the second one too: only those of the inputs that
stay. (They are those of the block before its cut; zeros see the cut prefix, not the cut inside
their own block.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block, Method, Quotas, Shares, SurveyBy
from secateur.methods.sparse import SparseMethod
from secateur.plans import BlockCut
from secateur.statistics import Moments


class Chain(Method):
    """The recipe's ``method`` and, behind it, its ``then``. It is no method of its own to a user.

    Args:
        first: removes blocks and units.
        second: makes zeros.

    Raises:
        RecipeError: the first is asked for what another cannot follow.
    """

    def __init__(self, first: Method, second: SparseMethod) -> None:
        first = first.followed()
        super().__init__(first.options, first.form)
        self._first = first
        self._second = second
        # What the engine reads from the class is the first method's here.
        self.name = first.name  # type: ignore[misc]
        self.held_out = first.held_out  # type: ignore[misc]
        self.resampled = first.resampled  # type: ignore[misc]
        self.ranking = first.ranking  # type: ignore[misc]

    def check(self, anatomy: Anatomy) -> None:
        self._first.check(anatomy)
        self._second.check(anatomy)
        if self.form.structure == "inputs":
            raise RecipeError(
                "--then makes zeros in whole units that stay, but --structure inputs removes "
                "columns of single layers: use --structure coupled"
            )
        pattern = self._second.pattern
        if pattern.grouped and self.form.multiple % pattern.group:
            raise RecipeError(
                f"sparsity {pattern} wants widths in groups of {pattern.group}, but FFN widths are "
                f"multiples of {self.form.multiple}: try --round-to 32"
            )
        if self._second.options.allocation not in ("auto", "uniform"):
            raise RecipeError(
                f"allocation is {self._second.options.allocation}, but behind a removal zeros are "
                "shared out evenly: use --allocation uniform"
            )

    def notes(self, anatomy: Anatomy) -> list[str]:
        return [*self._first.notes(anatomy), *self._second.notes(anatomy)]

    # ---- as the first method says ------------------------------------------------------------

    def layer_counts(self, worth: float) -> Sequence[int]:
        return self._first.layer_counts(worth)

    @property
    def looks_again(self) -> bool:
        return self._first.looks_again

    def candidates(self, layers: Sequence[int]) -> Sequence[int]:
        return self._first.candidates(layers)

    def layer_importance(self, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        return self._first.layer_importance(inputs, outputs)

    def copies(self, anatomy: Anatomy, windows: int, length: int) -> int:
        return self._first.copies(anatomy, windows, length)

    def chains_copies(self, anatomy: Anatomy) -> bool:
        return self._first.chains_copies(anatomy)

    def written(self, anatomy: Anatomy, windows: int, length: int) -> int:
        return self._first.written(anatomy, windows, length)

    def quotas(self, anatomy: Anatomy, importances: dict[int, float], total: int) -> Quotas:
        return self._first.quotas(anatomy, importances, total)

    @property
    def compensates(self) -> bool:
        return self._first.compensates

    def survey_by(self, anatomy: Anatomy, tokens: int) -> SurveyBy | None:
        return self._first.survey_by(anatomy, tokens)

    @property
    def gradients_held(self) -> int:
        return self._first.gradients_held

    def surveyed(self, layers: Sequence[int]) -> Sequence[int]:
        return self._first.surveyed(layers)

    @property
    def windows_per_gradient(self) -> int | None:
        return self._first.windows_per_gradient

    def survey(self, block: Block) -> Any:
        return self._first.survey(self._for_first(block))

    def allocate(
        self,
        anatomy: Anatomy,
        layers: Sequence[int],
        importances: dict[int, float],
        surveys: Mapping[int, Any],
        total: int,
    ) -> Shares:
        return self._first.allocate(anatomy, layers, importances, surveys, total)

    def unit(self, anatomy: Anatomy) -> int:
        return self._first.unit(anatomy)

    @property
    def carries(self) -> bool:
        return self._first.carries

    # ---- both --------------------------------------------------------------------------------

    @property
    def cuts_every_block(self) -> bool:
        """Zeros come into blocks that lose nothing too."""
        return True

    def solving(self, anatomy: Anatomy, tokens: int) -> float:
        return self._first.solving(anatomy, tokens) + self._second.solving(anatomy, tokens)

    def solver_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        both = (self._first, self._second)
        return max(method.solver_bytes(anatomy, tokens) for method in both)

    def relative(self, anatomy: Anatomy) -> set[str]:
        """As the first says: both read the same statistics."""
        return self._first.relative(anatomy)

    @property
    def identical_inputs(self) -> bool:
        return False

    def signals(self, anatomy: Anatomy) -> set[str]:
        return self._first.signals(anatomy) | self._second.signals(anatomy)

    def _for_first(self, block: Block) -> Block:
        if self._first.needs == "moments":
            return block
        return replace(block, channels={k: v.channels() for k, v in block.moments.items()})

    def cut(self, block: Block, quota: int) -> BlockCut:
        cut = self._first.cut(self._for_first(block), quota) if quota else BlockCut(block.source)
        anatomy, second = block.anatomy, self._second
        weights: dict[str, torch.Tensor] = dict(cut.weights)
        lose: dict[str, int] = {}
        slim: dict[str, torch.Tensor] = {}
        moments: dict[str, Moments] = {}
        held_out: dict[str, Moments] = {}
        for name in second.layers(anatomy):
            dense = anatomy.denses[name]
            kept = cut.inputs.get(name, torch.arange(dense.inputs))
            rows = cut.rows.get(name, torch.arange(dense.rows))
            whole = weights.get(name, block.weights[name][:, kept])
            if name in cut.scales:
                whole = whole * cut.scales[name]
            slim[name] = whole[rows]
            lose[name] = round(second.pattern.share * slim[name].numel())
            if dense.reads in block.moments:
                moments[dense.reads] = block.moments[dense.reads].of(kept)
            if dense.reads in block.held_out:
                held_out[dense.reads] = block.held_out[dense.reads].of(kept)
        left = replace(block, weights=slim, moments=moments, held_out=held_out, lose=lose)
        zeros = second.cut(left, sum(lose.values()))
        weights |= zeros.weights
        done = cut.joined(BlockCut(block.source, notes={"zeros": zeros.notes["zeros"]}))
        done.weights = weights
        done.scales = {name: s for name, s in cut.scales.items() if name not in zeros.weights}
        return done
