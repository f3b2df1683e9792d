"""How sparse each layer gets when all together have a budget: by error curves, or by outliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from secateur.solvers.gram import cholesky, inverse_of

#: Sparsities at which error curves are taken.
GRID = tuple(step / 100 for step in range(0, 100))
#: Damping of H in the scores of a curve, as a share of mean diag H.
CURVE_DAMPING = 0.01

Counts = dict[int, dict[str, int]]


def error_curve(weight: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Share of the output's energy that is lost at each sparsity of :data:`GRID`, about.

    The loss of single removals, w_j^2 / Hi_jj (APT, Eq. 14 without its half), summed from the
    lowest on: interactions between removed weights are left out.

    Args:
        weight: W, (p, q).
        second: H, (q, q), float64.
    """
    matrix, factor, _ = cholesky(second, CURVE_DAMPING)
    scores = (weight.double().square() / inverse_of(factor).diagonal()).flatten().sort()[0]
    whole = float((weight.double() @ matrix).mul(weight.double()).sum())
    running = torch.cat([scores.new_zeros(1), scores.cumsum(0)])
    places = torch.tensor([round(share * len(scores)) for share in GRID])
    return [float(value) / whole if whole > 0 else 0.0 for value in running[places]]


def outlier_ratio(weight: torch.Tensor, squares: torch.Tensor, times: float) -> float:
    """Share of weights whose |w_ij| ||x_j|| is above ``times`` the layer's mean (OWL, Eq. 2).

    Args:
        weight: W, (p, q).
        squares: E[x_j^2], (q,), float64.
    """
    scores = weight.double().abs() * squares.clamp(min=0).sqrt()
    return float((scores > times * scores.mean()).double().mean())


def by_error(
    surveys: Mapping[int, Any], sizes: Mapping[str, int], share: float, spread: float
) -> Counts:
    """Numbers of zeros such that the curves' errors together are least, within the spread.

    All layers are raised to where one more weight would cost the same, found by bisection on that
    price; what rounding leaves goes to the largest layers.

    Args:
        surveys: curves of :func:`error_curve` by block and layer, times the block's influence.
        sizes: weights of each layer.
        share: of all weights that become zero.
        spread: each layer's sparsity is within this of ``share``.
    """
    places = [(block, name) for block in surveys for name in sizes]
    curves = torch.tensor([surveys[b][n] for b, n in places], dtype=torch.float64)
    weight = torch.tensor([sizes[n] for _, n in places], dtype=torch.float64)
    # Slopes per weight. The curves are sums of sorted scores, so they are convex: slopes rise.
    slopes = curves.diff(dim=1) * (len(GRID)) / weight[:, None]
    low, high = share - spread, share + spread
    grid = torch.tensor(GRID, dtype=torch.float64)

    def at(price: float) -> torch.Tensor:
        steps = (slopes <= price).sum(1)
        return grid[steps].clamp(low, high)

    below, above = 0.0, float(slopes.max()) + 1.0
    for _ in range(200):
        middle = (below + above) / 2
        if float((at(middle) * weight).sum()) < share * float(weight.sum()):
            below = middle
        else:
            above = middle
    # Between the two prices lies the budget; in between, go in proportion.
    lower, upper = at(below), at(above)
    gap = float(((upper - lower) * weight).sum())
    missing = share * float(weight.sum()) - float((lower * weight).sum())
    part = min(max(missing / gap, 0.0), 1.0) if gap > 0 else 0.0
    return _counts(places, lower + part * (upper - lower), sizes, share)


def by_outliers(
    surveys: Mapping[int, Any], sizes: Mapping[str, int], share: float, spread: float
) -> Counts:
    """OWL (Yin et al., ICML 2024): blocks with more outliers get less sparsity.

    A block's ratio D is the mean of its layers'; ratios are scaled to a range of 2 ``spread`` and
    shifted so that the mean sparsity is ``share``.
    """
    ratios = {
        block: sum(found[n] * sizes[n] for n in sizes) / sum(sizes.values())
        for block, found in surveys.items()
    }
    values = torch.tensor(list(ratios.values()), dtype=torch.float64)
    width = float(values.max() - values.min())
    scaled = (values - values.min()) * (2 * spread / width) if width > 0 else values * 0
    shares = (share - scaled + scaled.mean()).tolist()
    places = [(block, name) for block in ratios for name in sizes]
    each = torch.tensor([s for s in shares for _ in sizes], dtype=torch.float64)
    return _counts(places, each, sizes, share)


def _counts(
    places: list[tuple[int, str]], shares: torch.Tensor, sizes: Mapping[str, int], share: float
) -> Counts:
    """Whole numbers that sum to the budget: the running sum is rounded, not each part."""
    exact = torch.tensor([sizes[n] for _, n in places], dtype=torch.float64) * shares
    wanted = round(share * sum(sizes[n] for _, n in places))
    running = exact.cumsum(0)
    total = float(running[-1])
    ends = (running * (wanted / total if total > 0 else 0.0)).round().long()
    found: Counts = {}
    before = 0
    for (block, name), end in zip(places, ends.tolist(), strict=True):
        found.setdefault(block, {})[name] = min(end - before, sizes[name])
        before = end
    return found
