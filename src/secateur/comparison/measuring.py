"""What is asked of the process of a cell: to look, to make a model, to measure it.

A model that an earlier command measured is measured only by what is new; its files are those that
stayed, or are made again, which gives the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.checkpoint.writer import JOURNAL, work_folder
from secateur.comparison.cells import Cell
from secateur.comparison.folder import Folder
from secateur.comparison.formats import protocols
from secateur.errors import VerifyError
from secateur.executors import Asked

#: Takes what a process tells of its progress, see :class:`secateur.comparison.worker.Told`.
Told = Callable[[Mapping[str, Any]], None]
Result = Mapping[str, Any]
#: Seconds between two notes of how long a cell has been at work.
NOTE_EVERY = 1.0


@dataclass
class Measuring:
    """How the models of one comparison are made and measured.

    Attributes:
        source: the dense model.
        folder: of the comparison.
        reading: length, windows, text_field and data_dir of the texts.
        tasks, limit: zero-shot tasks and items of each; None for all.
        keep: whether models stay.
        max_memory: of one process.
        common: device and trust_remote_code.
        beside: models that are made at a time and share ``max_memory``.
        settings: what :meth:`look` found.
        dense: what is known of the dense model.
    """

    source: str
    folder: Folder
    reading: Mapping[str, Any]
    tasks: Sequence[str] = ()
    limit: int | None = None
    keep: bool = False
    max_memory: str | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    beside: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, Any] = field(default_factory=dict)

    def look(self, worker: Asked, texts: list[str]) -> None:
        """Fill in ``settings``."""
        self.settings = worker.ask(
            "look", source=self.source, texts=texts, tasks=list(self.tasks), limit=self.limit,
            **self.common, **self.reading,
        )  # fmt: skip

    def unscored(self, result: Result) -> list[str]:
        """Tasks that a finished model was not asked yet."""
        return [task for task in self.tasks if task not in result.get("scores", {})]

    def measure_dense(self, worker: Asked, known: Result | None, told: Told) -> dict[str, Any]:
        """Fill in and return ``dense``.

        Args:
            known: what an earlier command measured.
        """
        began = time.monotonic()
        found = dict(known or {})
        if known is None:
            found["perplexity"] = self._perplexity(worker, self.source, told)
        if self.unscored(found):
            found["scores"] = self._scores(worker, self.source, found, told)
        if found != known:
            found["wall"] = found.get("wall", 0.0) + time.monotonic() - began
        self.dense = found
        return found

    def measure_cell(
        self, worker: Asked, cell: Cell, known: Result | None, told: Told
    ) -> dict[str, Any]:
        """Make and measure the model of a cell.

        Args:
            known: what an earlier command measured, if anything; it keeps its seconds and memory.
        """
        stayed = self.folder.kept(cell) if known is not None else None
        if stayed is not None:
            return {**(known or {}), "scores": self._scores(worker, str(stayed), known, told)}
        model, piece = self.folder.model(cell), self._piece(cell)
        if "pruned" not in piece or not model.is_dir():
            piece = {"pruned": self._pruned(worker, cell, told), "under": self._under(cell)}
            self.folder.note_piece(cell.name, piece)
        if known is not None:
            found = dict(known)
        else:
            texts = self._texts()
            if piece.get("texts") != texts:
                piece["perplexity"] = self._perplexity(worker, str(model), told)
                piece["texts"] = texts
                self.folder.note_piece(cell.name, piece)
            found = {**piece["pruned"], "perplexity": piece["perplexity"]}
        if self.unscored(found):
            found["scores"] = self._scores(worker, str(model), found, told)
        if self.keep:
            before, after = self.dense["perplexity"], found["perplexity"]
            both = {text: (before[text], value) for text, value in after.items()}
            protocol = " ".join(protocols(self.settings))
            worker.ask("finish_page", out=str(model), perplexity=both, protocol=protocol)
            self.folder.let_stay(cell)
        else:
            self.folder.drop(cell)
        return found

    # ---- making ------------------------------------------------------------------------------

    def _under(self, cell: Cell) -> dict[str, Any]:
        """What decides the files of a cell's model."""
        about = {key: self.settings[key] for key in ("source", "versions", "threads", "device")}
        recipe = json.loads(cell.recipe.model_dump_json())
        return {**json.loads(json.dumps(about)), "recipe": recipe, "keep": self.keep}

    def _piece(self, cell: Cell) -> dict[str, Any]:
        """What a killed run did for this very cell; a mended command may have changed it."""
        piece = self.folder.piece(cell.name)
        return piece if piece.get("under") == self._under(cell) else {}

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
            beside=self.beside,
            **self.common,
        )
        pruned["continued"] = bool(earlier)
        pruned["seconds"] += before
        pruned["peak_memory"] = max(pruned["peak_memory"], most)
        return dict(pruned)

    # ---- measuring ---------------------------------------------------------------------------

    def _texts(self) -> dict[str, str]:
        """Hash of the tokens of each text."""
        return {k: v["tokens_sha256"] for k, v in self.settings["evaluation"].items()}

    def _perplexity(self, worker: Asked, model: str, told: Told) -> dict[str, float]:
        found: dict[str, float] = worker.ask(
            "evaluate", told=told, model=model, texts=self._texts(), **self.common, **self.reading
        )
        return found

    def _scores(
        self, worker: Asked, model: str, known: Result | None, told: Told
    ) -> dict[str, dict[str, Any]]:
        """Scores by task, with those that are known.

        Raises:
            VerifyError: these are other items than the dense model was asked.
        """
        known = known or {}
        tasks = {task: self.settings["tasks"][task] for task in self.unscored(known)}
        found: dict[str, dict[str, Any]] = worker.ask(
            "score", told=told, model=model, tasks=tasks, limit=self.limit,
            data_dir=self.reading["data_dir"], **self.common,
        )  # fmt: skip
        for task, score in found.items():
            asked = self.dense.get("scores", {}).get(task, score)
            if (asked["items"], asked["of"]) != (score["items"], score["of"]):
                raise VerifyError(
                    f"task {task} has {score['items']} of {score['of']} items, and had "
                    f"{asked['items']} of {asked['of']} for the dense model: it changed during "
                    "the comparison; choose another --out and start again"
                )
        return {**known.get("scores", {}), **found}


def _finished_blocks(model: Path) -> bool:
    """Whether an unfinished model has work in it that ``prune`` goes on from."""
    journal = work_folder(model) / JOURNAL
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1
