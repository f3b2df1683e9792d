"""Principal directions of a stream of hidden states, in float64."""

from __future__ import annotations

import torch

from secateur.finite import all_finite
from secateur.solvers.ladder import LEAST_SQUARES, climbed

#: Tokens whose outer products are summed in one float64 product.
TOKENS_AT_ONCE = 4096
#: Added to the diagonal, of its mean.
DAMPING = 0.01


def second_moment(hidden: torch.Tensor, *, alike: bool = False) -> torch.Tensor:
    """C = sum over tokens of x x^T, (d, d), float64.

    Products are in float64 too: the largest entries of a stream are thousands of times the
    others, and float32 would round away the directions that decide where to slice.

    Args:
        hidden: (..., d).
        alike: every token counts the same, as it does behind an RMSNorm: x / rms(x) for x.
    """
    width = hidden.shape[-1]
    found = torch.zeros(width, width, dtype=torch.float64, device=hidden.device)
    for chunk in hidden.reshape(-1, width).split(TOKENS_AT_ONCE):
        x = chunk.double()
        if alike:
            square = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.where(square > 0, square, 1.0).rsqrt()
        found += x.T @ x
    return found


def principal_directions(
    second: torch.Tensor, *, centred: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, falling, (d,), and eigenvectors as columns, (d, d), both float64.

    The diagonal is damped by 1% of its mean, which keeps the solver at ease with statistics of
    fewer tokens than d and moves no eigenvector; the values are given back without it. The entry
    of each vector that is largest in magnitude is positive, so that a sign is never a matter of
    chance.

    Args:
        second: C, (d, d), float64.
        centred: whether no token has a mean over its d entries. The direction of the mean then
            comes last, also among directions that the statistics say nothing of.

    Raises:
        ArithmeticError: C is not finite.
    """
    if not all_finite(second):
        raise ArithmeticError("the second moment of the hidden states is not finite")
    width = len(second)
    damping = DAMPING * float(second.diagonal().mean())
    damped = second + damping * torch.eye(width, dtype=second.dtype, device=second.device)
    if centred:
        # A negative eigenvalue, below all others, for the direction (1, ..., 1) / sqrt(d).
        below = float(damped.diagonal().sum()) + 1.0
        damped = damped - 2 * below / width
    try:
        values, vectors = torch.linalg.eigh(damped)
    except (
        RuntimeError
    ):  # torch's LinAlgError is one: the iteration did not end; that of the SVD does
        climbed(LEAST_SQUARES, "singular vectors")
        vectors = torch.linalg.svd(damped).U
        values, order = (vectors.T @ damped @ vectors).diagonal().sort()
        vectors = vectors[:, order]
    values, vectors = values.flip(0), vectors.flip(1)
    values = (values - damping).clamp_min(0)
    place = vectors.abs().argmax(0)
    signs = vectors.gather(0, place[None]).sign()
    return values, vectors * signs
