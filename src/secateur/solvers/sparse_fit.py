"""The fit of the weights that a mask leaves, pulled to the original as held-out windows ask for.

min_w' (w' - w) (H + c I) (w' - w)^T with the mask fixed is what multiple removal solves (APT,
Eq. 11); c, damping there, is here a pull to the original weights. At some thousand tokens a small c
follows noise: of the error that is gone on the windows of the fit, much comes back on others
(docs/apt.md). So c is chosen by windows that were kept out.
"""

from __future__ import annotations

import torch

from secateur.finite import all_finite
from secateur.solvers.conjugate import descend
from secateur.solvers.ladder import NO_TUNING, climbed
from secateur.solvers.refit import sample_of_rows

#: Pulls that are tried, as shares of mean diag H.
PULLS = (0.03, 0.1, 0.3, 1.0, 3.0)
#: Steps of the first, and between two of them: each starts from the one before.
FIRST_STEPS, STEPS_PER_PULL = 8, 3
#: At most, of all pulls together, each on a sample of the rows.
SEARCH_STEPS = FIRST_STEPS + (len(PULLS) - 1) * STEPS_PER_PULL


def best_pull(
    weight: torch.Tensor,
    mask: torch.Tensor,
    original: torch.Tensor,
    fitted: torch.Tensor,
    held_out: torch.Tensor,
) -> float:
    """The pull with which the fit to some windows has the least error on others.

    Args:
        weight: W', (p, q), float32, zero where ``mask`` is: where the fits start.
        mask: True where a weight went, (p, q).
        original: W, (p, q), float32.
        fitted, held_out: H of the windows of the fit and of the others, (q, q), float64.
    """
    rows = sample_of_rows(weight)
    mask, original = mask[rows], original[rows]
    found, least, x = PULLS[0], torch.inf, weight[rows]
    judge = held_out.to(weight.dtype)
    for pull in PULLS:
        steps = FIRST_STEPS if pull == PULLS[0] else STEPS_PER_PULL
        x = polish(x, mask, original, fitted, pull=pull, steps=steps)
        change = x - original
        error = float((change @ judge).mul(change).sum(dtype=torch.float64))
        if error >= least:
            break
        found, least = pull, error
    return found


def polish(
    weight: torch.Tensor,
    mask: torch.Tensor,
    original: torch.Tensor,
    second: torch.Tensor,
    *,
    pull: float,
    steps: int,
) -> torch.Tensor:
    """Conjugate gradients from a sparse weight towards the optimum for its mask, all rows at once.

    Blocks freeze what they have passed; here every kept weight moves again. With the diagonal as
    preconditioner a step is one product of a (p, q) with a (q, q) matrix, and the error
    (w' - w) H (w' - w)^T of no row grows.

    Args:
        weight: W', (p, q), float32, zero where ``mask`` is.
        mask: True where a weight went, (p, q).
        original: W, (p, q), float32.
        second: H, (q, q), float64.
        pull: to the original weights: added to H, as a share of mean diag H.
        steps: of the iteration.

    Returns:
        (p, q) float32.
    """
    matrix = second.float()
    matrix.diagonal().add_(pull * float(second.diagonal().mean()))
    x = weight.clone()
    free = (~mask).to(weight.dtype)
    descend(matrix, free, x, ((original - x) @ matrix).mul_(free), steps=steps)
    if all_finite(x):
        return x
    climbed(NO_TUNING, "the fit overflowed")
    return weight
