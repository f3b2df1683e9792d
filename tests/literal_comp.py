"""COMP's Algorithm 1 by the letter, slowly: the oracle and the opponent of the fast search.

Every mask is solved anew by LSMR, as the paper does, and nothing is shared with
``secateur.solvers``. Only numpy and scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsmr

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass
class _Dense:
    """State of one linear layer in the loop over v_T.

    Attributes:
        root: A with A^T A = G, (q, q).
        order: inputs, least important first.
        grid: numbers of removed inputs to look at, rising from 0.
        pull: s, the damping in absolute terms.
        place: where on the grid the layer stands.
        spread: Var of the nonzero mask there.
    """

    root: Vector
    order: Indices
    grid: Sequence[int]
    pull: float
    tolerance: float = 1e-13
    place: int = 0
    spread: float = 0.0

    @property
    def removed(self) -> int:
        return self.grid[self.place]

    @property
    def at_end(self) -> bool:
        return self.place == len(self.grid) - 1

    def masks(self, count: int) -> tuple[Indices, Vector]:
        """Kept inputs, ascending, and their tuned mask.

        The deviation d = m - 1 solves min || A_S d - A_R 1 ||^2 + s ||d||^2 with R the removed
        inputs: what they put out has to come from those that are kept.
        """
        gone, kept = self.order[:count], np.sort(self.order[count:])
        if count == 0 or not len(kept):
            return kept, np.ones(len(kept))

        def forward(d: Vector) -> Vector:
            full = np.zeros(len(self.order))
            full[kept] = np.ravel(d)
            return self.root @ full

        def backward(y: Vector) -> Vector:
            return (self.root.T @ np.ravel(y))[kept]

        operator = LinearOperator(
            (len(self.root), len(kept)), matvec=forward, rmatvec=backward, dtype=np.float64
        )
        missing = self.root[:, gone].sum(1)
        deviation = lsmr(
            operator,
            missing,
            damp=math.sqrt(self.pull),
            atol=self.tolerance,
            btol=self.tolerance,
            conlim=0,
            maxiter=20 * len(self.order) + 1000,
        )[0]
        return kept, 1.0 + deviation

    def remove_until(self, threshold: float) -> None:
        """Remove more and more inputs until Var of the nonzero mask reaches ``threshold``."""
        while self.spread < threshold and not self.at_end:
            self.place += 1
            _, mask = self.masks(self.removed)
            self.spread = float(np.var(mask))


def square_root(g: Vector) -> Vector:
    """A with A^T A = G, by eigenvalues."""
    values, vectors = np.linalg.eigh(g)
    root: Vector = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    return root


def literal_neuron_stage(
    grams: Mapping[str, Vector],
    orders: Mapping[str, Indices],
    counts_grid: Mapping[str, Sequence[int]],
    damping: float,
    removed: Callable[[Mapping[str, int]], int],
    quota: int,
    roots: Mapping[str, Vector] | None = None,
    tolerance: float = 1e-13,
    restart: bool = False,
) -> dict[str, tuple[Indices, Vector]]:
    """Algorithm 1 on one block.

    Args:
        grams: G of each linear layer, (q, q).
        orders: its inputs, least important first.
        counts_grid: numbers of removed inputs at which masks are looked at, rising from 0.
        damping: pull of the mask to 1, as a share of mean diag G.
        removed: parameters gone for given numbers of removed inputs.
        quota: parameters that must go.
        roots: A with A^T A = G where it is at hand; else it is computed.
        tolerance: of LSMR, atol and btol.
        restart: begin at c = 0 again whenever v_T rises, as the paper's listing does; the result
            is the same, since the values at a given c do not change.

    Returns:
        kept inputs, ascending, and their tuned mask, for each linear layer.
    """
    denses = {
        name: _Dense(
            roots[name] if roots else square_root(np.asarray(g, dtype=np.float64)),
            np.asarray(orders[name]),
            list(counts_grid[name]),
            # A layer of which nothing comes out keeps its ones under any damping.
            damping * float(np.trace(g)) / len(g) or 1.0,
            tolerance,
        )
        for name, g in grams.items()
    }
    counts = dict.fromkeys(denses, 0)
    while removed(counts) < quota:
        movable = {name: dense for name, dense in denses.items() if not dense.at_end}
        if not movable:
            break
        # The smallest rise of v_T that moves any of them.
        threshold = np.nextafter(min(d.spread for d in movable.values()), np.inf)
        done = False
        for name, dense in movable.items():
            start = counts[name]
            if restart:
                dense.place, dense.spread = 0, 0.0
            dense.remove_until(threshold)
            counts[name] = dense.removed
            if removed(counts) >= quota:
                counts[name] = _closest(counts, name, start, removed, quota)
                done = True
                break
        if done:
            break
    return {name: dense.masks(counts[name]) for name, dense in denses.items()}


def _closest(
    counts: Mapping[str, int],
    name: str,
    start: int,
    removed: Callable[[Mapping[str, int]], int],
    quota: int,
) -> int:
    """One input after the other behind ``start`` until the quota is met, or the step before."""
    count = start
    while removed({**counts, name: count}) < quota:
        count += 1
    if count == start:
        return count
    over = removed({**counts, name: count}) - quota
    short = quota - removed({**counts, name: count - 1})
    return count - 1 if short < over else count
