"""What the loss gains when weights are set to zero, by a Taylor series, and sums of it over units.

With g the gradient of the loss and F the diagonal of the empirical Fisher matrix in the place of
the Hessian, setting one weight W to zero changes the loss by about

    - W g + 1/2 W^2 F

LLM-Pruner (Ma et al., arXiv 2305.11627, Eq. 3 to 5) takes its size, of the whole or of one of its
terms, for each weight (element-wise) or of the sum over a row or column (vector-wise).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Order = Literal["first", "second", "mixed"]
Reduction = Literal["sum", "mean", "max", "prod", "first", "last"]


@dataclass
class GradientSums:
    """Sums over windows of one block's gradients, by linear layer.

    Attributes:
        total: sum of g_s, (p, q).
        squares: sum of g_s^2, (p, q); empty where not asked for.
        calls: number of gradients in the sums.
    """

    total: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor]
    calls: int

    @classmethod
    def of(
        cls, gradients: Iterable[dict[str, torch.Tensor]], *, squares: bool = False
    ) -> GradientSums:
        """Add up what comes, call after call; each is dropped when it is in."""
        sums = cls({}, {}, 0)
        for call in gradients:
            for name, gradient in call.items():
                if squares and name in sums.squares:
                    sums.squares[name].addcmul_(gradient, gradient)
                elif squares:
                    sums.squares[name] = gradient.square()
                if name in sums.total:
                    sums.total[name] += gradient
                else:
                    sums.total[name] = gradient.clone()
            sums.calls += 1
        return sums


def loss_change(
    weight: torch.Tensor, gradient: torch.Tensor, fisher: torch.Tensor | None, order: Order
) -> torch.Tensor:
    """W g, W^2 F, or W g - 1/2 W^2 F, with its sign, (p, q).

    Args:
        weight, gradient: W and g, (p, q).
        fisher: F, (p, q); order first needs none.
    """
    if order == "first":
        return weight * gradient
    assert fisher is not None
    if order == "second":
        return weight.square() * fisher
    return weight * gradient - 0.5 * weight.square() * fisher


def over_units(change: torch.Tensor, axis: int, width: int, *, vector: bool) -> torch.Tensor:
    """Scores of the units that own ``width`` rows (axis 0) or columns (axis 1) each, float64.

    Args:
        change: of each weight, with its sign, (p, q).
        vector: the size of the sum over each row or column, in place of the sum of sizes.

    Returns:
        (units,).
    """
    lines = change.double() if vector else change.double().abs()
    lines = lines.sum(1 - axis)
    return (lines.abs() if vector else lines).reshape(-1, width).sum(1)


def of_sums(change: torch.Tensor, axis: int, width: int) -> torch.Tensor:
    """The size of the sum over all that a unit owns, vector-wise by the unit, (units,), float64."""
    return change.double().sum(1 - axis).reshape(-1, width).sum(1).abs()


def reduced(members: Sequence[torch.Tensor], reduction: Reduction) -> torch.Tensor:
    """One score a unit from those of the layers that it is made of, (units,) each."""
    if reduction == "first":
        return members[0]
    if reduction == "last":
        return members[-1]
    together = torch.stack(list(members))
    if reduction == "sum":
        return together.sum(0)
    if reduction == "mean":
        return together.mean(0)
    return together.amax(0) if reduction == "max" else together.prod(0)
