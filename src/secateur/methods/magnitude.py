"""Magnitude pruning (Han et al., NeurIPS 2015): the smallest weights go, nothing else is asked."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.sparse import SparseMethod, SparseOptions


class MagnitudeOptions(SparseOptions):
    """Settings of magnitude pruning."""

    compete: Literal["layer", "row"] = Field(
        "layer", description="weights compete in the whole layer, or in their row"
    )


@register
class Magnitude(SparseMethod):
    """See the module."""

    name = "magnitude"
    summary = "zeros where weights are smallest; reads no text"
    Options = MagnitudeOptions
    options: MagnitudeOptions

    def signals(self, anatomy: Anatomy) -> set[str]:
        return set()

    def check(self, anatomy: Anatomy) -> None:
        refuse_allocation(self)
        super().check(anatomy)

    def sparse(self, block: Block, name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
        return self.zeroed(weight, weight.abs(), count)


def refuse_allocation(method: SparseMethod) -> None:
    """Methods that read no text know nothing that sparsity could be shared out by.

    Raises:
        RecipeError: another allocation than uniform is asked for.
    """
    if method.allocation != "uniform":
        raise RecipeError(
            f"allocation is {method.allocation}, but method {method.name} reads no text to "
            "tell layers apart by: use --allocation uniform, or --method wanda"
        )
