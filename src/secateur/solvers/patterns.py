"""Which weights of a matrix are zero: by a share of all, or N of every M inputs in a row kept.

A mask is True where a weight goes. All choices here are exact in number: ties are broken by place,
never by removing too much.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import torch

from secateur.errors import RecipeError

#: Patterns of a group whose losses are compared one by one; 4:8 has 70, 8:16 would have 12,870.
MOST_PATTERNS = 1000


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the ``count`` lowest scores of the whole matrix.

    Args:
        scores: (p, q); infinite where a weight may not go.

    Returns:
        (p, q) bool.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    highest = flat.kthvalue(min(count, len(flat))).values
    mask = flat < highest
    ties = (flat == highest).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def lowest_in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the lowest scores of each row, ``count`` in all; rows differ by one at most.

    Returns:
        (p, q) bool.
    """
    rows, width = scores.shape
    each, more = divmod(count, rows)
    order = scores.argsort(dim=1, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, order[:, :each], True)
    if more:  # the rows whose next weight is the least loss
        following = order[:, each : each + 1]
        cheapest = scores.gather(1, following)[:, 0].argsort(stable=True)[:more]
        mask[cheapest, following[cheapest, 0]] = True
    assert width >= each
    return mask


def lowest_in_groups(scores: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    """N:M mask: of every ``group`` consecutive inputs of a row the ``kept`` highest stay.

    Args:
        scores: (p, q), q a multiple of ``group``.

    Returns:
        (p, q) bool.
    """
    grouped = scores.unflatten(1, (-1, group))
    gone = grouped.argsort(dim=2, stable=True)[..., : group - kept]
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(2, gone, True)
    return mask.flatten(1)


@cache
def removal_sets(kept: int, group: int) -> torch.Tensor:
    """Every set of inputs that may go from a group, (C(M, N), M - N) int64, in fixed order.

    Raises:
        RecipeError: there are too many to compare.
    """
    count = math.comb(group, kept)
    if count > MOST_PATTERNS:
        raise RecipeError(
            f"sparsity {kept}:{group} has {count:,} patterns a group, of which a mask by multiple "
            f"removal compares each; allowed are up to {MOST_PATTERNS:,}: use --solution SM, or a "
            "smaller group such as 4:8"
        )
    return torch.tensor(list(combinations(range(group), group - kept)))
