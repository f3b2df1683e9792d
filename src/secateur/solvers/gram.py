"""The Gram form of a masked linear layer, and orders of its inputs.

A linear layer W (p outputs, q inputs) reads x; input j is multiplied by a mask entry m_j. Its
output is A_t m with A_t = W Diag(x_t), so that its squared error, averaged over tokens, is a
quadratic form in m with the q x q matrix

    G = E_t[A_t^T A_t] = (W^T W) o E_t[x x^T]                              (o: entry by entry)

COMP (arXiv 2501.15255) writes A = E_t[W Diag(x_t)] instead; then A 1 = y exactly and only the mean
activation would be fitted, so the expectation belongs around the product. :func:`literal_gram` is
the letter of the paper, for comparison.
"""

from __future__ import annotations

from typing import Literal

import torch

Order = Literal["condition", "condition-literal", "energy", "obs", "random"]

#: Dampings tried one after the other until a Cholesky factor exists, as shares of mean diag G.
LADDER = (1.0, 1e2, 1e4, 1e6)


def gram(weight: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """G = (W^T W) o H of COMP's Eq. 4 in the Gram reading.

    Args:
        weight: W, (p, q).
        covariance: H = E[x x^T], (q, q), float64.

    Returns:
        (q, q), float64, symmetric and positive semidefinite (Schur product theorem).
    """
    w = weight.to(torch.float64)
    return (w.T @ w) * covariance


def literal_gram(weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """A^T A with A = W Diag(E[x]), as Eq. 4 of the paper reads by the letter; (q, q), float64."""
    w = weight.to(torch.float64)
    return (w.T @ w) * torch.outer(mean, mean)


def damped(g: torch.Tensor, share: float) -> torch.Tensor:
    """G + share * mean(diag G) * I; a zero matrix becomes the identity."""
    mean = g.diagonal().mean()
    if not bool(mean > 0):
        return torch.eye(len(g), dtype=g.dtype, device=g.device)
    out = g.clone()
    out.diagonal().add_(share * mean)
    return out


def cholesky(g: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Lower Cholesky factor of the damped G, with more damping where it fails.

    Returns:
        the damped matrix, its factor, and the share of damping that it took.

    Raises:
        ArithmeticError: no damping helps, because G is not finite.
    """
    for step in LADDER:
        matrix = damped(g, share * step)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return matrix, factor, share * step
    raise ArithmeticError("the Gram matrix has no Cholesky factor under any damping")


def importance(
    order: Order, g: torch.Tensor, *, damping: float, generator: torch.Generator
) -> torch.Tensor:
    """Score of each input; the lowest is removed first.

    Args:
        order: see the functions below; ``energy`` is G_jj, what input j alone puts out.
        g: G, (q, q), float64.
        damping: share of mean diag G added to the diagonal where an inverse is needed.

    Returns:
        (q,), float64.
    """
    if order == "energy":
        return g.diagonal().clone()
    if order == "random":
        return torch.rand(len(g), generator=generator, dtype=torch.float64).to(g.device)
    if order == "condition-literal":
        return literal_score(spectral_gradient(g, damping))
    matrix, factor, _ = cholesky(g, damping)
    inverse = torch.cholesky_inverse(factor)
    if order == "obs":
        # Error of removing input j with the others refitted (Optimal Brain Surgeon).
        return inverse.diagonal().reciprocal()
    return frobenius_gradient(matrix, inverse)


def frobenius_gradient(g: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """d log kappa_F / d m at m = 1, with kappa_F = ||D G D||_F ||(D G D)^-1||_F, D = Diag(m).

    Row norms are enough: 2 (||G_f||^2 / ||G||_F^2 - ||G^-1_f||^2 / ||G^-1||_F^2).
    This is COMP's gradient of Eq. 8 with the condition number in the Frobenius norm; positive
    where scaling an input up makes the problem worse conditioned.

    Args:
        g, inverse: the damped Gram matrix and its inverse, (q, q).
    """
    rows = g.square().sum(1)
    inverse_rows = inverse.square().sum(1)
    return 2 * (rows / rows.sum() - inverse_rows / inverse_rows.sum())


def spectral_gradient(g: torch.Tensor, eps_share: float) -> torch.Tensor:
    """d kappa_2 / d m at m = 1 for kappa_2(D G D + eps I), COMP's Eq. 8 by the letter.

    With the extreme eigenpairs (l1, u) and (lq, v):
    2 [ l1 u_f^2 / (lq + eps) - (l1 + eps) lq v_f^2 / (lq + eps)^2 ].
    """
    values, vectors = torch.linalg.eigh(g)
    eps = eps_share * float(g.diagonal().mean())
    low, high = values[0].clamp(min=0), values[-1]
    u, v = vectors[:, -1], vectors[:, 0]
    return 2 * (
        high * u.square() / (low + eps) - (high + eps) * low * v.square() / (low + eps).square()
    )


def literal_score(gradient: torch.Tensor) -> torch.Tensor:
    """Eq. 9: I_f = -g_f + g_f^2 / 2."""
    return -gradient + gradient.square() / 2
