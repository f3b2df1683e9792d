"""Weights of the kept inputs that come nearest to the output of all of them, in closed form.

    min_V E||V x_S - W x||^2 + s ||V - W_S||^2       s = pull * mean diag H_SS

    V = W_S + W_P H_PS (H_SS + s I)^-1                                      from H = E[x x^T]
    V = W_S + R (X_S X_S^T + s T I)^-1 X_S,   R = W_P X_P^T                 from T tokens X

The second is the same by the push-through identity; of fewer tokens than inputs it is the smaller
system. S are the kept inputs, P the others; X_S is (T, q').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from secateur.finite import all_finite
from secateur.solvers.ladder import DAMPINGS, MORE_DAMPING, NO_TUNING, climbed
from secateur.statistics import Moments, inner_products, product

#: Pulls to the original weights that are tried, as shares of mean diag H.
PULLS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
#: Of so many rows of a weight one is fitted to find the pull: all share H, and it decides.
ROWS_PER_SAMPLE = 8
#: Rows of a weight that are taken to float64 at a time.
PANEL = 1024


def sample_of_rows(weight: torch.Tensor) -> slice:
    """The rows of W (p, q) by which a pull is judged; all of a small one."""
    return slice(None, None, ROWS_PER_SAMPLE if len(weight) >= 8 * ROWS_PER_SAMPLE else 1)


def fitted_weights(
    weight: torch.Tensor, moments: Moments, kept: torch.Tensor, pull: float
) -> torch.Tensor:
    """V by the cheaper of the two forms; see the module.

    Args:
        weight: W, (p, q).
        moments: of the inputs.
        kept: S, (q',).

    Returns:
        V, (p, q'), float64.
    """
    rows = moments.rows
    if rows is None:
        return refit(weight, moments.covariance, kept, pull)
    fit = OfFew(weight, rows, kept)
    del rows  # which may be a copy
    return fit.fit(pull)


def relative_error(
    weight: torch.Tensor, moments: Moments, kept: torch.Tensor, new: torch.Tensor
) -> float:
    """E||V x_S - W x||^2 as a share of E||W x||^2."""
    rows = moments.rows
    if rows is None:
        return output_error(weight, moments.covariance, kept, new)
    off = whole = 0.0
    inner = rows[:, kept]
    for w, v in zip(weight.split(PANEL), new.split(PANEL), strict=True):
        wanted = product(rows, w.T)
        whole += float(wanted.square().sum())
        off += float((product(inner, v.T) - wanted).square().sum())
    return off / whole if whole > 0 else 0.0


def chosen_pull(
    weight: torch.Tensor,
    fitted: Moments,
    held_out: Moments,
    kept: torch.Tensor,
    pulls: Sequence[float] = PULLS,
) -> float | None:
    """The pull whose fit on one part of the tokens is best on the other; None: no fit is.

    It is looked for with some of the rows of ``weight`` (:func:`sample_of_rows`).
    """
    weight = weight[sample_of_rows(weight)]
    rows, others = fitted.rows, held_out.rows
    if rows is None or others is None:
        return best_pull(weight, fitted.covariance, held_out.covariance, kept, pulls)
    here = OfFew(weight, rows, kept)
    del rows  # which may be a copy
    there = _put_out_by_others(weight, others, kept)
    best, least = None, float(there.square().sum())
    across = here.products_with(others[:, kept])
    for pull in pulls:
        found = float((here.made_up(pull, across) - there).square().sum())
        if found < least:
            best, least = pull, found
    return best


def _put_out_by_others(
    weight: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """W_P x_P of tokens (T, q) with P the inputs that are not kept, (p, T), float64."""
    went = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    went[kept] = False
    return product(weight[:, went], rows[:, went].T)


def bytes_of_few(rows: int, inputs: int, tokens: int) -> int:
    """What :class:`OfFew` holds of a layer (p, q) at most while it makes V.

    W_S, X_S, R, what it is solved to and the products of tokens; besides, first the factor of those
    and the system's right side once more, later V in float32 and float64 and what it is made of.
    """
    kept = 4 * rows * inputs + 4 * tokens * inputs + 16 * rows * tokens + 8 * tokens**2
    return kept + max(8 * tokens**2 + 8 * rows * tokens, 12 * rows * inputs + 4 * rows * tokens)


class OfFew:
    """The fit from fewer tokens than inputs.

    Args:
        weight: W, (p, q).
        rows: X, (T, q).
        kept: S, (q',).

    Attributes:
        lost: R, what the inputs that went put out, (p, T), float64.
    """

    def __init__(self, weight: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor) -> None:
        self._own = weight[:, kept]
        self._x = rows[:, kept]
        self.lost = _put_out_by_others(weight, rows, kept)
        self._inner = inner_products(self._x)

    def fit(self, pull: float) -> torch.Tensor:
        """V, (p, q'), float64."""
        step = self._solved(pull)
        return self._own.double() if step is None else product(step, self._x).add_(self._own)

    def products_with(self, others: torch.Tensor) -> torch.Tensor:
        """X_S X'_S^T with other tokens (T', q'), (T, T'), float64: the same for every pull."""
        return product(self._x, others.T)

    def made_up(self, pull: float, across: torch.Tensor) -> torch.Tensor:
        """What the step from W_S puts out for other tokens, (p, T'), float64.

        Args:
            across: :meth:`products_with` them.
        """
        step = self._solved(pull)
        return across.new_zeros(len(self.lost), across.shape[1]) if step is None else step @ across

    def _solved(self, pull: float) -> torch.Tensor | None:
        """R (X_S X_S^T + s T I)^-1, (p, T)."""
        tokens, inputs = self._x.shape
        mean = self._inner.trace() / (tokens * inputs)
        first = tokens * (float(pull * mean) if bool(mean > 0) else 1.0)

        def solved(step: float) -> torch.Tensor | None:
            # By columns, as LAPACK wants it, so that the factor takes the place of the matrix.
            matrix = torch.empty_like(self._inner).mT.copy_(self._inner)
            matrix.diagonal().add_(first * step)
            info = torch.empty((), dtype=torch.int32, device=matrix.device)
            factor, info = torch.linalg.cholesky_ex(matrix, out=(matrix, info))
            return None if int(info) else torch.cholesky_solve(self.lost.T, factor).T

        return with_a_pull(pull, solved)


class OfMany:
    """The fit from the second moment, as the step D = V - W_S; what all pulls share is made once.

        D = C (H_SS + s I)^-1,   C = W_P H_PS

    Args:
        weight: W, (p, q).
        second: H, (q, q), float64.
        kept: S, (q',).
    """

    def __init__(self, weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor) -> None:
        went = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        went[kept] = False
        self._gone = weight[:, went].double()
        self._below = second[went]
        self._went = went
        self._inner = second[kept][:, kept]
        self._diagonal = self._inner.diagonal().clone()
        self.lost = self._gone @ self._below[:, kept]  # C

    def step(self, pull: float) -> torch.Tensor | None:
        """D, (p, q'), float64; None where nothing can be solved."""
        mean = self._diagonal.mean()
        first = float(pull * mean) if bool(mean > 0) else 1.0

        def solved(step: float) -> torch.Tensor | None:
            self._inner.diagonal().copy_(self._diagonal + first * step)
            factor, info = torch.linalg.cholesky_ex(self._inner)
            if int(info) != 0:
                return None
            half = torch.linalg.solve_triangular(factor, self.lost.T, upper=False)
            return torch.linalg.solve_triangular(factor.T, half, upper=True).T

        return with_a_pull(pull, solved)

    def loss(self, step: torch.Tensor | None) -> float:
        """E||D x_S - W_P x_P||^2, with D or with none."""
        if step is None:
            return self._unfitted
        self._inner.diagonal().copy_(self._diagonal)
        return self._unfitted + float((step @ self._inner - 2 * self.lost).mul(step).sum())

    @cached_property
    def _unfitted(self) -> float:
        """E||W_P x_P||^2, which all pulls begin from."""
        return float((self._gone @ self._below[:, self._went]).mul(self._gone).sum())


def refit(
    weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, pull: float
) -> torch.Tensor:
    """V from H (q, q), float64; see :func:`fitted_weights`."""
    step = OfMany(weight, second, kept).step(pull)
    own = weight[:, kept].double()
    return own if step is None else own + step


def with_a_pull(pull: float, solved: Callable[[float], torch.Tensor | None]) -> torch.Tensor | None:
    """What a fit gives with the pull times the first step of the ladder at which it is finite.

    Damping is the pull here: the more of it, the less is fitted.
    """
    for step in DAMPINGS:
        found = solved(step)
        if found is not None and all_finite(found):
            if step > 1:
                climbed(MORE_DAMPING, f"a pull of {pull * step:g}")
            return found
    climbed(NO_TUNING)
    return None


def output_error(
    weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, new: torch.Tensor
) -> float:
    """:func:`relative_error` from H."""
    w = weight.to(torch.float64)
    whole = float((w @ second).mul(w).sum())
    off = OfMany(weight, second, kept).loss(new - w[:, kept])
    return off / whole if whole > 0 else 0.0


def best_pull(
    weight: torch.Tensor,
    fitted: torch.Tensor,
    held_out: torch.Tensor,
    kept: torch.Tensor,
    pulls: Sequence[float] = PULLS,
) -> float | None:
    """:func:`chosen_pull` from H of the two parts, (q, q)."""
    here, there = OfMany(weight, fitted, kept), OfMany(weight, held_out, kept)
    best, least = None, there.loss(None)
    for pull in pulls:
        found = there.loss(here.step(pull))
        if found < least:
            best, least = pull, found
    return best
