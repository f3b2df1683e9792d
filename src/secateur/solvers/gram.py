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

from collections.abc import Callable
from typing import Literal

import torch

from secateur.finite import all_finite
from secateur.solvers.ladder import (
    DAMPINGS,
    FLOAT64,
    LEAST_SQUARES,
    MORE_DAMPING,
    RCOND,
    climbed,
)
from secateur.statistics import Moments

Order = Literal["condition", "condition-literal", "energy", "obs", "random"]


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


Ordered = Callable[[torch.Tensor], torch.Tensor]
"""Gives G with its inputs in an order, (q, q), float64, in memory that may be written into."""


def ordering(g: torch.Tensor) -> Ordered:
    """What :class:`~secateur.solvers.mask_tuning.MaskCurve` asks for, of a G that is there."""
    return lambda order: g[order][:, order]


#: Rows of G that are made at a time.
PANEL = 1024
#: The same of an inverse.
INVERSE_PANEL = 192


class GramForm:
    """G of one layer, made a panel at a time and in the order that is wanted.

    G of 11,008 inputs is a gigabyte in float64. It is made once, where it is going to be
    factorised, of products in float32; nothing else of its size is ever there.

    Args:
        weight: W, (p, q).
        moments: of the inputs.
    """

    def __init__(self, weight: torch.Tensor, moments: Moments) -> None:
        self._weight = _safe(weight.float(), "a weight")
        self._moments = moments
        rows = moments.rows
        self._rows = None if rows is None else _safe(rows, "an activation")
        self._second = moments.second if self._rows is None else None

    def __len__(self) -> int:
        return self._weight.shape[1]

    def diagonal(self) -> torch.Tensor:
        """G_jj, what input j puts out alone, (q,), float64."""
        energy = torch.zeros(len(self), dtype=torch.float64, device=self._weight.device)
        for rows in self._weight.split(PANEL):
            energy += rows.double().square().sum(0)
        return energy * self._moments.squares / self._moments.tokens

    def of_groups(self, width: int) -> torch.Tensor:
        """1^T G_gg 1 of each group of inputs, what it puts out together, (q / width,), float64."""
        groups = torch.arange(len(self), device=self._weight.device).split(width)
        return torch.stack([self._part(group, group).sum() for group in groups])

    def ordered(self, order: torch.Tensor) -> torch.Tensor:
        """G with its inputs in this order, (q, q), float64; the caller may write into it."""
        size = len(order)
        out = torch.empty(size, size, dtype=torch.float64, device=self._weight.device)
        for start in range(0, size, PANEL):
            end = min(start + PANEL, size)
            part = self._part(order[start:end], order[:end])
            out[start:end, :end] = part
            out[:start, start:end] = part[:, :start].T
        return out

    def _part(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        weights = self._weight[:, rows].T @ self._weight[:, columns]
        if self._rows is None:
            assert self._second is not None
            moment = self._second[rows[:, None], columns]
        else:
            moment = (self._rows[:, rows].T @ self._rows[:, columns]).double()
        return moment.mul_(weights).div_(self._moments.tokens)


def _safe(values: torch.Tensor, what: str) -> torch.Tensor:
    """The values in float64 where products of them would not fit float32."""
    if not values.numel() or float(values.abs().max()) < 1e17:
        return values
    climbed(FLOAT64, f"{what} above 1e17")
    return values.double()


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
    """Lower Cholesky factor of the damped G, down the steps of :mod:`~secateur.solvers.ladder`.

    Where no damping helps, G has eigenvalues far below zero, which no second moment has: the
    nearest matrix without them is taken.

    Returns:
        the damped matrix, its factor, and the share of damping that it took.

    Raises:
        ArithmeticError: G is not finite.
    """
    if not all_finite(g):
        raise ArithmeticError("the Gram matrix is not finite")
    for step in DAMPINGS:
        matrix = damped(g, share * step)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and all_finite(factor.diagonal()):
            if step > 1:
                climbed(MORE_DAMPING, f"{share * step:g} of the mean diagonal")
            return matrix, factor, share * step
    climbed(LEAST_SQUARES)
    values, vectors = torch.linalg.eigh((g + g.T) / 2)
    floor = float(values[-1].clamp(min=1.0)) * RCOND + share * float(g.diagonal().mean().abs())
    matrix = (vectors * (values.clamp(min=0) + floor)) @ vectors.T
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0 or not all_finite(factor.diagonal()):
        raise ArithmeticError("the Gram matrix has no Cholesky factor under any damping")
    return matrix, factor, share * DAMPINGS[-1]


def cholesky_in_place(matrix: torch.Tensor) -> bool:
    """Put the lower Cholesky factor of a symmetric (q, q) matrix where the matrix was.

    Returns:
        whether there is one; where not, the matrix is spoilt.
    """
    # LAPACK fills a matrix by columns; the transposed one is that without a copy.
    by_columns = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    _, info = torch.linalg.cholesky_ex(by_columns, upper=True, out=(by_columns, info))
    return int(info) == 0 and all_finite(matrix.diagonal())


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
    inverse = inverse_of(factor)
    if order == "obs":
        # Error of removing input j with the others refitted (Optimal Brain Surgeon).
        return inverse.diagonal().reciprocal()
    return frobenius_gradient(matrix, inverse)


def inverse_of(factor: torch.Tensor) -> torch.Tensor:
    """(L L^T)^-1 from L, as products of panels that leave out what is zero above the diagonal.

    A third of the operations of a system for every column, and at the rate of products also on
    several threads, where torch.cholesky_inverse has half the speed of one.
    """
    size = len(factor)
    half, out = torch.zeros_like(factor), torch.empty_like(factor)  # L^-1, and L^-T L^-1
    for start in range(0, size, INVERSE_PANEL):
        end = min(start + INVERSE_PANEL, size)
        corner = factor[start:end, start:end]
        right = torch.eye(end - start, dtype=factor.dtype, device=factor.device)
        before = factor[start:end, :start] @ half[:start, :start]
        rows = torch.cat([before.neg_(), right], dim=1)
        half[start:end, :end] = torch.linalg.solve_triangular(corner, rows, upper=False)
    for start in range(0, size, INVERSE_PANEL):
        end = min(start + INVERSE_PANEL, size)
        part = half[start:, start:end].T @ half[start:, :end]
        out[start:end, :end] = part
        out[:start, start:end] = part[:, :start].T
    return out


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
    eps = eps_share * float(g.diagonal().mean())
    if eps == 0:  # a dead layer; its condition number is not defined
        return torch.zeros_like(g.diagonal())
    _, factor, _ = cholesky(g, eps_share)
    high, u = largest_eigenpair(lambda x: g @ x, g)
    # The smallest pair is the largest of the inverse; the damping only shifts the value.
    _, v = largest_eigenpair(lambda x: torch.cholesky_solve(x[:, None], factor)[:, 0], g)
    low = (v @ (g @ v)).clamp(min=0)
    return 2 * (
        high * u.square() / (low + eps) - (high + eps) * low * v.square() / (low + eps).square()
    )


def largest_eigenpair(
    apply: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, steps: int = 120
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenvalue and its unit vector of a symmetric positive operator, by Lanczos.

    A full decomposition of a 1536 x 1536 matrix takes a hundred times as long here.

    Args:
        apply: the operator on a vector (q,).
        like: any tensor of its size in the first dimension, type and device.
    """
    size = len(like)
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(like)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        w = apply(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            w = w - stacked.T @ (stacked @ w)
        norm = float(w.norm())
        if norm <= 1e-12 * max(map(abs, diagonal)) or len(basis) == steps:
            break
        beside.append(norm)
        basis.append(w / norm)
    count = len(diagonal)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside[: count - 1]):
        small[i, i + 1] = small[i + 1, i] = value
    values, vectors = torch.linalg.eigh(small)
    vector = torch.stack(basis[:count]).T @ vectors[:, -1].to(like)
    return values[-1].to(like), vector / vector.norm()


def literal_score(gradient: torch.Tensor) -> torch.Tensor:
    """Eq. 9: I_f = -g_f + g_f^2 / 2."""
    return -gradient + gradient.square() / 2
