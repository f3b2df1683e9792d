"""A comparison, cell by cell, each in a process of its own; a killed one continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
from secateur.progress import Progress
from secateur.workers import Worker

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
        run = _Run(
            str(source),
            folder,
            cells,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress or Progress(),
        )
        run.dense(list(dict.fromkeys([BUILTIN, *texts])), reading)
        for cell in cells:
            run.cell(cell, reading, keep=keep, max_memory=max_memory)
        folder.tidy()
        return run.finished(keep)


class _Run:
    """What the steps of one comparison share."""

    def __init__(
        self,
        source: str,
        folder: Folder,
        cells: list[Cell],
        *,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
    ) -> None:
        self.source = source
        self.folder = folder
        self.cells = cells
        self.common: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
        self.progress = progress
        self.settings: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.place = 0
        for cell in cells:
            found = folder.find(cell.name)
            if found is not None and "failed" not in found:
                self.results[cell.name] = found

    def dense(self, texts: list[str], reading: Mapping[str, Any]) -> None:
        """Look at the source and the texts, and measure the dense model unless it is known."""
        with self._worker("the dense model") as worker:
            self.settings = worker.ask(
                "look", source=self.source, texts=texts, **self.common, **reading
            )
            self.folder.agree(self.settings)
            found = self.folder.find(DENSE)
            if found is None:
                self.progress.note(f"dense: {self.source}")
                began = time.monotonic()
                perplexity = self._evaluate(worker, self.source, "dense", reading)
                found = {"perplexity": perplexity, "wall": time.monotonic() - began}
                self.folder.keep(DENSE, found)
        self.results[DENSE] = found
        known = sum(cell.name in self.results for cell in self.cells)
        if known:
            self.progress.note(f"continuing: {known} of {len(self.cells)} cells are finished")

    def cell(
        self, cell: Cell, reading: Mapping[str, Any], *, keep: bool, max_memory: str | None
    ) -> None:
        """Make and measure one cell, unless it is finished; write the tables anew."""
        self.place += 1
        if cell.name in self.results:
            return
        self.folder.write_recipe(cell)
        began = time.monotonic()
        try:
            measured = self._measured(cell, reading, keep=keep, max_memory=max_memory)
        except SecateurError as error:
            self.progress.finish()
            result: dict[str, Any] = {"failed": one_line(error)[0]}
        else:
            result = {**measured, "wall": time.monotonic() - began}
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

    def _measured(
        self, cell: Cell, reading: Mapping[str, Any], *, keep: bool, max_memory: str | None
    ) -> dict[str, Any]:
        who = f"[{self.place}/{len(self.cells)}] {cell.label}, {cell.asked}"
        if len({one.recipe.seed for one in self.cells}) > 1:
            who += f", seed {cell.recipe.seed}"
        model = self.folder.model(cell)
        with self._worker(who) as worker:
            piece = self.folder.piece(cell.name)
            pruned = piece.get("pruned") if piece.get("keep") == keep else None
            if pruned is None or not model.is_dir():
                pruned = self._pruned(worker, cell, who, keep=keep, max_memory=max_memory)
            perplexity = self._evaluate(worker, str(model), who, reading)
            if keep:
                both = {t: (self.results[DENSE]["perplexity"][t], v) for t, v in perplexity.items()}
                protocol = " ".join(protocols(self.settings))
                worker.ask("finish_page", out=str(model), perplexity=both, protocol=protocol)
        if keep:
            self.folder.let_stay(cell)
        else:
            self.folder.drop(cell)
        return {**pruned, "perplexity": perplexity}

    def _pruned(
        self, worker: Worker, cell: Cell, who: str, *, keep: bool, max_memory: str | None
    ) -> dict[str, Any]:
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
            most = max(most, event["memory"])
            now = time.monotonic()
            if now - noted >= NOTE_EVERY:
                noted = now
                self.folder.note_piece(
                    cell.name, {"seconds": before + now - began, "peak_memory": most}
                )

        pruned = worker.ask(
            "prune",
            told=self._shown(who, note),
            source=self.source,
            out=str(model),
            recipe=json.loads(cell.recipe.model_dump_json()),
            max_memory=max_memory,
            verify=keep,
            **self.common,
        )
        pruned["continued"] = bool(earlier)
        pruned["seconds"] += before
        pruned["peak_memory"] = max(pruned["peak_memory"], most)
        self.folder.note_piece(cell.name, {"pruned": pruned, "keep": keep})
        return dict(pruned)

    def _evaluate(
        self, worker: Worker, model: str, who: str, reading: Mapping[str, Any]
    ) -> dict[str, float]:
        texts = {k: v["tokens_sha256"] for k, v in self.settings["evaluation"].items()}
        found: dict[str, float] = worker.ask(
            "evaluate", told=self._shown(who), model=model, texts=texts, **self.common, **reading
        )
        return found

    def _worker(self, what: str) -> Worker:
        return Worker("secateur.comparison.worker", f"the process of {what}")

    def _shown(
        self, who: str, note: Callable[[Mapping[str, Any]], None] | None = None
    ) -> Callable[[Mapping[str, Any]], None]:
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
            if note is not None:
                note(event)

        return told

    def _line(self, cell: Cell, result: Mapping[str, Any]) -> str:
        """What a finished cell says, and how long the rest will take."""
        parts = [f"[{self.place}/{len(self.cells)}] {cell.label}, {cell.asked}"]
        parts.append(f"seed {cell.recipe.seed}")
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
        return sum(_mean(spent.get(cell.label, every)) for cell in ahead)

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
