"""Folders for passing files, which a killed process cannot leave behind for ever."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "secateur-scratch-"
#: Seconds after which a folder that nobody has locked is nobody's: its maker locks it at once.
YOUNG = 60.0


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder in the system's temporary directory; it goes at the end.

    It is locked meanwhile. The lock is the kernel's and ends with its process, so the folders of
    killed processes are known by having none, and are removed first.
    """
    _remove_stale(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_stale(place: Path) -> None:
    """Whatever cannot be removed, or belongs to another user, stays."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            stat = folder.lstat()
            if stat.st_uid == os.getuid() and time.time() - stat.st_mtime > YOUNG:
                with _locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
