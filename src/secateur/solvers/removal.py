"""Removal of many weights of a linear layer, and what the kept ones do about it.

Every row w of W (p, q) that reads x with H = E[x x^T] is a problem of its own:

    min_w' (w' - w) H (w' - w)^T     with w'_P = 0 for the removed set P.

Its solution is the multiple removal of APT (arXiv 2410.15567, Eqs. 11 to 13) and of Optimal Brain
Surgeon before it,

    dw = - w_P [Hi_PP]^-1 Hi_P,:          L = w_P [Hi_PP]^-1 w_P^T          Hi = H^-1,

against the single removal of SparseGPT (Frantar & Alistarh 2023), which takes the columns of P one
by one from left to right and never touches a column again that it has passed.

**Blocks.** Both go over blocks of columns. With U upper triangular and Hi = U^T U, the inverse of
the part of H that is not frozen, from column a on, is U[a:, a:]^T U[a:, a:]; so for the block from
a to b its inverse is K = U_BB^T U_BB, and what the block's removal does to itself and to all later
columns is - z U_BB^T U[a:b, a:] with z = [K_PP]^-1 w_P spread over the block. The update of all
rows is one product of matrices, the same as SparseGPT's with another error
(:mod:`secateur.solvers.compensation`). One block of all columns is the optimum for its mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from secateur.finite import all_finite
from secateur.solvers.compensation import all_at_once, one_by_one, solve_in_rows
from secateur.solvers.gram import cholesky
from secateur.solvers.ladder import FLOAT64, NO_TUNING, climbed
from secateur.solvers.ladder import inverse as inverse_matrix
from secateur.solvers.patterns import lowest, lowest_in_groups, lowest_in_rows, removal_sets
from secateur.sparsity import Pattern

Solution = Literal["S", "M"]
Scope = Literal["layer", "row"]
#: Residual that systems may have which only rank what goes next.
RANKING = 1e-3
COMPENSATE = {"S": one_by_one, "M": all_at_once}


@dataclass(frozen=True)
class Removal:
    """How weights are removed.

    Attributes:
        mask_by: S scores each weight alone, w^2 / 2 Hi_jj (APT, Eq. 14). M counts what removed
            weights do to each other (Eq. 12): N:M compares every pattern of a group; unstructured
            takes the mask in ``rounds``, ever smaller, and scores what is left anew after each.
        compensate_by: S column by column, M all of a block at once (Eq. 11).
        block: columns of a block; None: all.
        damping: added to H, as a share of mean diag H.
        scope: unstructured weights compete in the whole block of the layer, or in each row.
        rounds: see ``mask_by``.
        shrinking: score with U_jj^2, the inverse with all columns to the left frozen (SparseGPT),
            instead of Hi_jj of the whole block.
    """

    mask_by: Solution
    compensate_by: Solution
    block: int | None = 128
    damping: float = 0.01
    scope: Scope = "layer"
    rounds: int = 1
    shrinking: bool = False


@dataclass(frozen=True)
class Sparse:
    """What is left.

    Attributes:
        weight: (p, q) float32, exactly zero where ``mask`` is.
        mask: (p, q) bool, True where a weight went.
    """

    weight: torch.Tensor
    mask: torch.Tensor


def inverse_factor(second: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """U, upper triangular, with (H + damping * mean diag H * I)^-1 = U^T U.

    A Cholesky factor of H with its rows and columns turned about gives H = R R^T with R upper
    triangular, and U = R^-1: one inverse less than factoring H^-1.

    Args:
        second: H, (q, q), float64.

    Returns:
        U, (q, q), float64, and the damping that it took.

    Raises:
        ArithmeticError: H is not finite.
    """
    _, factor, share = cholesky(second.flip(0, 1), damping)
    unit = torch.eye(len(second), dtype=second.dtype, device=second.device)
    return torch.linalg.solve_triangular(factor, unit, upper=False).flip(0, 1), share


def without_dead(weight: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W with zeros where an input never fires, H with a one on the diagonal there.

    Such a weight does nothing and is the first to go; the one keeps H invertible.

    Returns:
        copies: (p, q) float32 and (q, q) float64.
    """
    dead = second.diagonal() <= 0
    weight, second = weight.float().clone(), second.clone()
    weight[:, dead] = 0
    second.diagonal()[dead] = 1
    return weight, second


def remove(
    weight: torch.Tensor, second: torch.Tensor, pattern: Pattern, count: int, how: Removal
) -> Sparse:
    """Make weights zero and let the others make up for it.

    Args:
        weight: W, (p, q).
        second: H, (q, q), float64.
        pattern: N:M where it is grouped.
        count: weights that go, where it is not.

    Raises:
        ArithmeticError: H is not finite.
        RecipeError: a group has too many patterns to compare.
    """
    for dtype in (torch.float32, torch.float64):
        try:
            found = _removed(weight, second, pattern, count, how, dtype)
        except ArithmeticError:
            if dtype is torch.float64:
                raise
        else:
            if all_finite(found.weight):
                return found
        if dtype is torch.float32:
            climbed(FLOAT64)
    climbed(NO_TUNING)
    return Sparse(weight.float().masked_fill(found.mask, 0), found.mask)


def _removed(
    weight: torch.Tensor,
    second: torch.Tensor,
    pattern: Pattern,
    count: int,
    how: Removal,
    dtype: torch.dtype,
) -> Sparse:
    """:func:`remove` in one type."""
    left, second = without_dead(weight, second)
    left = left.to(dtype)
    upper = inverse_factor(second, how.damping)[0].to(left.dtype)
    width = left.shape[1]
    step = width if how.block is None else min(how.block, width)
    if pattern.grouped:
        step = max(step // pattern.group, 1) * pattern.group
    mask = torch.zeros_like(left, dtype=torch.bool)
    gone = 0
    for start in range(0, width, step):
        end = min(start + step, width)
        factor, block = upper[start:end, start:end], left[:, start:end]
        error = None
        if pattern.grouped:
            chosen, error = _choose_groups(block, factor, pattern, how)
        else:
            chosen = _choose(block, factor, round(count * end / width) - gone, how)
        gone += int(chosen.sum())
        mask[:, start:end] = chosen
        if error is None:
            error = COMPENSATE[how.compensate_by](block, chosen, factor)
        left[:, start:] -= error @ upper[start:end, start:]
        block[chosen] = 0
    if not pattern.grouped and gone != count:
        raise ArithmeticError("scores of weights to remove overflowed")
    return Sparse(left.float(), mask)


def relative_error(weight: torch.Tensor, new: torch.Tensor, second: torch.Tensor) -> float:
    """tr((W' - W) H (W' - W)^T) / tr(W H W^T): the share of the output's energy that is lost."""
    matrix = second.to(weight.dtype)
    change = new - weight
    whole = float((weight @ matrix).mul(weight).sum(dtype=torch.float64))
    lost = float((change @ matrix).mul(change).sum(dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0


# ---- which go --------------------------------------------------------------------------------


def _scores(block: torch.Tensor, factor: torch.Tensor, shrinking: bool) -> torch.Tensor:
    """w_j^2 / K_jj, or w_j^2 / U_jj^2; twice the loss of Eq. 14, which ranks alike."""
    inverse = factor.diagonal() if shrinking else factor.norm(dim=0)
    return (block / inverse).square()


def _choose(block: torch.Tensor, factor: torch.Tensor, count: int, how: Removal) -> torch.Tensor:
    """An unstructured mask; by M in parts, each scored on what those before have left.

    Parts get smaller: what is decided last hangs most on what is gone by then. Of four rounds the
    first takes 44%, the last 6%, and that loses less than eight rounds alike (docs/apt.md).
    """
    pick = lowest if how.scope == "layer" else lowest_in_rows
    scores = _scores(block, factor, how.shrinking)
    rounds = how.rounds if how.mask_by == "M" else 1
    mask = torch.zeros_like(block, dtype=torch.bool)
    after = _After(block, factor.T @ factor) if rounds > 1 else None
    for number in range(1, rounds + 1):
        scores[mask] = torch.inf
        left = 1 - number / rounds
        mask |= pick(scores, round(count * (1 - left**2)) - int(mask.sum()))
        if after is not None and number < rounds:
            scores = after.scores(mask)
    return mask


class _After:
    """Scores of what is left when a mask is gone and made up for, w_j^2 over its inverse's K'_jj.

    The weights are then w - w_P [K_PP]^-1 K_P,: and their inverse is K' = K - K_:P [K_PP]^-1 K_P,:.
    Its diagonal would take a factor of K_PP for each row, and it only ranks what may go next. So
    it is K_jj times 1 - r_ij^2 of every i in P, r being K as correlations: right for one weight, or
    for weights that do nothing to each other, never negative, and one product for all rows. The
    masks lose what those of the whole inverse lose (docs/apt.md).

    Args:
        block: w, (p, B).
        inverse: K, (B, B).
    """

    def __init__(self, block: torch.Tensor, inverse: torch.Tensor) -> None:
        self.block = block
        self.inverse = inverse
        self.alone = inverse.diagonal()
        squares = inverse.square() / torch.outer(self.alone, self.alone)
        self.logs = torch.log1p(-squares.fill_diagonal_(0).clamp_(max=1 - 1e-6))
        self.solved: torch.Tensor | None = None

    def scores(self, mask: torch.Tensor) -> torch.Tensor:
        """Of every weight, (p, B), for a mask that holds the one asked before."""
        self.solved = solve_in_rows(
            self.inverse, mask, self.block, start=self.solved, share=RANKING
        )  # fmt: skip
        diagonal = (mask.to(self.block.dtype) @ self.logs).exp_().mul_(self.alone)
        return (self.block - self.solved @ self.inverse).square_().div_(diagonal)


def _choose_groups(
    block: torch.Tensor, factor: torch.Tensor, pattern: Pattern, how: Removal
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An N:M mask, group by group from left to right, each seeing what those before have done.

    Returns:
        the mask, and E of the single removal, which is done on the way. What a multiple removal
        does on the way only serves the choice: the block is made up for as a whole afterwards.
    """
    left = block.clone()
    mask = torch.zeros_like(block, dtype=torch.bool)
    errors = torch.empty_like(block)
    for start in range(0, block.shape[1], pattern.group):
        end = start + pattern.group
        own, group = factor[start:end, start:end], left[:, start:end]
        if how.mask_by == "M":
            chosen, error = _best_pattern(group, own, pattern)
        else:
            scores = _scores(group, own, how.shrinking)
            chosen = lowest_in_groups(scores, pattern.kept, pattern.group)
        if how.mask_by == "S" or how.compensate_by == "S":
            error = COMPENSATE[how.compensate_by](group, chosen, own)
        left[:, end:] -= error @ factor[start:end, end:]
        mask[:, start:end] = chosen
        errors[:, start:end] = error
    return mask, errors if how.compensate_by == "S" else None


def _best_pattern(
    group: torch.Tensor, factor: torch.Tensor, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """The removal of least L = w_P [K_PP]^-1 w_P^T of every row (Eq. 12), all patterns tried.

    Returns:
        the mask, (p, M) bool, and E of its multiple removal, (p, M), which the losses bring along.
    """
    inverse = factor.T @ factor
    sets = removal_sets(pattern.kept, pattern.group).to(group.device)
    blocks = inverse[sets[:, :, None], sets[:, None, :]]  # (patterns, n, n)
    solved = inverse_matrix(blocks.double()).to(group.dtype)
    of = group.T[sets].transpose(1, 2)  # (patterns, p, n)
    z = of @ solved
    best = (z * of).sum(2).argmin(0)
    mask = torch.zeros_like(group, dtype=torch.bool).scatter_(1, sets[best], True)
    chosen = z[best, torch.arange(len(group), device=group.device)]
    return mask, torch.zeros_like(group).scatter_(1, sets[best], chosen) @ factor.T
