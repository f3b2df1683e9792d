"""Mask tuning (COMP, Eq. 5 to 7) for every number of removed inputs from one factorisation.

With the c least important inputs removed, the tuned mask m of the kept ones S solves

    min_m  E_t || A_t[:, S] m - A_t 1 ||^2 + s ||m - 1||^2     <=>     Gd_SS m = (Gd 1)_S

where Gd = G + s I. The pull is towards 1, not 0: the paper leaves the damping open, and a scale
that the data does not decide should stay what it was.

Put the inputs in order of falling importance, Gd = L L^T, z = L^-1 Gd 1. The leading k x k block of
L is the factor of the first k inputs, so their mask is L_k^-T z_1..k, and the error left is
sum of z_i^2 over i > k. One factorisation answers every c; the paper solves anew at each.
"""

from __future__ import annotations

import torch

from secateur.finite import all_finite
from secateur.solvers.gram import Ordered, cholesky, cholesky_in_place
from secateur.solvers.ladder import DAMPINGS, MORE_DAMPING, NO_TUNING, climbed

#: A scale outside of this band is a sign of an ill-posed fit, not of a good one.
GUARD = 10.0


class MaskCurve:
    """Tuned masks of one linear layer, for each number of removed inputs.

    Args:
        ordered: gives the Gram matrix G, (q, q), float64, with its inputs in an order; the matrix
            is written into.
        scores: importance of each input, (q,); the lowest goes first.
        damping: s as a share of mean diag G.

    Attributes:
        order: inputs, least important first, (q,).
        damping: the share of damping used, above the asked one where the factorisation failed.
    """

    def __init__(
        self,
        ordered: Ordered,
        scores: torch.Tensor,
        damping: float,
    ) -> None:
        self.order = torch.argsort(scores, stable=True)
        self._factor, right, self.damping = _factored(ordered, self.order.flip(0), damping)
        self._z = torch.linalg.solve_triangular(self._factor, right, upper=False)[:, 0]
        energy = self._z.square()
        self._left = energy.flip(0).cumsum(0)  # entry c-1: error with c removed
        self._all = float(energy.sum())

    def __len__(self) -> int:
        return len(self.order)

    def kept(self, removed: int) -> torch.Tensor:
        """The inputs left when ``removed`` are gone, ascending, (q - removed,)."""
        return self.order[removed:].sort().values

    def tuned(self, removed: int) -> torch.Tensor:
        """The tuned scales of :meth:`kept`, in the same order, (q - removed,), float64."""
        k = len(self) - removed
        # With zeros behind, the whole factor gives what its leading part would, without a copy.
        right = self._z.clone()
        right[k:] = 0
        falling = torch.linalg.solve_triangular(self._factor.T, right[:, None], upper=True)[:k, 0]
        inputs = self.order.flip(0)[:k]
        return falling[inputs.argsort()]

    def error(self, removed: int) -> float:
        """Relative squared error of the layer's output with ``removed`` inputs gone, tuned."""
        if removed == 0 or self._all == 0:
            return 0.0
        return float(self._left[removed - 1]) / self._all

    def variance(self, removed: int) -> float:
        """Var of the nonzero tuned mask, the quantity of Algorithm 1's stopping rule."""
        if removed == 0:
            return 0.0
        return float(self.tuned(removed).var(correction=0))


def _factored(
    ordered: Ordered, order: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Factor of Gd, Gd 1 (q, 1), and the share of damping that it took.

    Raises:
        ArithmeticError: G is not finite, or no damping helps.
    """
    for step in DAMPINGS:
        matrix = ordered(order)
        mean = matrix.diagonal().mean()
        if not bool(torch.isfinite(mean)):
            raise ArithmeticError("the Gram matrix is not finite")
        if not bool(mean > 0):
            matrix = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        else:
            matrix.diagonal().add_(damping * step * mean)
        right = matrix.sum(1, keepdim=True)
        if cholesky_in_place(matrix):
            if step > 1:
                climbed(MORE_DAMPING, f"{damping * step:g} of the mean diagonal")
            return matrix, right, damping * step
    matrix, factor, used = cholesky(ordered(order), damping)  # and by least squares
    return factor, matrix.sum(1, keepdim=True), used


def guarded(scales: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The scales, or all ones if any lies outside the guard band; and whether they were kept."""
    good = all_finite(scales) and bool((scales.abs() <= GUARD).all())
    if good:
        return scales, True
    climbed(NO_TUNING, f"a scale is beyond {GUARD:g}")
    return torch.ones_like(scales), False
