"""How long the rest of a comparison will take, by what its finished cells took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from secateur.comparison.cells import Cell

Result = Mapping[str, Any]


def seconds_left(
    cells: Sequence[Cell], results: Mapping[str, Result], earlier: Mapping[str, Result]
) -> float | None:
    """Seconds by the mean of a setting's finished cells, or of all; one cell at a time.

    Args:
        cells: of this command.
        results: of those that are finished or have failed, with ``wall``, their seconds in all.
        earlier: of those that an earlier command measured and this one measures further; they are
            expected to take as long as others of their kind.

    Returns:
        None where nothing is left, or nothing finished to go by.
    """
    spent: dict[tuple[bool, str], list[float]] = {}
    for cell in cells:
        found, before = results.get(cell.name, {}), earlier.get(cell.name)
        if "wall" in found:
            took = found["wall"] - (before["wall"] if before else 0.0)
            spent.setdefault((before is not None, cell.label), []).append(took)
    ahead = [cell for cell in cells if cell.name not in results]
    if not spent or not ahead:
        return None

    def expected(cell: Cell) -> float:
        kind = cell.name in earlier
        alike = {k: seconds for k, seconds in spent.items() if k[0] == kind} or spent
        every = [one for seconds in alike.values() for one in seconds]
        return mean(spent.get((kind, cell.label), every))

    return sum(map(expected, ahead))
