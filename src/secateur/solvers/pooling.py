"""One order over the units of many layers, and a cut through it that meets a budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def lowest(
    scores: Mapping[Key, torch.Tensor],
    legal: Callable[[Key, int], int],
    removed: Callable[[Mapping[Key, int]], int],
    total: int,
) -> dict[Key, int]:
    """How many units each layer loses when the lowest of all go.

    The units of all layers stand in one order by score, ties by layer and place. As many of them go
    as come nearest to ``total``; what a layer loses is then brought to a number that it may lose.

    Args:
        scores: of every unit of each layer, (units,).
        legal: the number that a layer may lose nearest to this one; must not fall as it rises.
        removed: parameters gone for given numbers of lost units; must not fall as they rise.
        total: parameters that shall go.

    Returns:
        numbers of lost units by layer; all that may go where that is less than ``total``.
    """
    keys = list(scores)
    sizes = torch.tensor([len(scores[key]) for key in keys])
    owners = torch.arange(len(keys)).repeat_interleave(sizes)
    joined = torch.cat([scores[key].double().cpu() for key in keys])
    owners = owners[joined.argsort(stable=True)]

    def counts(cut: int) -> dict[Key, int]:
        lost = torch.bincount(owners[:cut], minlength=len(keys)).tolist()
        return {key: legal(key, n) for key, n in zip(keys, lost, strict=True)}

    low, high = 0, len(owners)
    while high - low > 1:
        middle = (low + high) // 2
        if removed(counts(middle)) >= total:
            high = middle
        else:
            low = middle
    under, over = counts(low), counts(high)
    return under if total - removed(under) < removed(over) - total else over


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """(x - mean) / standard deviation of the sample; zeros where all are alike."""
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    away = scores - scores.mean()
    return torch.zeros_like(scores) if spread == 0 else away / spread
