"""What kept weights do about removed ones: one column after the other, or all of a block at once.

W (p, B) is a block of columns and U (B, B), upper triangular, the factor of its inverse: K = U^T U
(:mod:`secateur.solvers.removal`). Both functions return E, (p, B), with which the block and all
columns behind it lose E U[a:b, a:].
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from secateur.solvers.ladder import factors

#: Values of the systems that are solved in one batch: 32 MiB in float32.
VALUES_PER_BATCH = 2**23
#: Systems of a batch have sizes up to this apart; smaller ones are filled up with the identity.
SIZE_STEP = 8


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

    With M = K^-1 and S what stays, z = (M w)_P - M_PS [M_SS]^-1 (M w)_S for w = w_P alone, which is
    the same and is what is solved where fewer weights stay than go.

    Args:
        block: W, (p, B).
        mask: True where a weight goes, (p, B).
        factor: U, (B, B).

    Returns:
        E = z U^T, (p, B).
    """
    gone = block * mask
    if 2 * int(mask.sum()) <= mask.numel():
        return solve_in_rows(factor.T @ factor, mask, gone) @ factor.T
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, unit, upper=True)
    matrix = half @ half.T  # M = K^-1 = U^-1 U^-T
    z = gone @ matrix
    z -= solve_in_rows(matrix, ~mask, z) @ matrix
    return (z * mask) @ factor.T


def solve_in_rows(matrix: torch.Tensor, sets: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """For each row i the solution of A_PP z = b_P, P its set, spread over all columns.

    Args:
        matrix: A, symmetric and positive definite, (B, B).
        sets: (p, B) bool.
        of: b, (p, B).

    Returns:
        z, (p, B), zero outside the sets.
    """
    found = torch.zeros_like(of)

    def solve(rows: torch.Tensor, index: torch.Tensor, factors: torch.Tensor) -> None:
        solved = torch.cholesky_solve(entries(of[rows], index).unsqueeze(-1), factors)
        wide = of.new_zeros(len(rows), of.shape[1] + 1)
        found[rows] = wide.scatter_(1, index, solved[..., 0])[:, :-1]

    in_batches(matrix, sets, solve)
    return found


def in_batches(
    matrix: torch.Tensor,
    sets: torch.Tensor,
    use: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    *,
    wide: bool = False,
) -> None:
    """Factor the submatrix of every row's set, rows with sets of about one size together.

    Args:
        matrix: symmetric and positive definite, (B, B).
        sets: (p, B) bool.
        use: gets row numbers (r,), columns (r, n) filled up with B, and lower Cholesky factors
            (r, n, n) of the submatrices, filled up with the identity.
        wide: whether ``use`` makes r x n x B values as well.
    """
    width = sets.shape[1]
    sizes = sets.sum(1)
    # One more row and column of zeros, where what is filled up points to.
    extended = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    order = (~sets).to(torch.uint8).argsort(dim=1, stable=True)
    padded = (sizes + SIZE_STEP - 1) // SIZE_STEP * SIZE_STEP
    for size in padded.unique().tolist():
        if size == 0:
            continue
        n = min(size, width)
        members = (padded == size).nonzero()[:, 0]
        for batch in members.split(max(1, VALUES_PER_BATCH // (n * (width if wide else n)))):
            index = order[batch, :n].clone()
            index[torch.arange(n, device=index.device) >= sizes[batch, None]] = width
            systems = extended[index[:, :, None], index[:, None, :]]
            systems.diagonal(dim1=1, dim2=2).add_((index == width).to(matrix.dtype))
            use(batch, index, factors(systems))


def entries(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of each row (r, B) at its columns, zero where filled up, (r, n)."""
    return torch.nn.functional.pad(rows, (0, 1)).gather(1, index)
