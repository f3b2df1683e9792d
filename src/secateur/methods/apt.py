"""APT (Zhao et al., Findings of EMNLP 2024, arXiv 2410.15567): many weights removed at once.

Equations, our readings and what each was measured to do stand in ``docs/apt.md``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.sparse import SparseMethod, SparseOptions
from secateur.solvers.patterns import removal_sets
from secateur.solvers.refit import ROWS_PER_SAMPLE
from secateur.solvers.removal import Removal, Sparse, remove, without_dead
from secateur.solvers.sparse_fit import SEARCH_STEPS, best_pull, polish

#: Steps of conjugate gradients that a block's systems take on real layers, solved and to rank.
STEPS, STEPS_TO_RANK = 16, 6


class AptOptions(SparseOptions):
    """Settings of APT."""

    solution: Literal["SS", "SM", "MS", "MM"] = Field(
        "MM",
        description="mask, then compensation: S by single removal, M by multiple removal, as in "
        "the paper",
    )
    block: int | Literal["all"] = Field(
        128,
        description="columns that are removed together before they are frozen; all: the optimum "
        "for the mask, at a multiple of the time",
    )
    damping: float = Field(
        0.1, gt=0, description="of H where the mask is chosen, as a share of mean diag H"
    )
    rounds: int = Field(
        4,
        ge=1,
        description="parts in which an unstructured mask by M is chosen, each smaller than the one "
        "before and scored anew on what the others leave",
    )
    compete: Literal["layer", "row"] = Field(
        "layer", description="unstructured weights compete in the whole layer, or in their row"
    )
    polish: int = Field(
        8,
        ge=0,
        description="steps of conjugate gradients on all kept weights behind the blocks, where "
        "compensation is by M",
    )
    pull: float | Literal["auto"] = Field(
        "auto",
        description="pull of those weights to the original, of mean diag H; auto: the best on "
        "windows kept out of the fit",
    )


@register
class Apt(SparseMethod):
    """See the module and ``docs/apt.md``."""

    name = "apt"
    summary = "zeros by optimal removal of many weights at once, unstructured and N:M"
    Options = AptOptions
    options: AptOptions

    #: Ahead of uniform shares on all models that were tried (docs/apt.md).
    own_allocation = "error"
    #: Share of the windows whose statistics are also kept apart, to judge fits by.
    held_out = 0.3

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.pattern.grouped and self.options.solution[0] == "M":
            removal_sets(self.pattern.kept, self.pattern.group)  # says where there are too many

    def layer_work(self, rows: int, inputs: int) -> float:
        """Systems of each block of columns, their update, and the fit behind them.

        A step of conjugate gradients is a product of all rows with the block's inverse.
        The fit takes a product of (p, q) with (q, q) a step, and the search for its pull as many
        with an eighth of the rows.
        """
        options, found = self.options, super().layer_work(rows, inputs)
        update = float(rows * inputs**2)
        if options.solution[1] == "S":
            return found + update
        width = inputs if options.block == "all" else min(options.block, inputs)
        taken = STEPS
        if options.solution[0] == "M" and not self.pattern.grouped:
            taken += (options.rounds - 1) * STEPS_TO_RANK
        systems = taken * 2.0 * rows * inputs * width
        steps = options.polish
        if options.polish and options.pull == "auto":
            steps += SEARCH_STEPS // ROWS_PER_SAMPLE
        return found + systems + update + steps * 2 * rows * inputs**2

    def sparse(self, block: Block, name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
        options, second = self.options, self.second(block, name)
        how = Removal(
            mask_by="M" if options.solution[0] == "M" else "S",
            compensate_by="M" if options.solution[1] == "M" else "S",
            block=None if options.block == "all" else options.block,
            damping=options.damping,
            scope=options.compete,
            rounds=options.rounds,
        )
        found = remove(weight, second, self.pattern, count, how)
        if how.compensate_by == "S" or not options.polish:
            return found.weight
        original, second = without_dead(weight, second)
        pull = options.pull
        if pull == "auto":
            pull = self._best_pull(block, name, found, original)
        return polish(found.weight, found.mask, original, second, pull=pull, steps=options.polish)

    def _best_pull(self, block: Block, name: str, found: Sparse, original: torch.Tensor) -> float:
        reads = block.anatomy.denses[name].reads
        late = block.held_out.get(reads)
        if late is None:  # behind a removal that keeps no windows apart
            return self.options.damping
        rest = block.moments[reads].less(late)
        return best_pull(found.weight, found.mask, original, rest.covariance, late.covariance)
