"""Sharing out a budget: among blocks by importance, within a block by a common threshold."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload


def share_out(
    total: int, weights: Mapping[int, float], capacity: Mapping[int, int]
) -> dict[int, int]:
    """Split ``total`` in proportion to ``weights``, none above its ``capacity``.

    COMP's Eq. 10 with its gap filled: what a block cannot take goes to the others in the same
    proportion, until nobody is over (water-filling). The parts are whole and sum to ``total``.

    Args:
        total: parameters to remove.
        weights: positive weight of each block.
        capacity: most that each block can lose.

    Raises:
        ValueError: the capacities together are below ``total``.
    """
    if total > sum(capacity[i] for i in weights):
        raise ValueError("the budget is above what the blocks can lose")
    exact: dict[int, float] = {}
    free = dict(weights)
    left = float(total)
    while free:
        scale = left / sum(free.values())
        full = [i for i, w in free.items() if w * scale >= capacity[i]]
        if not full:
            exact |= {i: w * scale for i, w in free.items()}
            break
        for i in full:
            exact[i] = float(capacity[i])
            left -= capacity[i]
            del free[i]
        left = max(left, 0.0)
    parts = {i: math.floor(v) for i, v in exact.items()}
    # Largest remainders get the parameters lost by rounding down; ties by position.
    for i in sorted(exact, key=lambda i: (parts[i] - exact[i], i))[: total - sum(parts.values())]:
        parts[i] += 1
    return {i: parts[i] for i in weights}


def in_units(parts: Mapping[int, int], unit: int) -> dict[int, int]:
    """``parts`` as multiples of ``unit``, each off by less than one, all together by half of one.

    The running sum is rounded, not each part: rounded one by one, forty blocks could miss the
    budget by twenty units. Equal parts stay equal, though, since blocks of one width open with the
    stock classes, which is worth more than half a unit a block.
    """
    given = [part for part in parts.values() if part]
    if given and max(given) - min(given) <= 1:
        return {name: unit * round(part / unit) for name, part in parts.items()}
    rounded: dict[int, int] = {}
    total = done = 0
    for name, part in parts.items():
        total += part
        rounded[name] = unit * ((2 * total + unit) // (2 * unit)) - done
        done += rounded[name]
    return rounded


def nearest(legal: Sequence[int], wish: float) -> int:
    """The one of some rising numbers that is nearest to ``wish``; the lower of two alike."""
    place = bisect_left(legal, wish)
    around = legal[max(0, place - 1) : place + 1]
    return min(around, key=lambda number: abs(number - wish))


@dataclass(frozen=True)
class Curve:
    """Values of a stopping rule at rising numbers of removed inputs.

    Attributes:
        counts: numbers of removed inputs, rising, the first 0.
        values: the rule's value at each, the first 0.
        legal: counts at which the last step may end, rising, ``counts`` among them; None for all.
    """

    counts: Sequence[int]
    values: Sequence[float]
    legal: Sequence[int] | None = None

    def between(self, low: int, high: int) -> Sequence[int]:
        """Legal counts from ``low`` to ``high``, both among them."""
        if self.legal is None:
            return range(low, high + 1)
        return self.legal[bisect_left(self.legal, low) : bisect_right(self.legal, high)]

    def stop(self, threshold: float) -> int:
        """Place of the first count whose value reaches ``threshold``; the last if none does."""
        for place, value in enumerate(self.values):
            if value >= threshold:
                return place
        return len(self.values) - 1


class LazyValues(Sequence[float]):
    """Values of a rule that are computed when they are first looked at, once each."""

    def __init__(self, rule: Callable[[int], float], counts: Sequence[int]) -> None:
        self._rule = rule
        self._counts = counts
        self._known: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._counts)

    @overload
    def __getitem__(self, place: int) -> float: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[float]: ...
    def __getitem__(self, place: int | slice) -> float | Sequence[float]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        if place not in self._known:
            self._known[place] = self._rule(self._counts[place])
        return self._known[place]


def threshold_search(
    curves: Mapping[str, Curve], removed: Callable[[Mapping[str, int]], int], quota: int
) -> tuple[dict[str, int], float]:
    """COMP's Algorithm 1: raise a common threshold until the layer's share is met.

    Every linear layer removes inputs until its value reaches the threshold. The threshold then
    rises by the smallest step that moves any of them, which is what arbitrarily fine steps would
    do. In the last step the layer that moved is clipped so that the quota is met exactly, up to one
    input.

    Args:
        curves: stopping rule of each linear layer.
        removed: parameters gone for given numbers of removed inputs.
        quota: parameters that must go.

    Returns:
        numbers of removed inputs by layer, and the last threshold.
    """
    places = dict.fromkeys(curves, 0)
    counts = {name: curve.counts[0] for name, curve in curves.items()}
    threshold = 0.0
    while removed(counts) < quota:
        movable = [n for n, c in curves.items() if places[n] < len(c.counts) - 1]
        if not movable:
            break
        threshold = math.nextafter(min(curves[n].values[places[n]] for n in movable), math.inf)
        for name in movable:
            before = counts[name]
            places[name] = curves[name].stop(threshold)
            counts[name] = curves[name].counts[places[name]]
            if removed(counts) >= quota:
                legal = curves[name].between(before, counts[name])
                counts[name] = _clip(counts, name, legal, removed, quota)
                return counts, threshold
    return counts, threshold


def _clip(
    counts: dict[str, int],
    name: str,
    legal: Sequence[int],
    removed: Callable[[Mapping[str, int]], int],
    quota: int,
) -> int:
    """The legal count of ``name`` at which the quota is met most closely."""
    low, high = 0, len(legal) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if removed({**counts, name: legal[middle]}) >= quota:
            high = middle
        else:
            low = middle
    over = removed({**counts, name: legal[high]}) - quota
    under = quota - removed({**counts, name: legal[low]})
    return legal[low] if under < over else legal[high]
