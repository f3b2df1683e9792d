"""Structured Optimal Brain Surgeon: remove inputs of a linear layer for all its rows at once.

W (p, q) reads x with H = E[x x^T]. With the inputs in P gone and all others free to make up for
them, the least error of the output and the compensation that reaches it are (OBS; Hassibi & Stork
1993, for several weights at once e.g. Kurtic et al. 2022)

    L(P) = tr( W_P [Hi_PP]^-1 W_P^T ),      dW = - W_P [Hi_PP]^-1 Hi_P,:        Hi = H^-1

and afterwards Hi loses what P explained: Hi - Hi_:P [Hi_PP]^-1 Hi_P,:. So the greedy order needs
one inverse and its downdates. Which inputs go is decided with little damping; the weights that are
written come from a fit of their own (:func:`refit`), because at some thousand tokens the
compensation above would follow noise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from secateur.solvers.gram import cholesky, inverse_of
from secateur.solvers.ladder import DAMPINGS, MORE_DAMPING, NO_TUNING, climbed, solve
from secateur.solvers.ladder import inverse as inverse_matrix

#: Pulls to the original weights that are tried, as shares of mean diag H.
PULLS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class GreedyOrder:
    """The order in which pieces of inputs go, and the least error after each step.

    Args:
        weight: W, (p, q).
        second: H, (q, q), float64.
        unit: inputs of a piece, which stand together and go together.
        damping: added to H, as a share of mean diag H.
        steps: about how many steps are taken; several pieces go in one where there are more.
        most: inputs that may go at most; what lies behind is in no particular order.

    Attributes:
        order: inputs in the order of their removal, (q,).
    """

    def __init__(
        self,
        weight: torch.Tensor,
        second: torch.Tensor,
        *,
        unit: int = 1,
        damping: float = 0.01,
        steps: int = 256,
        most: int | None = None,
    ) -> None:
        q = len(second)
        pieces = q // unit
        matrix, factor, _ = cholesky(second, damping)
        inverse = inverse_of(factor)
        left = weight.to(torch.float64).clone()
        self._whole = float((left @ matrix).mul(left).sum())
        alive = torch.ones(pieces, dtype=torch.bool, device=second.device)
        gone: list[torch.Tensor] = []
        self._counts, self._errors = [0], [0.0]
        together = max(1, pieces // steps)
        last = pieces - 1 if most is None else min(pieces - 1, -(-most // unit))
        while (done := int((~alive).sum())) < last:
            losses = _piece_losses(left, inverse, unit)
            losses[~alive] = torch.inf
            chosen = losses.argsort(stable=True)[: min(together, last - done)]
            inputs = (chosen[:, None] * unit + torch.arange(unit, device=second.device)).flatten()
            block = inverse_matrix(inverse[inputs][:, inputs])
            taken = left[:, inputs] @ block
            self._errors.append(self._errors[-1] + float((taken * left[:, inputs]).sum()))
            columns = inverse[:, inputs].clone()
            left -= taken @ columns.T
            inverse -= columns @ block @ columns.T
            # Rounding would leave dust where zeros belong; the removed ones must stay out of it.
            left[:, inputs] = 0
            inverse[inputs] = 0
            inverse[:, inputs] = 0
            inverse[inputs, inputs] = 1
            alive[chosen] = False
            gone.append(inputs)
            self._counts.append(len(inputs) + self._counts[-1])
        rest = alive.nonzero()[:, 0]
        gone.append((rest[:, None] * unit + torch.arange(unit, device=second.device)).flatten())
        self.order = torch.cat(gone)

    def kept(self, removed: int) -> torch.Tensor:
        """The inputs left when ``removed`` are gone, ascending."""
        return self.order[removed:].sort().values

    def error(self, removed: int) -> float:
        """Least relative squared error of the output with about ``removed`` inputs gone."""
        if removed == 0 or self._whole == 0:
            return 0.0
        place = min(bisect_left(self._counts, removed), len(self._errors) - 1)
        return self._errors[place] / self._whole


def _piece_losses(weight: torch.Tensor, inverse: torch.Tensor, unit: int) -> torch.Tensor:
    """L of each piece alone, (q / unit,)."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    pieces = len(inverse) // unit
    blocks = inverse.reshape(pieces, unit, pieces, unit).diagonal(dim1=0, dim2=2)  # (u, u, n)
    own = weight.reshape(len(weight), pieces, unit).permute(1, 2, 0)  # (n, unit, p)
    solved = solve(blocks.permute(2, 0, 1), own)
    return (solved * own).sum((1, 2))


def refit(
    weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, pull: float
) -> torch.Tensor:
    """Weights of the kept inputs that come nearest to the output of all of them.

    min_V E||V x_S - W x||^2 + s ||V - W_S||^2 with s = ``pull`` * mean diag H, so

        V = (W H_:S + s W_S) (H_SS + s I)^-1

    Args:
        weight: W, (p, q).
        second: H, (q, q), float64.
        kept: S, (q',).

    Returns:
        V, (p, q'), float64; W_S itself where no pull makes the fit one.
    """
    w = weight.to(torch.float64)
    inner = second[kept][:, kept].clone()
    mean = inner.diagonal().mean()
    first = float(pull * mean) if bool(mean > 0) else 1.0
    before = 0.0
    for step in DAMPINGS:  # damping is the pull here: the more of it, the less is fitted
        s = first * step
        inner.diagonal().add_(s - before)
        before = s
        factor, info = torch.linalg.cholesky_ex(inner)
        if int(info) != 0:
            continue
        right = w @ second[:, kept] + s * w[:, kept]
        half = torch.linalg.solve_triangular(factor, right.T, upper=False)
        found = torch.linalg.solve_triangular(factor.T, half, upper=True).T
        if bool(torch.isfinite(found).all()):
            if step > 1:
                climbed(MORE_DAMPING, f"a pull of {pull * step:g}")
            return found
    climbed(NO_TUNING)
    return w[:, kept]


def output_error(
    weight: torch.Tensor, second: torch.Tensor, kept: torch.Tensor, new: torch.Tensor
) -> float:
    """E||V x_S - W x||^2 as a share of E||W x||^2."""
    w = weight.to(torch.float64)
    difference = -w
    difference[:, kept] += new
    whole = float((w @ second).mul(w).sum())
    return float((difference @ second).mul(difference).sum()) / whole if whole > 0 else 0.0


def best_pull(
    weight: torch.Tensor,
    fitted: torch.Tensor,
    held_out: torch.Tensor,
    kept: torch.Tensor,
    pulls: Sequence[float] = PULLS,
) -> float | None:
    """The pull whose fit on one part of the tokens is best on the other; None: no fit is.

    Args:
        fitted, held_out: H of the two parts, (q, q).
    """
    best, least = None, output_error(weight, held_out, kept, weight[:, kept].to(torch.float64))
    for pull in pulls:
        found = output_error(weight, held_out, kept, refit(weight, fitted, kept, pull))
        if found < least:
            best, least = pull, found
    return best
