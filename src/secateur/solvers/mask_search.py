"""Which units go when their gradients are known (FPT; Kwon et al., NeurIPS 2022, arXiv 2204.09656).

A mask variable m_i multiplies the output of unit i. With the gradients g_i of the loss by them, one
number a batch, and the empirical Fisher matrix F = sum over batches of g g^T in the place of the
Hessian, setting the variables in P to zero costs about

    1/2 sum_{i,j in P} F_ij = 1/2 || sum_{i in P} g_i ||^2                           (Eq. 5, 6)

The search takes F as diagonal, the rearrangement as blocks, one for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import torch

Layer = TypeVar("Layer", bound=Hashable)


def fisher_diagonal(gradients: torch.Tensor) -> torch.Tensor:
    """F_ii of each unit from its gradients (batches, units), (units,), float64."""
    return gradients.double().square().sum(0)


def falling_groups(scores: Mapping[Layer, torch.Tensor], most: int) -> Iterator[dict[Layer, int]]:
    """Numbers of groups that each layer loses, with 0, 1, 2, ... gone of all, the lowest first.

    Args:
        scores: of each layer's groups, (groups,).
        most: groups that one layer may lose.
    """
    order = sorted(
        (score, place, number)
        for place, own in enumerate(scores.values())
        for number, score in enumerate(own.tolist())
    )
    layers = list(scores)
    lost = dict.fromkeys(layers, 0)
    yield dict(lost)
    for _, place, _ in order:
        if lost[layers[place]] < most:
            lost[layers[place]] += 1
            yield dict(lost)


def lost_importance(scores: Mapping[Layer, torch.Tensor], lost: Mapping[Layer, int]) -> float:
    """Sum of the lowest scores of each layer, as many as it loses."""
    return sum(float(own.sort().values[: lost[key]].sum()) for key, own in scores.items())


def search(
    groups: Mapping[Layer, torch.Tensor],
    neurons: Mapping[Layer, torch.Tensor],
    *,
    most: int,
    fill: Callable[[Mapping[Layer, int]], dict[Layer, int]],
    miss: Callable[[Mapping[Layer, int], Mapping[Layer, int]], int],
    tolerance: int,
) -> tuple[dict[Layer, int], dict[Layer, int]]:
    """Algorithm 1 of the paper: the best split of a budget between groups and neurons.

    For every number of groups the lowest of all layers go, and of the neurons the lowest that the
    budget then still asks for; the split that loses the least importance is kept.

    Args:
        groups, neurons: scores of the units of each layer, (units,).
        most: groups that one layer may lose.
        fill: numbers of neurons that go when these groups do.
        miss: parameters by which groups and neurons together are off the budget.
        tolerance: how far off a split may be; where none is so near, the nearest wins.

    Returns:
        numbers of groups and of neurons that each layer loses.
    """
    best: tuple[tuple[int, float], dict[Layer, int], dict[Layer, int]] | None = None
    ranked = {key: own.sort().values.cumsum(0) for key, own in neurons.items()}
    for lost in falling_groups(groups, most):
        filled = fill(lost)
        cost = lost_importance(groups, lost) + sum(
            float(ranked[key][count - 1]) for key, count in filled.items() if count
        )
        found = (max(0, miss(lost, filled) - tolerance), cost)
        if best is None or found < best[0]:
            best = (found, lost, filled)
    assert best is not None
    return best[1], best[2]


def rearranged(gradients: torch.Tensor, count: int) -> torch.Tensor:
    """Units of one layer that go, with what their gradients have in common (Sec. 4.2).

    Begins with the lowest on the diagonal. Every other unit, lowest first, is let in for the member
    without which the cost of the set is least, which may be the unit itself: so the cost never
    rises.

    Args:
        gradients: (batches, units).
        count: units that go.

    Returns:
        ascending, (count,) int64.
    """
    vectors = gradients.double().T.contiguous()  # (units, batches)
    norms = vectors.square().sum(1)
    order = norms.argsort(stable=True)
    if count in (0, len(order)):
        return order[:count].sort().values
    members = order[:count].clone()
    total = vectors[members].sum(0)
    for unit in order[count:]:
        joined = total + vectors[unit]
        # || joined - g_i ||^2 less || joined ||^2, of each member and of the unit itself
        without = norms[members] - 2 * (vectors[members] @ joined)
        itself = norms[unit] - 2 * (vectors[unit] @ joined)
        place = int(without.argmin())
        if bool(without[place] < itself):
            total = joined - vectors[members[place]]
            members[place] = unit
    return members.sort().values
