"""What kept weights do about removed ones: one column after the other, or all of a block at once.

W (p, B) is a block of columns and U (B, B), upper triangular, the factor of its inverse: K = U^T U
(:mod:`secateur.solvers.removal`). Both functions return E, (p, B), with which the block and all
columns behind it lose E U[a:b, a:].
"""

from __future__ import annotations

import torch

from secateur.solvers.conjugate import descend
from secateur.solvers.ladder import factors

#: Values of the systems that are solved in one batch: 32 MiB in float32.
VALUES_PER_BATCH = 2**23
#: Systems of a batch have sizes up to this apart; smaller ones are filled up with the identity.
SIZE_STEP = 8
#: Steps of conjugate gradients before a system is factorised instead.
MOST_STEPS = 100
#: A system is solved when its residual has fallen by so many times the rounding of its type.
TOLERANCE = 8


def one_by_one(block: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Single removal: each column in turn, then never again (SparseGPT, Algorithm 1).

    Works on the transpose, whose columns lie together in memory.

    Args:
        block: W, (p, B).
        mask: True where a weight goes, (p, B).
        factor: U, (B, B).

    Returns:
        E, (p, B).
    """
    left = block.T.contiguous()
    gone = mask.T.to(left.dtype)
    error = torch.empty_like(left)
    pivots = factor.diagonal().tolist()
    for j, pivot in enumerate(pivots):
        torch.mul(left[j], gone[j], out=error[j]).div_(pivot)
        left[j + 1 :].addr_(factor[j, j + 1 :], error[j], alpha=-1)
    return error.T


def all_at_once(block: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiple removal: z = [K_PP]^-1 w_P for each row (APT, Eq. 11).

    Args:
        block: W, (p, B).
        mask: True where a weight goes, (p, B).
        factor: U, (B, B).

    Returns:
        E = z U^T, (p, B).
    """
    return solve_in_rows(factor.T @ factor, mask, block) @ factor.T


def solve_in_rows(
    matrix: torch.Tensor,
    sets: torch.Tensor,
    of: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    share: float = 0.0,
) -> torch.Tensor:
    """For each row i the solution of A_PP z = b_P, P its set, spread over all columns.

    All rows take the steps of conjugate gradients together (:mod:`secateur.solvers.conjugate`);
    the K of real layers are close enough to diagonal for a dozen of them. Systems that
    :data:`MOST_STEPS` do not solve are factorised, each by itself.

    Args:
        matrix: A, symmetric and positive definite, (B, B).
        sets: (p, B) bool.
        of: b, (p, B).
        start: where to begin, (p, B), zero outside the sets.
        share: of b, in the norm of the preconditioner, that may be left as residual; never below
            :data:`TOLERANCE` times the rounding of the type.

    Returns:
        z, (p, B), zero outside the sets.

    Raises:
        ArithmeticError: A is not finite.
    """
    inside = sets.to(of.dtype)
    residual = of * inside
    enough = (residual.square() / matrix.diagonal()).sum(1, keepdim=True)
    enough *= max(share, TOLERANCE * torch.finfo(of.dtype).eps) ** 2
    if start is None:
        found = torch.zeros_like(of)
    else:
        found = start.clone()
        residual -= (found @ matrix).mul_(inside)
    left = descend(matrix, inside, found, residual, steps=MOST_STEPS, enough=enough)
    hard = (~(left <= enough)).nonzero()[:, 0]  # so that what is not a number is among them
    if len(hard):
        found[hard] = _factorised(matrix, sets[hard], of[hard])
    return found


def _factorised(matrix: torch.Tensor, sets: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """:func:`solve_in_rows` by a Cholesky factor for each row, sets of about one size together."""
    width = sets.shape[1]
    sizes = sets.sum(1)
    found = of.new_zeros(len(of), width + 1)
    # One more row and column of zeros, where what is filled up points to.
    extended = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    right = torch.nn.functional.pad(of, (0, 1))
    order = (~sets).to(torch.uint8).argsort(dim=1, stable=True)
    padded = (sizes + SIZE_STEP - 1) // SIZE_STEP * SIZE_STEP
    for size in padded.unique().tolist():
        if size == 0:
            continue
        n = min(size, width)
        members = (padded == size).nonzero()[:, 0]
        for rows in members.split(max(1, VALUES_PER_BATCH // n**2)):
            index = order[rows, :n].clone()
            index[torch.arange(n, device=index.device) >= sizes[rows, None]] = width
            systems = extended[index[:, :, None], index[:, None, :]]
            systems.diagonal(dim1=1, dim2=2).add_((index == width).to(matrix.dtype))
            given = right[rows].gather(1, index).unsqueeze(-1)
            solved = torch.cholesky_solve(given, factors(systems))[..., 0]
            found[rows] = found[rows].scatter(1, index, solved)
    return found[:, :-1]
