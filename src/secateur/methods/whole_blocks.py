"""What methods share that remove whole blocks and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block, Method
from secateur.plans import BlockCut


class WholeBlocks(Method):
    """As many blocks as come nearest to the share that was asked for."""

    cuts_inside: ClassVar[bool] = False

    def check(self, anatomy: Anatomy) -> None:
        if self.form.structure == "inputs":
            raise RecipeError(
                f"method {self.name} removes whole blocks, not inputs of single layers: leave out "
                "--structure, or use --method comp"
            )

    def layer_counts(self, worth: float) -> Sequence[int]:
        count = math.floor(worth + 0.5)
        if count == 0:
            more = math.ceil(10 * 0.5 / worth) / 10
            raise RecipeError(
                f"the share that was asked for is worth {worth:.2f} blocks, and method {self.name} "
                f"removes whole ones: ask for {more:g} times as much, or use a method that cuts "
                "inside blocks, such as --method comp"
            )
        return (count,)

    def cut(self, block: Block, quota: int) -> BlockCut:
        return BlockCut(block.source)
