"""One process at a time at a place on disk.

The lock is the kernel's (flock), so it ends with its process, however that ends: none is ever
stale, and the number of a dead process that another has by now means nothing here. What the file
says, host and process, is for the message to the one who comes second. On a network file system the
lock reaches as far as the mount makes it: Linux passes flock on to an NFS server by default.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import OutputError

#: A file may be renamed away between its opening and its locking; so often it is opened again.
TRIES = 100
#: What flock says where somebody else has the lock.
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class Lock:
    """Held from its making until :meth:`release`.

    Args:
        path: the lock's file; made where there is none, with the folder that it lies in.
        out: what the user calls the place, for messages.

    Raises:
        OutputError: another process holds it, or the file system has no locks.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path = path
        for _ in range(TRIES):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Nothing is followed here: a link by this name would have another file emptied.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._handle = os.open(path, flags, 0o644)
            try:
                take(self._handle, out)
                there = self._is_there()
            except BaseException:
                self.release()
                raise
            if there:
                break
            # The one who held it has finished, and has taken the file away.
            self.release()
        else:
            raise OutputError(f"output {out} cannot be locked: {path} is taken away all the time")
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"{platform.node()} {os.getpid()}\n".encode())

    def _is_there(self) -> bool:
        """Whether the file that is locked is still the one of this name."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self, *, remove: bool = False) -> None:
        """Let go; ``remove`` takes the file away first. May be called twice."""
        if self._handle < 0:
            return
        if remove:
            with suppress(FileNotFoundError):
                self.path.unlink()
        os.close(self._handle)
        self._handle = -1


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Alone at what is to become ``place``, by a file beside it that goes again.

    Raises:
        OutputError: another process is at it, or it cannot be written.
    """
    try:
        lock = Lock(place.with_name(f".{place.name}.lock"), place)
    except OSError as error:
        raise OutputError(f"output {place} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release(remove=True)


def check_free(path: Path, out: Path) -> None:
    """Refuse a place at which another process is at work, before any work of one's own.

    Raises:
        OutputError: it is.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # no lock, or one that only the owner of the place could hold
    try:
        take(handle, out)
    finally:
        os.close(handle)


def take(handle: int, out: Path) -> None:
    """Lock an open file or folder.

    Raises:
        OutputError: another process holds it, or the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            raise OutputError(
                f"output {out} cannot be locked ({error.strerror}): choose an --out on a file "
                "system that has locks"
            ) from error
        raise OutputError(
            f"output {out} is being written by another process{_holder(handle)}: wait for it, or "
            "choose another --out"
        ) from error


def _holder(handle: int) -> str:
    """Who wrote the file, in brackets; nothing where it does not say."""
    with suppress(OSError, ValueError):
        host, process = os.pread(handle, 300, 0).decode().split()
        where = "" if host == platform.node() else f" on {host}"
        return f" ({int(process)}{where})"
    return ""
