"""An order of inputs in which N:M keeps more: channel permutation of RIA (Zhang et al. 2024, 4.2).

N:M keeps the N best of every M neighbours, so it does best where each group holds strong and weak
inputs. The order is dealt out first, then improved slot by slot by linear sum assignment.
"""

from __future__ import annotations

import torch

from secateur.errors import RecipeError

#: Groups among which inputs are exchanged at once; the gain of every exchange is one matrix.
GROUPS_AT_ONCE = 512
#: Values of a piece of that work: 64 MiB in float32.
VALUES_PER_PIECE = 2**24


def deal(scores: torch.Tensor, group: int) -> torch.Tensor:
    """Inputs sorted by their summed score and dealt to the groups like cards, to and fro.

    Args:
        scores: (p, q), q a multiple of ``group``.

    Returns:
        order of the inputs, (q,) int64.
    """
    hands = scores.shape[1] // group
    rounds = scores.sum(0).argsort(descending=True, stable=True).view(group, hands).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)


def assign(scores: torch.Tensor, kept: int, group: int, order: torch.Tensor) -> torch.Tensor:
    """``order`` with the inputs of each slot exchanged among groups so that N:M keeps the most.

    What N:M keeps of a row with f_1 >= f_2 >= ... fixed in a group and c added to it is
    f_1 + ... + f_{N-1} + max(f_N, c), so the gain of every exchange is a sum over rows.

    Args:
        scores: (p, q), in the original order.
        order: (q,), from :func:`deal`.

    Returns:
        order of the inputs, (q,) int64; it keeps at least as much.

    Raises:
        RecipeError: SciPy, which solves the assignment, is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise RecipeError(
            "permute is assign, which needs SciPy: install it with pip install scipy, or use "
            "--set permute=deal"
        ) from error
    table = order.view(-1, group).clone()  # (groups, slots)
    for slot in range(group):
        others = [place for place in range(group) if place != slot]
        for hands in torch.arange(len(table)).split(GROUPS_AT_ONCE):
            fixed = scores[:, table[hands][:, others]].sort(dim=2, descending=True)[0]
            level = fixed[..., kept - 1]  # f_N, (p, groups)
            movable = scores[:, table[hands, slot]]  # (p, groups)
            gain = torch.zeros(len(hands), len(hands), dtype=torch.float64)
            for rows in torch.arange(len(scores)).split(
                max(1, VALUES_PER_PIECE // len(hands) ** 2)
            ):
                pairs = torch.maximum(level[rows, :, None], movable[rows, None, :])
                gain += pairs.sum(0, dtype=torch.float64).cpu()
            _, columns = linear_sum_assignment(gain.numpy(), maximize=True)
            table[hands, slot] = table[hands[columns], slot]
    return table.reshape(-1)


def retained(scores: torch.Tensor, kept: int, group: int, order: torch.Tensor) -> float:
    """Sum of the scores that N:M keeps in this order."""
    grouped = scores[:, order].unflatten(1, (-1, group))
    return float(grouped.topk(kept, dim=2)[0].sum(dtype=torch.float64))
