"""Seconds of a run by kind of work, and what it took in bytes and operations.

Functions that do one kind of work are wrapped; while one runs inside of another, its time is its
own, so that the kinds add up to the whole. Counts are those of the arguments.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Kind of work: what its counts are.
UNITS = {
    "reading": "bytes read",
    "forward": "float32",
    "statistics": "float32",
    "Gram": "float32",
    "factorisation": "float64",
    "solving": None,
    "writing": "bytes written",
}


@dataclass
class Stages:
    """Seconds, and counts by the unit they are in, of each kind of work."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inner: list[float] = field(default_factory=list)

    def wrap(self, owner: Any, name: str, kind: str, count: Callable[..., float]) -> None:
        """Let a function or method be timed as ``kind``.

        Args:
            count: of the call's result and arguments.
        """
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                found = function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self.seconds[kind] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent
            self.counts[kind] += count(found, *args)
            return found

        setattr(owner, name, timed)

    def watch(self) -> None:
        """Wrap what ``comp`` and ``obs`` spend their time in."""
        from secateur.checkpoint.base import Checkpoint
        from secateur.methods import comp, obs
        from secateur.outputs import hf
        from secateur.solvers import gram, inverses, mask_tuning
        from secateur.statistics import Moments
        from secateur.streaming import Stream

        def nothing(*_: Any) -> float:
            return 0.0

        def part(_: Any, form: Any, rows: Any, columns: Any) -> float:
            tokens = 0 if form._rows is None else len(form._rows)
            return 2.0 * len(rows) * len(columns) * (len(form._weight) + tokens)

        def forward(_: Any, stream: Any, __: int, ___: Any, batch: Any) -> float:
            return 2.0 * batch.shape[:2].numel() * stream.anatomy.block_parameters

        def factor(_: Any, matrix: Any) -> float:
            return len(matrix) ** 3 / 3

        def moments(_: Any, own: Any, x: Any) -> float:
            return 0.0 if own._second is None else x.numel() * float(x.shape[-1])

        self.wrap(Checkpoint, "read", "reading", lambda out, *_: 2.0 * out.numel())
        self.wrap(Stream, "call_block", "forward", forward)
        self.wrap(Moments, "add", "statistics", moments)
        self.wrap(gram.GramForm, "_part", "Gram", part)
        for module in (inverses, mask_tuning):
            self.wrap(module, "cholesky_in_place", "factorisation", factor)
        for owner in (comp.MaskCurve, obs.GreedyOrder, obs.Fit):
            self.wrap(owner, "__init__", "solving", nothing)
        self.wrap(obs.GreedyOrder, "_step", "solving", nothing)
        self.wrap(obs.Fit, "finish", "solving", nothing)
        self.wrap(inverses.InverseOfFew, "__init__", "solving", nothing)
        self.wrap(hf, "write_block", "writing", nothing)
        self.wrap(hf, "write_tensors", "writing", _size)


def _size(_: Any, __: Any, tensors: Any) -> float:
    return float(sum(tensor.nbytes for tensor in tensors.values()))


def floor(kind: str, count: float, rates: dict[str, float]) -> float | None:
    """Least seconds for a count at the measured rate; None where there is none."""
    unit = UNITS[kind]
    return count / rates[unit] if unit is not None and count else None
