"""Structured Optimal Brain Surgeon: remove inputs of a linear layer for all its rows at once.

W (p, q) reads x with H = E[x x^T]. With the inputs in P gone and all others free to make up for
them, the least error of the output and the compensation that reaches it are (OBS; Hassibi & Stork
1993, for several weights at once e.g. Kurtic et al. 2022)

    L(P) = tr( W_P [Hi_PP]^-1 W_P^T ),      dW = - W_P [Hi_PP]^-1 Hi_P,:        Hi = H^-1

and afterwards Hi loses what P explained: Hi - Hi_:P [Hi_PP]^-1 Hi_P,:. So the greedy order needs
one inverse and its downdates. Which inputs go is decided with little damping; the weights that are
written come from a fit of their own (:mod:`secateur.solvers.refit`): at some thousand tokens the
compensation above would follow noise.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from secateur.solvers.inverses import Inverse
from secateur.solvers.ladder import factors, solve
from secateur.solvers.ladder import inverse as inverse_matrix

#: Weights of a layer from which on they are followed through the removal in float32.
LARGE = 2**24


def bytes_of_few(rows: int, inputs: int, tokens: int) -> int:
    """What :class:`GreedyOrder` holds of a layer (p, q) at most, with the inverse of few tokens.

    That is A in float64, and first the tokens and their products with each other, later W and F of
    half of the inputs. More of them seldom go; then it is more.
    """
    weight = (4 if rows * inputs >= LARGE else 8) * rows * inputs
    making = 4 * tokens * inputs + 8 * tokens**2
    return 8 * tokens * inputs + max(making, weight + 8 * inputs * (inputs // 2))


class GreedyOrder:
    """The order in which pieces of inputs go, and the least error after each step.

    Steps are taken when they are asked for: a layer that loses a quarter of its inputs never pays
    for the rest. Of the inverse only the columns that went are known as they have become,

        Hi now = Hi - F F^T,   F gains  Hi_:P now R  with  R R^T = [Hi_PP now]^-1

    so that r removals cost q r^2 and not r q^2 operations.

    Args:
        weight: W, (p, q).
        inverse: Hi, of the damped H.
        unit: inputs of a piece, which stand together and go together.
        steps: about how many steps all pieces would take; several go in one where there are more.
        scores: f of each piece, (q / unit,), what else speaks for it; None: nothing does.
        part: a of f in what ranks pieces, L^(1 - a) f^a, L being what a removal costs by then.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        inverse: Inverse,
        *,
        unit: int = 1,
        steps: int = 256,
        scores: torch.Tensor | None = None,
        part: float = 0.0,
    ) -> None:
        device = weight.device
        self._unit, self._inverse = unit, inverse
        self._part = part
        self._scores = None if scores is None else _log(scores.to(device)) * part
        self._whole = inverse.energy(weight)
        self._blocks = inverse.blocks(unit)
        # Transposed: what is asked of it, step after step, is the norm of each input's weights. It
        # is read and written whole in every step, which is most of the time of a large layer.
        kind = torch.float32 if weight.numel() >= LARGE else torch.float64
        self._left = weight.T.to(kind).contiguous()
        pieces = len(self._blocks)
        self._together = max(1, pieces // steps)
        self._alive = torch.ones(pieces, dtype=torch.bool, device=device)
        self._factor = torch.empty(0, weight.shape[1], dtype=torch.float64, device=device)
        self._used = 0  # rows of it that are filled
        self._gone: list[torch.Tensor] = []
        self._counts, self._errors = [0], [0.0]

    def kept(self, removed: int) -> torch.Tensor:
        """The inputs left when ``removed`` are gone, ascending."""
        self._reach(removed)
        width = len(self._left)
        stays = torch.ones(width, dtype=torch.bool, device=self._left.device)
        if removed:
            stays[self.order[:removed]] = False
        return stays.nonzero()[:, 0]

    def error(self, removed: int) -> float:
        """Least relative squared error of the output with about ``removed`` inputs gone."""
        if removed == 0 or self._whole == 0:
            return 0.0
        self._reach(removed)
        place = min(bisect_left(self._counts, removed), len(self._errors) - 1)
        return self._errors[place] / self._whole

    @property
    def order(self) -> torch.Tensor:
        """Inputs in the order of their removal, as far as it is known; the others behind."""
        rest = self._inputs(self._alive.nonzero()[:, 0])
        return torch.cat([*self._gone, rest])

    def _inputs(self, pieces: torch.Tensor) -> torch.Tensor:
        within = torch.arange(self._unit, device=pieces.device)
        return (pieces[:, None] * self._unit + within).flatten()

    def _reach(self, removed: int) -> None:
        """Take steps until so many inputs are gone; one piece stays."""
        while self._counts[-1] < removed and int(self._alive.sum()) > 1:
            self._step()

    def _step(self) -> None:
        losses = self._losses()
        if self._scores is not None:
            losses = _log(losses).mul_(1 - self._part).add_(self._scores)
        losses[~self._alive] = torch.inf
        left = int(self._alive.sum())
        chosen = losses.argsort(stable=True)[: min(self._together, left - 1)]
        inputs = self._inputs(chosen)
        done = self._factor[: self._used]
        columns = self._inverse.columns(inputs) - done.T @ done[:, inputs]
        block = inverse_matrix(columns[inputs])
        own = self._left[inputs].double()
        taken = block @ own
        self._errors.append(self._errors[-1] + float((taken * own).sum()))
        self._left.addmm_(columns.to(self._left), taken.to(self._left), alpha=-1)
        rows = factors(((block + block.T) / 2)[None])[0].T @ columns.T
        self._remember(rows)
        part = rows.reshape(len(rows), len(self._blocks), self._unit).permute(1, 2, 0)
        self._blocks -= part @ part.mT
        self._blocks[chosen] = torch.eye(self._unit, dtype=part.dtype, device=part.device)
        self._alive[chosen] = False
        self._gone.append(inputs)
        self._counts.append(len(inputs) + self._counts[-1])

    def _remember(self, rows: torch.Tensor) -> None:
        """Add to F^T, whose memory grows by half of what is there."""
        need = self._used + len(rows)
        if need > len(self._factor):
            size = min(self._factor.shape[1], max(need, self._used * 3 // 2))
            grown = self._factor.new_empty(size, self._factor.shape[1])
            grown[: self._used] = self._factor[: self._used]
            self._factor = grown
        self._factor[self._used : need] = rows
        self._used = need

    def _losses(self) -> torch.Tensor:
        """L of each piece alone, (q / unit,)."""
        if self._unit == 1:
            norms = torch.linalg.vector_norm(self._left, dim=1).double()
            return norms.square() / self._blocks[:, 0, 0]
        own = self._left.reshape(len(self._blocks), self._unit, -1).double()
        return (solve(self._blocks, own) * own).sum((1, 2))


def _log(values: torch.Tensor) -> torch.Tensor:
    """Logarithms, of numbers that may be zero."""
    return values.clamp(min=torch.finfo(values.dtype).tiny).log()
