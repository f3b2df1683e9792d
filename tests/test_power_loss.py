"""In what order a run asks for bytes and names to be on disk, as a loss of power would test it.

Noted are all openings for writing, syncs and renamings below one folder. A file must be synced
before the renaming that publishes it, its folder behind it, and both before the journal speaks.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from secateur.checkpoint import writer
from secateur.exporting import export
from secateur.pruning import prune
from secateur.recipe import Recipe, make_recipe

Folder = Callable[[str], Path]
JOURNAL = "journal.jsonl"
#: Written for this run alone, and worth nothing after a loss of power.
PASSING = ("lock", ".lock")


@dataclass
class Disk:
    """What happened below ``root``, in order; ``on`` while it is noted."""

    root: Path
    on: bool = False
    events: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sys.addaudithook(self._hear)

    def note(self, kind: str, path: str, to: str = "") -> None:
        if self.on and os.path.realpath(path).startswith(f"{self.root}/"):
            self.events.append((kind, os.path.realpath(path), to and os.path.realpath(to)))

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str | Path):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                self.note("write", str(arguments[0]))
        elif event == "os.rename":
            self.note("rename", str(arguments[0]), str(arguments[1]))

    @contextmanager
    def noting(self) -> Iterator[None]:
        real = os.fsync

        def fsync(handle: int) -> None:
            real(handle)
            folder = stat.S_ISDIR(os.fstat(handle).st_mode)
            self.note("sync folder" if folder else "sync", os.readlink(f"/proc/self/fd/{handle}"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            self.on = True
            try:
                yield
            finally:
                self.on = False


def check(events: list[tuple[str, str, str]], kept: Path) -> int:
    """Hold the events against the rules; return how many files were published.

    Args:
        kept: what remains: every file of it must have come through to the disk.
    """
    dirty: set[str] = set()  # files with bytes that may be in memory only
    unnamed: dict[str, str] = {}  # folders with names that may be, and the newest of them
    whole: set[str] = set()
    for kind, path, to in events:
        name, folder = os.path.basename(path), os.path.dirname(path)
        if name.endswith(PASSING):
            continue
        if kind == "write":
            if name == JOURNAL:
                assert not dirty - {path}, f"the journal speaks before {dirty} is synced"
                others = {k: v for k, v in unnamed.items() if v != path}
                assert not others, f"the journal speaks before the names {others} are"
            if path not in whole:
                unnamed[folder] = path
            dirty.add(path)
        elif kind == "sync":
            dirty.discard(path)
            whole.add(path)
        elif kind == "sync folder":
            unnamed.pop(path, None)
        else:
            inside = {each for each in dirty if each == path or each.startswith(f"{path}/")}
            assert not inside, f"{inside} is published as {to} before it is synced"
            assert unnamed.get(path) is None, f"{path} is published with a name that is not synced"
            whole |= {to + each.removeprefix(path) for each in whole if each.startswith(path)}
            if not to.endswith(".partial.done"):  # waste, which may come back
                unnamed[folder] = unnamed[os.path.dirname(to)] = to
    assert not unnamed, f"names {unnamed} are not synced"
    files = [str(path) for path in ([kept] if kept.is_file() else kept.rglob("*"))]
    assert whole.issuperset(files), f"never synced: {set(files) - whole}"
    return len(files)


def recipe() -> Recipe:
    return make_recipe(
        remove="20%", method="comp", calibration={"samples": 2, "length": 16},
        options={"layers": 0, "exempt_first": 0, "exempt_last": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk").resolve())


@pytest.mark.parametrize("name", ["folder", "model.gguf"])
def test_a_run_syncs_before_it_speaks(name: str, disk: Disk, model_folder: Folder) -> None:
    source, out = model_folder("llama-gqa-tied"), disk.root / "run" / name
    disk.events.clear()
    with disk.noting():
        prune(source, out, recipe(), verify=False)
    assert check(disk.events, out) >= (12 if name == "folder" else 1)
    synced = [path for kind, path, _ in disk.events if kind == "sync"]
    blocks = [number for number, path in enumerate(synced) if "model-0000" in path]
    lines = [number for number, path in enumerate(synced) if path.endswith(JOURNAL)]
    assert len(blocks) == 5  # one a block, one for the rest
    assert all(any(line > block for line in lines) for block in blocks)


def test_an_export_syncs_too(disk: Disk, model_folder: Folder) -> None:
    source = model_folder("llama-gqa-tied")
    for to, name in (("gguf", "one.gguf"), ("packed", "two")):
        out = disk.root / "exports" / name
        disk.events.clear()
        with disk.noting():
            export(source, out, to=to, verify=False)
        assert check(disk.events, out)


@pytest.mark.parametrize("lazy", ["sync_folder", "fsync"])
def test_a_lazy_writer_is_found(
    lazy: str, disk: Disk, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules are no rules if nothing breaks them."""
    source, out = model_folder("llama-gqa-tied"), disk.root / lazy
    disk.events.clear()
    with disk.noting():
        if lazy == "sync_folder":
            monkeypatch.setattr(writer, "sync_folder", lambda folder: None)
        else:
            monkeypatch.setattr(os, "fsync", lambda handle: None)
        prune(source, out, recipe(), verify=False)
    with pytest.raises(AssertionError, match="before"):
        check(disk.events, out)
