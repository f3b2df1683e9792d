"""A comparison, cell by cell, each in a process of its own; a killed one continues."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.calibration import BUILTIN
from secateur.checkpoint import local_path
from secateur.comparison.cells import Cell, make_cells
from secateur.comparison.folder import DENSE, Folder
from secateur.comparison.formats import write_tables
from secateur.comparison.measuring import Measuring, Told
from secateur.comparison.table import Table, make_table
from secateur.comparison.time_left import seconds_left
from secateur.errors import RecipeError, SecateurError, one_line
from secateur.executors import Asked, Executor, Pool, opened_executor
from secateur.progress import Progress
from secateur.workers import Worker


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        out: its folder, with ``compare.md``, ``compare.csv``, ``compare.json``, ``report.html``.
        table: what they hold.
        failed: one line for each cell that failed, by the cell's name.
        notes: what the user should know besides.
    """

    out: Path
    table: Table
    failed: dict[str, str]
    notes: list[str]


def compare(
    source: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = (),
    recipes: Sequence[str | Path] = (),
    remove: Sequence[str] = (),
    sparsity: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    texts: Sequence[str] = (),
    text_field: str = "text",
    data_dir: str | Path | None = None,
    windows: int | None = 10,
    window_length: int = 1024,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    keep: bool = False,
    device: str = "cpu",
    max_memory: str | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **fields: Any,
) -> Comparison:
    """Prune ``source`` in several ways and lay the results side by side, the dense model first.

    Every cell (setting x share x seed) is made by :func:`secateur.prune` and measured from the
    files that it wrote, in a process of its own. A finished cell is never run again: the same call
    continues, and one with more methods, shares or seeds adds to it. A cell that fails becomes a
    row with its reason.

    Args:
        source: the model: folder, GGUF file or hub id.
        out: folder of the comparison.
        methods, recipes, remove, sparsity, seeds, fields: the cells, see
            :func:`~secateur.comparison.cells.make_cells`; ``fields`` are those of a recipe that
            hold for all: ``of``, ``calibration``, ``options``, ``layout``.
        texts: evaluation texts besides the built-in passages: named sets, or text or JSONL files.
        text_field, data_dir: as for :func:`secateur.evaluate`, and for calibration too; the tasks'
            files are looked for in ``data_dir`` as :func:`secateur.zero_shot` does.
        windows: consecutive windows from the start of each text; None for all.
        window_length: tokens a window; capped at the model's positions.
        tasks: zero-shot tasks, on which each model is scored as by :func:`secateur.zero_shot`,
            whole in memory. Tasks that are added to a comparison are asked of its finished cells
            too, whose models are made again where they did not stay.
        limit: the first items of each task, for mmlu of each subject; None for all.
        keep: let the models stay in ``out/models``.
        device, max_memory, trust_remote_code: as for :func:`secateur.prune`.
        workers, cluster: cells that are made and measured at a time, and where; they share out the
            threads and ``max_memory``, and seconds are those of cells that had others beside them.

    Raises:
        SecateurError: for everything that a user can mend before any cell is run, or that spoils
            the dense model.
    """
    names = _checked(tasks, limit)
    where = {"text_field": text_field, "data_dir": None if data_dir is None else str(data_dir)}
    given = {name: value for name, value in where.items() if value not in (None, "text")}
    fields["calibration"] = {**given, **fields.get("calibration", {})}
    cells = make_cells(
        methods=methods, recipes=recipes, remove=remove, sparsity=sparsity, seeds=seeds, **fields
    )
    with Folder(local_path(out), local_path(source)) as folder:
        for cell in cells:
            folder.check(cell)
        with opened_executor(workers, cluster) as executor:
            measuring = Measuring(
                str(source),
                folder,
                reading={"length": window_length, "windows": windows, **where},
                tasks=names,
                limit=limit,
                keep=keep,
                max_memory=max_memory,
                common={"device": device, "trust_remote_code": trust_remote_code},
                beside=1 if executor is None else executor.on_one_machine,
            )
            run = _Run(folder, cells, measuring, progress or Progress(), executor)
            run.dense(list(dict.fromkeys([BUILTIN, *texts])))
            run.all_cells()
        folder.tidy()
        return run.finished()


def _checked(tasks: Sequence[str] | None, limit: int | None) -> list[str]:
    """The zero-shot tasks, each once."""
    if tasks is not None:
        from secateur.evaluation.zero_shot import check_tasks

        return check_tasks(tasks, limit)
    if limit is not None:
        raise RecipeError(
            f"--limit {limit} is of zero-shot tasks, and none is named: add --tasks boolq,piqa, or "
            "leave it out"
        )
    return []


class _Run:
    """What the steps of one comparison share."""

    def __init__(
        self,
        folder: Folder,
        cells: list[Cell],
        measuring: Measuring,
        progress: Progress,
        executor: Executor | None,
    ) -> None:
        self.folder = folder
        self.cells = cells
        self.measuring = measuring
        self.progress = progress
        self.executor = executor
        self.results: dict[str, dict[str, Any]] = {}
        #: Of cells that earlier commands finished, but did not ask all that this one asks.
        self.earlier: dict[str, dict[str, Any]] = {}
        #: What is being done for cells that are made side by side, for the one line that shows it.
        self.at_work: dict[str, str] = {}
        for cell in cells:
            found = folder.find(cell.name)
            if found is not None and "failed" not in found:
                known = self.earlier if measuring.unscored(found) else self.results
                known[cell.name] = found

    def dense(self, texts: list[str]) -> None:
        """Look at the source and the texts, and measure the dense model unless it is known."""
        measuring = self.measuring
        with self._worker("the dense model") as worker:
            measuring.look(worker, texts)
            self.folder.agree(measuring.settings)
            found = self.folder.find(DENSE)
            if found is None or measuring.unscored(found):
                self.progress.note(f"dense: {measuring.source}")
            dense = measuring.measure_dense(worker, found, self._shown("dense"))
            if dense != found:
                self.folder.keep(DENSE, dense)
        self.results[DENSE] = dense
        known = sum(cell.name in self.results for cell in self.cells)
        if known:
            self.progress.note(f"continuing: {known} of {len(self.cells)} cells are finished")
        if self.earlier:
            again = sum(self.folder.kept(c) is None for c in self.cells if c.name in self.earlier)
            self.progress.note(
                f"measured before without all of these tasks: {_counted(self.earlier, 'cell')}, "
                f"of which {again} must be pruned again (--keep lets models stay)"
            )

    def all_cells(self) -> None:
        """Make and measure those that are not finished; the tables are written anew after each."""
        ahead = [cell for cell in self.cells if cell.name not in self.results]
        if self.executor is None:
            for cell in ahead:
                self._take(cell, self._made(cell, self._shown(self._who(cell))))
            return
        workers, progress = self.executor.workers, self.progress
        progress.stage(f"cells, {workers} at a time", len(ahead))
        idle = lambda: progress.step("; ".join(self.at_work.values()), steps=0)  # noqa: E731
        with Pool(workers, self._beside, end=self.executor.close, idle=idle) as pool:
            for cell in ahead:
                pool.give(cell)
            for cell, result in pool.rest():
                self.at_work.pop(cell.name, None)
                self._take(cell, result)
                progress.step(cell.label)
        progress.finish()

    def _beside(self, cell: Cell) -> dict[str, Any]:
        """One cell in a thread: what its process tells is noted, and shown by the main thread."""

        def told(event: Mapping[str, Any]) -> None:
            done = f"{event['done']}/{event['total']}"
            self.at_work[cell.name] = f"{cell.label} {cell.asked}: {event['stage']} {done}"

        return self._made(cell, told)

    def _made(self, cell: Cell, told: Told) -> dict[str, Any]:
        """What is known of a cell when it is finished, or why it failed."""
        self.folder.write_recipe(cell)
        began = time.monotonic()
        try:
            with self._worker(self._who(cell)) as worker:
                known = self.earlier.get(cell.name)
                measured = self.measuring.measure_cell(worker, cell, known, told)
        except SecateurError as error:
            return {"failed": one_line(error)[0]}
        return {**measured, "wall": measured.get("wall", 0.0) + time.monotonic() - began}

    def _take(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Remember a finished cell."""
        if "failed" in result and self.executor is None:
            self.progress.finish()
        result = {
            "label": cell.label,
            "asked": cell.asked,
            "seed": cell.recipe.seed,
            "recipe": json.loads(cell.recipe.model_dump_json()),
            **result,
        }
        if "failed" not in result or cell.name not in self.earlier:
            self.folder.keep(cell.name, result)  # else what is known is worth more
        self.results[cell.name] = result
        self.write()
        self.progress.note(self._line(cell, result))

    def _place(self, cell: Cell) -> str:
        return f"[{self.cells.index(cell) + 1}/{len(self.cells)}] {cell.label}, {cell.asked}"

    def _who(self, cell: Cell) -> str:
        several = len({one.recipe.seed for one in self.cells}) > 1
        return self._place(cell) + (f", seed {cell.recipe.seed}" if several else "")

    def _worker(self, what: str) -> AbstractContextManager[Asked]:
        module, what = "secateur.comparison.worker", f"the process of {what}"
        return self.executor.working(module, what) if self.executor else Worker(module, what)

    def _shown(self, who: str) -> Told:
        """Shows what a process tells of its stages as our own."""
        progress = self.progress

        def told(event: Mapping[str, Any]) -> None:
            progress.memory = lambda: int(event["memory"])
            if event["last"]:
                progress.finish()
            elif event["done"] == 0:
                progress.stage(f"{who}: {event['stage']}", event["total"])
            else:
                progress.step(event["detail"])

        return told

    def _line(self, cell: Cell, result: Mapping[str, Any]) -> str:
        """What a finished cell says, and how long the rest will take."""
        parts = [self._place(cell), f"seed {cell.recipe.seed}"]
        if "failed" in result:
            parts.append(f"failed: {result['failed']}")
        else:
            parts += [f"{text} {value:.2f}" for text, value in result["perplexity"].items()]
            scores = result.get("scores", {})
            parts += [f"{task} {scores[task]['acc']:.1%}" for task in self.measuring.tasks]
            parts.append(f"{result['wall']:.0f} s")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{left:.0f} s left")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """None with nothing to go by."""
        alone = seconds_left(self.cells, self.results, self.earlier)
        return alone and alone / (self.executor.workers if self.executor else 1)

    def write(self) -> Table:
        """The tables and the page, of what is known so far."""
        table = make_table(self.measuring.settings, self.cells, {**self.earlier, **self.results})
        write_tables(self.folder.path, table)
        return table

    def finished(self) -> Comparison:
        keep, source = self.measuring.keep, self.measuring.source
        names = {cell.name for cell in self.cells}
        failed = {n: r["failed"] for n, r in self.results.items() if "failed" in r}
        notes = []
        cells = self.folder.path / "cells"
        others = {path.stem for path in cells.glob("*.json")} - names - {DENSE}
        if others:
            notes.append(
                f"not in this table are {_counted(others, 'cell')} of earlier commands; name "
                "their methods, shares and seeds too to have them in it"
            )
        made = sorted((c for c in self.cells if c.name not in failed), key=lambda c: c.name)
        gone = [c.name for c in made if self.folder.kept(c) is None] if keep else []
        if gone:
            notes.append(
                f"measured before --keep was given, and so not there: {_counted(gone, 'model')}; "
                f"secateur prune {source} --recipe {self.folder.path}/recipes/{gone[0]}.yaml "
                "--out FOLDER makes the first of them"
            )
        return Comparison(self.folder.path, self.write(), failed, notes)


def _counted(things: Collection[str], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) > 1 else ''}"
