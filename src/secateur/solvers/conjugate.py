"""Systems of many rows at once, each over a set of its own, by conjugate gradients."""

from __future__ import annotations

import torch

#: Steps between two looks at whether all systems are solved.
CHECKED_EVERY = 2


def descend(
    matrix: torch.Tensor,
    inside: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    *,
    steps: int,
    enough: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bring the x of each row nearer to A_PP x_P = b_P, P its set.

    The preconditioner is the diagonal. A step is one product of (p, q) with (q, q), whatever the
    sets are.

    Args:
        matrix: A, symmetric and positive definite, (q, q).
        inside: 1 in the sets, 0 elsewhere, (p, q), of the type of A.
        x: where to begin, (p, q); changed in place, in the sets alone.
        residual: b - A x, zero outside the sets, (p, q); changed in place.
        steps: most of them.
        enough: r^T diag(A)^-1 r with which a row is solved, (p, 1); no more steps when all are.

    Returns:
        r^T diag(A)^-1 r of what is left, (p, 1).
    """
    scale, tiny = matrix.diagonal(), torch.finfo(x.dtype).tiny
    direction = residual / scale
    height = (residual * direction).sum(1, keepdim=True)
    for step in range(1, steps + 1):
        bent = (direction @ matrix).mul_(inside)
        length = height / (direction * bent).sum(1, keepdim=True).clamp(min=tiny)
        x.addcmul_(length, direction)
        residual.addcmul_(length, bent, value=-1)
        along = residual / scale
        new = (residual * along).sum(1, keepdim=True)
        direction.mul_(new / height.clamp(min=tiny)).add_(along)
        height = new
        if enough is not None and step % CHECKED_EVERY == 0 and bool((new <= enough).all()):
            break
    return height
