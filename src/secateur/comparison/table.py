"""The table of a comparison: cells by setting and share, seeds put together.

A further measure needs a :class:`Column` and its number in :func:`measures`, both in this file;
Markdown, CSV, JSON and the page follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from secateur.comparison.cells import Cell
from secateur.comparison.folder import DENSE

Result = Mapping[str, Any]
#: Key of the mean of ``acc`` over the tasks.
MEAN = "acc mean"


@dataclass(frozen=True)
class Column:
    """One measure.

    Attributes:
        key: its name in CSV and JSON.
        title: its head in Markdown and on the page, with the unit.
        digits: behind the point, in the unit of the title.
        scale: what a stored number is multiplied with to be in that unit.
    """

    key: str
    title: str
    digits: int = 0
    scale: float = 1.0

    def text(self, value: float) -> str:
        return f"{value * self.scale:,.{self.digits}f}"


@dataclass(frozen=True)
class Spread:
    """The median over seeds, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def texts(self, column: Column) -> tuple[str, str]:
        """``50.20`` and ``(49.81–51.02)``; the latter empty where seeds show no difference."""
        middle, low, high = (column.text(v) for v in (self.median, self.low, self.high))
        return middle, "" if low == high else f"({low}–{high})"

    def text(self, column: Column) -> str:
        """``50.20``, or ``50.20 (49.81–51.02)``."""
        return " ".join(self.texts(column)).rstrip()


@dataclass(frozen=True)
class Row:
    """One setting at one share.

    Attributes:
        label: the setting: a method, or a recipe's file; ``dense``.
        asked: what was to go.
        seeds: of the cells that were measured.
        values: by the key of the column, of those cells.
        failed: reason by seed of the cells that failed.
        waiting: seeds of cells that have not been run yet.
    """

    label: str
    asked: str
    seeds: tuple[int, ...] = ()
    values: Mapping[str, Spread] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    waiting: tuple[int, ...] = ()

    def texts(self, columns: Sequence[Column]) -> list[str]:
        """The numbers as they are shown; empty where there is none."""
        return [
            self.values[column.key].text(column) if column.key in self.values else ""
            for column in columns
        ]

    def remarks(self) -> list[str]:
        """What the numbers do not say, by seed where there are several."""
        count = len(self.seeds) + len(self.failed) + len(self.waiting)

        def of(seeds: Sequence[int], text: str) -> str:
            if len(seeds) == count:
                return text
            return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} {text}"

        reasons: dict[str, list[int]] = {}
        for seed, why in self.failed.items():
            reasons.setdefault(why, []).append(seed)
        found = [of(seeds, f"failed: {why}") for why, seeds in reasons.items()]
        return [*found, of(self.waiting, "not run yet")] if self.waiting else found


@dataclass(frozen=True)
class Table:
    """A comparison as far as it has come.

    Attributes:
        settings: under which all cells were measured: source, evaluation, versions, threads.
        columns, rows: the table; the first row is the dense model.
        cells: what is known of each cell that has been run, in the order of the rows.
    """

    settings: Mapping[str, Any]
    columns: list[Column]
    rows: list[Row]
    cells: list[dict[str, Any]]


def make_table(
    settings: Mapping[str, Any], cells: Sequence[Cell], results: Mapping[str, Result]
) -> Table:
    """The table of these cells; those without a result are still to come."""
    columns = make_columns(settings, results)
    tasks = list(settings.get("tasks", {}))
    of_dense = measures(results[DENSE], tasks)
    dense = {"share_removed": 0.0, "decoder_share_removed": 0.0, **of_dense}
    rows = [Row("dense", "", values={k: Spread.of([v]) for k, v in dense.items()})]
    about = {"name": DENSE, "label": "dense", **scores(results[DENSE], tasks)}
    known: list[dict[str, Any]] = [{**about, "measures": dense}]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for target in dict.fromkeys(cell.asked for cell in cells):
        for cell in cells:
            if cell.asked == target:
                groups.setdefault((cell.label, target), []).append(cell)
    for (label, asked), members in groups.items():
        rows.append(_row(label, asked, members, results, tasks))
        for cell in members:
            if (result := results.get(cell.name)) is not None:
                numbers = {} if "failed" in result else measures(result, tasks)
                kept = {k: v for k, v in result.items() if k not in _IN_MEASURES}
                kept |= scores(result, tasks)
                known.append({"name": cell.name, **kept, "measures": numbers})
    return Table(settings, columns, rows, known)


#: Fields of a result that stand among its measures.
_IN_MEASURES = {
    "share_removed", "decoder_share_removed", "zeros", "perplexity", "seconds", "peak_memory",
    "gpu_peak_memory", "wall", "scores",
}  # fmt: skip


def scores(result: Result, tasks: Sequence[str]) -> dict[str, Any]:
    """What is known of these zero-shot tasks, errors and items too, as a field of its own."""
    found = {task: one for task, one in result.get("scores", {}).items() if task in tasks}
    return {"scores": found} if found else {}


def measures(result: Result, tasks: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of one measured cell by the key of their column.

    Args:
        tasks: zero-shot tasks that are shown; accuracies are from 0 to 1.
    """
    plain = ("share_removed", "decoder_share_removed", "zeros", "seconds", "peak_memory",
             "gpu_peak_memory")  # fmt: skip
    found = {key: float(result[key]) for key in plain if key in result}
    for text, value in result["perplexity"].items():
        found[f"perplexity {text}"] = float(value)
    scored = scores(result, tasks).get("scores", {})
    for task, one in scored.items():
        found |= {f"{k} {task}": one[k] for k in ("acc", "acc_norm") if one[k] is not None}
    if len(tasks) > 1 and len(scored) == len(tasks):
        found[MEAN] = mean(one["acc"] for one in scored.values())
    return found


def make_columns(settings: Mapping[str, Any], results: Mapping[str, Result]) -> list[Column]:
    """The columns of a comparison: shares, quality, cost."""
    zeros = any("zeros" in result for result in results.values())
    columns = [
        Column("share_removed", "removed of all, %", 2, 100),
        Column("decoder_share_removed", "of the decoder, %", 2, 100),
        *([Column("zeros", "zeros in the decoder, %", 2, 100)] if zeros else []),
        *(
            Column(f"perplexity {text}", f"perplexity, {short_name(text)}", 2)
            for text in settings["evaluation"]
        ),
        *_accuracies(list(settings.get("tasks", {})), results[DENSE]),
        Column("seconds", "to prune, s"),
        Column("peak_memory", "peak memory, MiB", 0, 1 / 2**20),
    ]
    if any("gpu_peak_memory" in result for result in results.values()):
        columns.append(Column("gpu_peak_memory", "GPU memory, MiB", 0, 1 / 2**20))
    return columns


def _accuracies(tasks: Sequence[str], dense: Result) -> list[Column]:
    """In percent: of each task, and the mean where there are several."""
    found = []
    for task in tasks:
        found.append(Column(f"acc {task}", f"{task} acc, %", 1, 100))
        if dense["scores"][task]["acc_norm"] is not None:
            found.append(Column(f"acc_norm {task}", f"{task} acc_norm, %", 1, 100))
    if len(tasks) > 1:
        found.append(Column(MEAN, "mean acc, %", 1, 100))
    return found


def short_name(text: str) -> str:
    """A text as the head of a column: a file without its folder."""
    return Path(text).name


def _row(
    label: str,
    asked: str,
    members: Sequence[Cell],
    results: Mapping[str, Result],
    tasks: Sequence[str],
) -> Row:
    good: dict[int, dict[str, float]] = {}
    failed: dict[int, str] = {}
    waiting: list[int] = []
    for cell in members:
        result, seed = results.get(cell.name), cell.recipe.seed
        if result is None:
            waiting.append(seed)
        elif "failed" in result:
            failed[seed] = result["failed"]
        else:
            good[seed] = measures(result, tasks)
    keys = dict.fromkeys(key for numbers in good.values() for key in numbers)
    values = {key: Spread.of([n[key] for n in good.values() if key in n]) for key in keys}
    return Row(label, asked, tuple(good), values, failed, tuple(waiting))
