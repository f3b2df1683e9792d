"""The folder of a comparison: what holds for all cells, and what is known of each.

``settings.json`` says under which conditions the cells were measured; another condition is refused,
since its cells could not stand in one table. Each finished cell is one file in ``cells/``, written
beside and renamed; that it is there is all the journal that is needed. Unfinished work lies in
``work/``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.calibration import BUILTIN
from secateur.checkpoint.lock import take
from secateur.checkpoint.writer import check_output, write_bytes, write_json
from secateur.comparison.cells import Cell
from secateur.errors import OutputError

SETTINGS = "settings.json"
DENSE = "dense"


class Folder:
    """One comparison on disk. As a context it is locked: one process at a time.

    Args:
        out: the folder; made where there is none.
        origin: the source, which must lie elsewhere.

    Raises:
        OutputError: something else lies there, or another process is at work in it.
    """

    def __init__(self, out: Path, origin: Path) -> None:
        self.path = out.expanduser().resolve()
        if not (self.path / SETTINGS).is_file():
            check_output(out, origin)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"output {out} cannot be written: {error.strerror}") from error
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            # Of the kernel and on the folder itself: it dies with its process and leaves no file.
            take(self._lock, out)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    # ---- what holds for all cells ------------------------------------------------------------

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Take these settings, or refuse them where cells were measured under others.

        Zero-shot tasks may be added and left out; what is known of a task must be the same.

        Raises:
            OutputError: they would be incomparable.
        """
        path = self.path / SETTINGS
        wanted = json.loads(json.dumps(settings))
        old = _read(path) if path.is_file() else None
        if old is not None:
            before, now = old.pop("tasks", {}), wanted.pop("tasks", {})
            both = before.keys() & now.keys()
            shared = [{"tasks": {task: of[task] for task in both}} for of in (before, now)]
            found = differences({**old, **shared[0]}, {**wanted, **shared[1]})
            wanted["tasks"] = now if found else {**before, **now}
            if not found:
                if before.keys() != wanted["tasks"].keys():
                    write_json(path, wanted)
                return
        if old is not None and self._measured():
            raise OutputError(
                f"{self.path} holds cells that were measured otherwise (different: "
                f"{', '.join(found)}): repeat that command, choose another "
                f"--out, or remove the folder with rm -r {self.path}"
            )
        self._cell(DENSE).unlink(missing_ok=True)
        write_json(path, wanted)

    def _measured(self) -> bool:
        """Whether a cell has been; the dense model alone is soon measured again."""
        cells = [path for path in self.path.glob("cells/*.json") if path.stem != DENSE]
        return any("failed" not in _read(path) for path in cells)

    # ---- one cell ----------------------------------------------------------------------------

    def find(self, name: str) -> dict[str, Any] | None:
        """What is known of a cell, measured or failed."""
        path = self._cell(name)
        return _read(path) if path.is_file() else None

    def check(self, cell: Cell) -> None:
        """Refuse a cell that was measured by another recipe.

        Raises:
            OutputError: it was.
        """
        found = self.find(cell.name)
        if found is None or "failed" in found:
            return
        wanted = _decisive(json.loads(cell.recipe.model_dump_json()))
        if different := differences(_decisive(found["recipe"]), wanted):
            raise OutputError(
                f"{self.path} holds the cell {cell.name}, measured with another recipe (different: "
                f"{', '.join(different)}): repeat that command, choose another --out, or remove "
                f"{self._cell(cell.name)}"
            )

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """A cell is finished, or has failed; what a failed one has done may still be of use."""
        self._cell(name).parent.mkdir(exist_ok=True)
        write_json(self._cell(name), value)
        if "failed" not in value:
            self._piece(name).unlink(missing_ok=True)

    def write_recipe(self, cell: Cell) -> None:
        """The recipe as a file with which ``secateur prune --recipe`` makes the cell's model."""
        import yaml

        path = self.path / "recipes" / f"{cell.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        fields = cell.recipe.model_dump(exclude_none=True)
        write_bytes(path, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).encode())

    def _cell(self, name: str) -> Path:
        return self.path / "cells" / f"{name}.json"

    # ---- unfinished work ---------------------------------------------------------------------

    def model(self, cell: Cell) -> Path:
        """Where the cell's model lies until it is measured."""
        place = self.path / "work" / cell.name
        place.parent.mkdir(exist_ok=True)
        return place

    def let_stay(self, cell: Cell) -> None:
        """Give the measured model of a cell a place that stays."""
        place = self.path / "models" / cell.name
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # of a cell that was removed by hand
        os.replace(self.model(cell), place)

    def kept(self, cell: Cell) -> Path | None:
        """The model of a cell that stays, if there is one."""
        place = self.path / "models" / cell.name
        return place if place.is_dir() else None

    def drop(self, cell: Cell) -> None:
        """Remove the model of a cell from where it was measured."""
        shutil.rmtree(self.model(cell), ignore_errors=True)

    def piece(self, name: str) -> dict[str, Any]:
        """What earlier, killed runs of an unfinished cell noted."""
        path = self._piece(name)
        return _read(path) if path.is_file() else {}

    def note_piece(self, name: str, value: Mapping[str, Any]) -> None:
        """Note how far an unfinished cell is."""
        self._piece(name).parent.mkdir(exist_ok=True)
        write_json(self._piece(name), value)

    def _piece(self, name: str) -> Path:
        return self.path / "work" / f"{name}.json"

    def tidy(self) -> None:
        """Remove the work folder, if nothing in it can be gone on from."""
        work = self.path / "work"
        if not work.is_dir() or any(work.glob("*.partial")):
            return
        # Of a model that lies there, but could not be measured, its piece tells.
        if not any(piece.with_suffix("").is_dir() for piece in work.glob("*.json")):
            shutil.rmtree(work)


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the folder of named sets where none is named: it may be for tasks alone."""
    spec = recipe["calibration"]
    if spec["source"] != BUILTIN:
        return recipe
    return {**recipe, "calibration": {**spec, "data_dir": None}}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted names of what differs between two trees of JSON values, sorted."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [path]
    found: list[str] = []
    for key in sorted({*old, *new}):
        below = f"{path}.{key}" if path else str(key)
        if key in old and key in new:
            found += differences(old[key], new[key], below)
        else:
            found.append(below)
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path} is not JSON any more ({error}): remove it") from error
