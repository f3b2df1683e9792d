"""Writing a model so that a kill at any moment loses at most the block being worked on.

Work happens in ``OUT.partial`` beside the wanted folder: the journal, the lock, and ``model/`` with
what is to become ``OUT``. Every file is written under another name, synced and renamed; then one
line goes into the journal. Only when everything stands there is ``model/`` renamed to its final
name. The same command finds the journal and goes on behind it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.lock import Lock, check_free
from secateur.errors import OutputError

JOURNAL = "journal.jsonl"
LOCK = "lock"


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that the name never shows a half-written file."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def copy_file(source: Path, path: Path) -> None:
    """Copy the bytes of ``source`` to the new file ``path``, through to the disk."""
    shutil.copyfile(source, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and a final newline, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write one safetensors file atomically; return the SHA-256 of its bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    beside = path.with_name(f".{path.name}.tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"format": "pt"})
    except SafetensorError as error:
        # The Rust writer reports a full disk as text; the user needs the plain reason.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.ENOSPC * ("No space left" in str(error))
        if code:
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
    digest = hashlib.sha256()
    with beside.open("rb+") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        os.fsync(file.fileno())
    beside.chmod(0o666 & ~_umask())  # safetensors creates files that nobody else may read
    os.replace(beside, path)
    sync_folder(path.parent)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as :func:`write_tensors` gives it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make names in a folder outlive a power cut: those that were made, and those renamed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def work_folder(out: Path) -> Path:
    """Where the unfinished work for ``out`` lies."""
    return out.with_name(out.name + ".partial")


def waste_folder(out: Path) -> Path:
    """What a finished work folder is called while it is being removed."""
    return out.with_name(out.name + ".partial.done")


def drop_waste(out: Path) -> None:
    """Remove what a kill at the very end left; a folder of the user's by that name stays."""
    waste = waste_folder(out)
    names = rf"model|{LOCK}|{re.escape(JOURNAL)}|((cut|inputs)-\d+|training)\.safetensors"
    ours = re.compile(rf"\.?({names})(\.tmp)?")
    if waste.is_dir() and all(ours.fullmatch(path.name) for path in waste.iterdir()):
        shutil.rmtree(waste, ignore_errors=True)


def is_whole(digests: Mapping[Path, str]) -> bool:
    """Whether files hold the bytes that were written, by their SHA-256.

    A disk that lost power may bring back less than it had promised.
    """
    return all(path.is_file() and digest_of(path) == wanted for path, wanted in digests.items())


def check_output(out: Path, origin: Path, *, file: bool = False) -> None:
    """Refuse an output place that cannot be used, before any work is done.

    Args:
        out: where the result is to be.
        origin: the source.
        file: whether the result is one file rather than a folder.

    Raises:
        OutputError: exists and is not empty, lies inside the source, or cannot be written.
    """
    target = out.expanduser().resolve()
    source = origin.resolve()
    if file and target.exists():
        raise OutputError(f"output {out} exists: choose another --out, or remove it first")
    if target.is_file():
        raise OutputError(f"output {out} is a file: give a folder that does not exist yet")
    if target == source or source in target.parents:
        raise OutputError(
            f"output {out} lies inside the source {origin}: choose a folder elsewhere"
        )
    work = work_folder(target)
    if work == source or work in source.parents:
        raise OutputError(
            f"output {out} would be prepared in {work}, which holds the source: choose another "
            "--out"
        )
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(
            f"output {out} exists and is not empty: choose another --out, or remove it first"
        )
    check_free(work / LOCK, out)
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {out} cannot be written: no permission to write in {parent}")


def newest_blocks(journal: Journal) -> list[dict[str, Any]]:
    """What the journal says of each finished block; a block that was done again, once."""
    newest = {e["value"]["source"]: e["value"] for e in journal.entries if e["kind"] == "block"}
    return list(newest.values())


class Journal:
    """The work folder of one run: what is finished, and of which recipe.

    Args:
        out: the wanted output folder; the work goes on in ``OUT.partial`` beside it.
        identity: everything that decides the bytes (recipe, model, data, versions). A work folder
            of another identity is refused.

    Raises:
        OutputError: another recipe's work lies there, or another process is at it.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out = out.expanduser().resolve()
        self.folder = work_folder(self.out)
        self.model = self.folder / "model"
        if self._is_foreign():
            raise OutputError(
                f"{self.folder} is in the way, and is no unfinished work of secateur: move it "
                "away, or choose another --out"
            )
        try:
            self._lock = Lock(self.folder / LOCK, out)
            self.model.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"output {out} cannot be written: {error.strerror}") from error
        try:
            self._begin(json.loads(json.dumps(identity, sort_keys=True)))
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, wanted: dict[str, Any]) -> None:
        """Read what is there; write the first line where nothing is."""
        # The folder's own name, and that of the model in it, must be there after a power cut.
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        self.entries = self._read()
        if len(self.entries) == 1 and self.entries[0]["value"] != wanted:
            # Another run began here and finished nothing that could be lost.
            self.entries.clear()
            write_bytes(self.folder / JOURNAL, b"")
        if not self.entries:
            self.add("identity", wanted)
        elif self.entries[0] != {"kind": "identity", "value": wanted}:
            old = self.entries[0].get("value", {})
            changed = [k for k in sorted({*old, *wanted}) if old.get(k) != wanted.get(k)]
            raise OutputError(
                f"{self.folder} holds unfinished work of another run (different: "
                f"{', '.join(changed)}): repeat that command, choose another --out, or remove "
                f"the folder with rm -r {self.folder}"
            )

    def _is_foreign(self) -> bool:
        """Whether files lie here that no run of ours has made; :meth:`finish` would remove them."""
        if not self.folder.is_dir() or (self.folder / JOURNAL).exists():
            return False
        others = {path.name for path in self.folder.iterdir()} - {self.model.name, LOCK}
        return bool(others) or (self.model.is_dir() and any(self.model.iterdir()))

    def _read(self) -> list[dict[str, Any]]:
        path = self.folder / JOURNAL
        entries: list[dict[str, Any]] = []
        if not path.exists():
            return entries
        good = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n") or not {"kind", "value"} <= entry.keys():
                    break
                entries.append(entry)
                good += len(line)
        # A line cut by a crash is dropped, so that the next one does not continue it.
        with path.open("rb+") as file:
            file.truncate(good)
        return entries

    def add(self, kind: str, value: Any) -> None:
        """Append one line and sync it; what it speaks of must be on disk already."""
        entry = {"kind": kind, "value": value}
        path = self.folder / JOURNAL
        new = not path.exists()
        with path.open("ab") as file:
            file.write((json.dumps(entry, sort_keys=True) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.folder)
        self.entries.append(json.loads(json.dumps(entry)))

    def find(self, kind: str, **fields: Any) -> Any | None:
        """The value of the newest entry of this kind with these fields, or None."""
        for entry in reversed(self.entries):
            value = entry["value"]
            if entry["kind"] == kind and all(value.get(k) == v for k, v in fields.items()):
                return value
        return None

    def finish(self) -> None:
        """Everything stands: give the model its final name and drop the work folder."""
        if self.model.is_dir():
            sync_folder(self.model)
            if self.out.is_dir():
                self.out.rmdir()  # check_output made sure that it is empty
            os.replace(self.model, self.out)
            sync_folder(self.out.parent)
            sync_folder(self.folder)  # the new name first: better twice than nowhere
        self._discard()

    def finish_file(self, made: Path) -> None:
        """The same where the result is one file, which lies in the work folder."""
        self.add("export", {})  # from here on a file of that name is ours
        os.replace(made, self.out)
        sync_folder(self.out.parent)
        sync_folder(self.folder)
        self._discard()

    def _discard(self) -> None:
        """Drop the work folder; what was wanted of it stands elsewhere by now."""
        # Renamed first: a work folder that a kill leaves half removed could not be gone on from.
        waste = waste_folder(self.out)
        drop_waste(self.out)
        if waste.exists():  # not ours
            waste = self.folder
        else:
            os.replace(self.folder, waste)
        shutil.rmtree(waste)
        self._lock.release()

    def drop_if_fruitless(self) -> None:
        """Remove the work folder unless it holds a finished block."""
        if all(entry["kind"] in ("identity", "layers") for entry in self.entries):
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock; the work stays."""
        self._lock.release()
