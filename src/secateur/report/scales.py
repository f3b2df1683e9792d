"""From values to places on paper, and the round numbers beside an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` laid out from ``start`` to ``end``, in pixels.

    Attributes:
        ticks: values that get a mark, rising.
        log: whether equal factors, rather than equal differences, are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where ``value`` is, in pixels, to a tenth."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def texts(self) -> list[tuple[float, str]]:
        """Place and text of every tick, with as many digits as say it in full."""
        if self.log:  # of 0.02, 0.1, 1 each with its own digits
            return [(self.at(t), _short(t)) for t in self.ticks]
        digits = 0
        while digits < 12 and any(float(f"{t:.{digits}f}") != t for t in self.ticks):
            digits += 1
        return [(self.at(t), f"{t:,.{digits}f}") for t in self.ticks]


def _short(value: float) -> str:
    """A tick of a scale of factors; what would be wider than an axis has room for by its unit."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(unit, 1e5):
            return f"{value / unit:,.6g}{name}"
    return f"{value:,.12f}".rstrip("0").rstrip(".")


def linear(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Scale:
    """A scale that holds ``values`` and ends at round numbers.

    Args:
        zero: whether it begins at 0.
    """
    low, high = min(values), max(values)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _round_step((high - low) / 4)
    # A twentieth of a step may stick out: 30.06 needs no axis up to 40.
    first, last = math.floor(low / step + 0.05), math.ceil(high / step - 0.05)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale of factors that holds ``values``, which must be above 0; linear where it is narrow.

    Marks are at 1, 2 and 5 times powers of ten.
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 1.5, high * 1.5
    low, high = low / (high / low) ** 0.06, high * (high / low) ** 0.04
    marks = [
        m * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    ticks = tuple(t for t in marks if low <= t <= high)
    if len(ticks) < 3:
        plain = linear([low, high], start, end)
        ticks = tuple(t for t in plain.ticks if low <= t <= high)
    if len(ticks) > 7:
        ticks = tuple(t for t in ticks if f"{t:e}".startswith("1"))
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
    return Scale(low, high, start, end, ticks, log=True)


def _round_step(step: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))
