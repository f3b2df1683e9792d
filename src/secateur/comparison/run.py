"""A comparison, cell by cell, each in a process of its own; a killed one continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.calibration import BUILTIN
from secateur.checkpoint import local_path
from secateur.checkpoint.writer import JOURNAL, work_folder
from secateur.comparison.cells import Cell, make_cells
from secateur.comparison.folder import DENSE, Folder
from secateur.comparison.formats import protocols, write_tables
from secateur.comparison.table import Table, make_table
from secateur.errors import SecateurError, one_line
from secateur.executors import Asked, Executor, Pool, opened_executor
from secateur.progress import Progress
from secateur.workers import Worker

#: Takes what a process tells of its progress, see :class:`secateur.comparison.worker.Told`.
Told = Callable[[Mapping[str, Any]], None]
#: Seconds between two notes of how long a cell has been at work.
NOTE_EVERY = 1.0


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
        text_field, data_dir: as for :func:`secateur.evaluate`, and for calibration too.
        windows: consecutive windows from the start of each text; None for all.
        window_length: tokens a window; capped at the model's positions.
        keep: let the models stay in ``out/models``.
        device, max_memory, trust_remote_code: as for :func:`secateur.prune`.
        workers, cluster: cells that are made and measured at a time, and where; they share out the
            threads and ``max_memory``, and seconds are those of cells that had others beside them.

    Raises:
        SecateurError: for everything that a user can mend before any cell is run, or that spoils
            the dense model.
    """
    where = {"text_field": text_field, "data_dir": None if data_dir is None else str(data_dir)}
    given = {name: value for name, value in where.items() if value not in (None, "text")}
    fields["calibration"] = {**given, **fields.get("calibration", {})}
    cells = make_cells(
        methods=methods, recipes=recipes, remove=remove, sparsity=sparsity, seeds=seeds, **fields
    )
    reading = {"length": window_length, "windows": windows, **where}
    with Folder(local_path(out), local_path(source)) as folder:
        for cell in cells:
            folder.check(cell)
        with opened_executor(workers, cluster) as executor:
            run = _Run(
                str(source),
                folder,
                cells,
                reading,
                keep=keep,
                max_memory=max_memory,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress or Progress(),
                executor=executor,
            )
            run.dense(list(dict.fromkeys([BUILTIN, *texts])))
            run.all_cells()
        folder.tidy()
        return run.finished(keep)


class _Run:
    """What the steps of one comparison share."""

    def __init__(
        self,
        source: str,
        folder: Folder,
        cells: list[Cell],
        reading: Mapping[str, Any],
        *,
        keep: bool,
        max_memory: str | None,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
        executor: Executor | None,
    ) -> None:
        self.source = source
        self.folder = folder
        self.cells = cells
        self.reading = reading
        self.keep = keep
        self.max_memory = max_memory
        self.executor = executor
        self.common: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
        self.progress = progress
        self.settings: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        #: What is being done for cells that are made side by side, for the one line that shows it.
        self.at_work: dict[str, str] = {}
        for cell in cells:
            found = folder.find(cell.name)
            if found is not None and "failed" not in found:
                self.results[cell.name] = found

    def dense(self, texts: list[str]) -> None:
        """Look at the source and the texts, and measure the dense model unless it is known."""
        with self._worker("the dense model") as worker:
            self.settings = worker.ask(
                "look", source=self.source, texts=texts, **self.common, **self.reading
            )
            self.folder.agree(self.settings)
            found = self.folder.find(DENSE)
            if found is None:
                self.progress.note(f"dense: {self.source}")
                began = time.monotonic()
                perplexity = self._evaluate(worker, self.source, self._shown("dense"))
                found = {"perplexity": perplexity, "wall": time.monotonic() - began}
                self.folder.keep(DENSE, found)
        self.results[DENSE] = found
        known = sum(cell.name in self.results for cell in self.cells)
        if known:
            self.progress.note(f"continuing: {known} of {len(self.cells)} cells are finished")

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
            measured = self._measured(cell, told)
        except SecateurError as error:
            return {"failed": one_line(error)[0]}
        return {**measured, "wall": time.monotonic() - began}

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
        self.folder.keep(cell.name, result)
        self.results[cell.name] = result
        self.write()
        self.progress.note(self._line(cell, result))

    def _place(self, cell: Cell) -> str:
        return f"[{self.cells.index(cell) + 1}/{len(self.cells)}] {cell.label}, {cell.asked}"

    def _who(self, cell: Cell) -> str:
        several = len({one.recipe.seed for one in self.cells}) > 1
        return self._place(cell) + (f", seed {cell.recipe.seed}" if several else "")

    def _measured(self, cell: Cell, told: Told) -> dict[str, Any]:
        model, keep = self.folder.model(cell), self.keep
        with self._worker(self._who(cell)) as worker:
            piece = self.folder.piece(cell.name)
            pruned = piece.get("pruned") if piece.get("keep") == keep else None
            if pruned is None or not model.is_dir():
                pruned = self._pruned(worker, cell, told)
            perplexity = self._evaluate(worker, str(model), told)
            if keep:
                both = {t: (self.results[DENSE]["perplexity"][t], v) for t, v in perplexity.items()}
                protocol = " ".join(protocols(self.settings))
                worker.ask("finish_page", out=str(model), perplexity=both, protocol=protocol)
        if keep:
            self.folder.let_stay(cell)
        else:
            self.folder.drop(cell)
        return {**pruned, "perplexity": perplexity}

    def _pruned(self, worker: Asked, cell: Cell, told: Told) -> dict[str, Any]:
        """The cell's model, written; with the time and memory of earlier runs that were killed."""
        model = self.folder.model(cell)
        if not work_folder(model).is_dir():
            self.folder.drop(cell)  # finished, but killed before anything was noted of it
        earlier = self.folder.piece(cell.name) if _finished_blocks(model) else {}
        before = float(earlier.get("seconds", 0.0))
        most = int(earlier.get("peak_memory", 0))
        began = noted = time.monotonic()

        def note(event: Mapping[str, Any]) -> None:
            nonlocal noted, most
            told(event)
            most = max(most, event["memory"])
            now = time.monotonic()
            if now - noted >= NOTE_EVERY:
                noted = now
                self.folder.note_piece(
                    cell.name, {"seconds": before + now - began, "peak_memory": most}
                )

        pruned = worker.ask(
            "prune",
            told=note,
            source=self.source,
            out=str(model),
            recipe=json.loads(cell.recipe.model_dump_json()),
            max_memory=self.max_memory,
            verify=self.keep,
            beside=1 if self.executor is None else self.executor.on_one_machine,
            **self.common,
        )
        pruned["continued"] = bool(earlier)
        pruned["seconds"] += before
        pruned["peak_memory"] = max(pruned["peak_memory"], most)
        self.folder.note_piece(cell.name, {"pruned": pruned, "keep": self.keep})
        return dict(pruned)

    def _evaluate(self, worker: Asked, model: str, told: Told) -> dict[str, float]:
        texts = {k: v["tokens_sha256"] for k, v in self.settings["evaluation"].items()}
        found: dict[str, float] = worker.ask(
            "evaluate", told=told, model=model, texts=texts, **self.common, **self.reading
        )
        return found

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
            parts.append(f"{result['wall']:.0f} s")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{left:.0f} s left")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """By the mean of a setting's finished cells, or of all; None with nothing to go by."""
        spent: dict[str, list[float]] = {}
        for cell in self.cells:
            found = self.results.get(cell.name, {})
            if "wall" in found:
                spent.setdefault(cell.label, []).append(found["wall"])
        every = [seconds for known in spent.values() for seconds in known]
        ahead = [cell for cell in self.cells if cell.name not in self.results]
        if not every or not ahead:
            return None
        alone = sum(_mean(spent.get(cell.label, every)) for cell in ahead)
        return alone / (self.executor.workers if self.executor else 1)

    def write(self) -> Table:
        """The tables and the page, of what is known so far."""
        table = make_table(self.settings, self.cells, self.results)
        write_tables(self.folder.path, table)
        return table

    def finished(self, keep: bool) -> Comparison:
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
        gone = [n for n in sorted(names - set(failed)) if not self._kept(n)] if keep else []
        if gone:
            notes.append(
                f"measured before --keep was given, and so not there: {_counted(gone, 'model')}; "
                f"secateur prune {self.source} --recipe {self.folder.path}/recipes/{gone[0]}.yaml "
                "--out FOLDER makes the first of them"
            )
        return Comparison(self.folder.path, self.write(), failed, notes)

    def _kept(self, name: str) -> bool:
        return (self.folder.path / "models" / name).is_dir()


def _finished_blocks(model: Path) -> bool:
    """Whether an unfinished model has work in it that ``prune`` goes on from."""
    journal = work_folder(model) / JOURNAL
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1


def _counted(things: Collection[str], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) > 1 else ''}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
