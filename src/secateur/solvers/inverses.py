"""The inverse of a damped second moment, of which only some columns are ever looked at.

Hd = X^T X / T + s I for T tokens X (T, q). Its inverse is made as a whole where there are many
tokens; of few it is known from a system of T equations (Woodbury),

    Hd^-1 = (I - A^T A) / s      with  L L^T = X X^T + s T I,  A = L^-1 X,

which for 1,280 tokens of 11,008 inputs is an eighth of the memory and a hundredth of the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from secateur.finite import all_finite
from secateur.solvers.gram import PANEL, cholesky, cholesky_in_place, inverse_of
from secateur.solvers.ladder import DAMPINGS, MORE_DAMPING, climbed
from secateur.statistics import Moments, inner_products, product


class Inverse(ABC):
    """Hd^-1, (q, q), float64."""

    @abstractmethod
    def columns(self, inputs: torch.Tensor) -> torch.Tensor:
        """Columns (q, n) of the inverse."""

    @abstractmethod
    def blocks(self, unit: int) -> torch.Tensor:
        """Blocks (q / unit, unit, unit) along the diagonal."""

    @abstractmethod
    def energy(self, weight: torch.Tensor) -> float:
        """tr(W Hd W^T), what a layer W (p, q) puts out."""


class WholeInverse(Inverse):
    """The inverse as a matrix.

    Args:
        second: H, (q, q), float64.
        damping: s as a share of mean diag H.

    Raises:
        ArithmeticError: H is not finite, or no damping helps.
    """

    def __init__(self, second: torch.Tensor, damping: float) -> None:
        self._matrix, factor, _ = cholesky(second, damping)
        self._inverse = inverse_of(factor)

    def columns(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._inverse[:, inputs]

    def blocks(self, unit: int) -> torch.Tensor:
        pieces = len(self._inverse) // unit
        blocks = self._inverse.reshape(pieces, unit, pieces, unit).diagonal(dim1=0, dim2=2)
        return blocks.permute(2, 0, 1).clone()

    def energy(self, weight: torch.Tensor) -> float:
        w = weight.double()
        return float((w @ self._matrix).mul(w).sum())


class InverseOfFew(Inverse):
    """The same from the tokens themselves.

    Of matrices as large as the tokens in float64 only A stays.

    Args:
        moments: of fewer tokens than inputs, which they hold: X, (T, q), with T below q.
        damping: s as a share of mean diag H.

    Raises:
        ArithmeticError: a token is not finite, or no damping helps.
    """

    def __init__(self, moments: Moments, damping: float) -> None:
        self._moments = moments
        rows = self._stored()
        tokens, width = rows.shape
        if not all_finite(rows):
            raise ArithmeticError("the tokens are not finite")
        inner = inner_products(rows)
        mean = float(inner.trace()) / (tokens * width)
        for step in DAMPINGS:
            self._damping = damping * step * mean if mean > 0 else 1.0
            matrix = inner.clone()
            matrix.diagonal().add_(self._damping * tokens)
            if cholesky_in_place(matrix):
                if step > 1:
                    climbed(MORE_DAMPING, f"{damping * step:g} of the mean diagonal")
                break
        else:
            raise ArithmeticError("the tokens have no Cholesky factor under any damping")
        del rows, inner
        # By columns, as LAPACK wants it, so that A takes the place of X.
        self._half = matrix.new_empty(width, tokens).T.copy_(self._stored())
        torch.linalg.solve_triangular(matrix, self._half, upper=False, out=self._half)

    def _stored(self) -> torch.Tensor:
        rows = self._moments.rows
        assert rows is not None
        return rows

    def columns(self, inputs: torch.Tensor) -> torch.Tensor:
        out = self._half.T @ self._half[:, inputs]
        out.neg_()
        out[inputs, torch.arange(len(inputs), device=inputs.device)] += 1
        return out.div_(self._damping)

    def blocks(self, unit: int) -> torch.Tensor:
        parts = []
        for part in self._half.split(max(1, PANEL // unit) * unit, dim=1):
            half = part.reshape(len(part), -1, unit).permute(1, 2, 0)  # (pieces, unit, T)
            parts.append(half @ half.mT)
        out = torch.cat(parts).neg_()
        out.diagonal(dim1=1, dim2=2).add_(1)
        return out.div_(self._damping)

    def energy(self, weight: torch.Tensor) -> float:
        out, rows = 0.0, self._stored()
        for part in weight.split(PANEL):
            put_out = product(rows, part.T).square().sum() / len(rows)
            out += float(put_out + self._damping * part.double().square().sum())
        return out


def inverse_from(moments: Moments, damping: float) -> Inverse:
    """The inverse of H + s I with s = ``damping`` * mean diag H, by the cheaper way."""
    rows = moments.rows
    if rows is None or not len(rows):
        return WholeInverse(moments.covariance, damping)
    del rows  # which may be a copy
    return InverseOfFew(moments, damping)
