"""Errors a user can cause, and the one place that turns them into a line and an exit code.

Every message names the thing, says what was got, what is allowed and what to type next.
Nothing inside the package prints or exits; the command line calls :func:`one_line`.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

USER_MISTAKE = 2
#: Signs of a message that are shown; a file may hold a name of a million.
SHOWN = 3000
INTERRUPTED = 130
#: Faults of a disk, a mount or this machine's limits: nothing that a bug of ours would raise.
FAULTS = {
    getattr(errno, name)
    for name in (
        "EIO", "EROFS", "EACCES", "EPERM", "EFBIG", "ESTALE", "ENODEV", "ENXIO", "ETIMEDOUT",
        "ENOTCONN", "EHOSTDOWN", "EREMOTEIO", "ENAMETOOLONG", "EMFILE", "ENFILE", "ENOLCK",
        "ETXTBSY", "EUCLEAN",
    )
    if hasattr(errno, name)
}  # fmt: skip


class SecateurError(Exception):
    """Base of every error that a user can mend. Its text is one line."""

    exit_code = USER_MISTAKE


class SourceError(SecateurError):
    """The model to read is missing, damaged or of a kind that cannot be read."""


class FamilyError(SecateurError):
    """The model opens, but its family is not described in ``anatomy/``."""


class RecipeError(SecateurError):
    """What was asked cannot be understood, or cannot be had from this model."""


class PlanError(SecateurError):
    """A plan says something that no model can be."""


class CalibrationError(SecateurError):
    """The calibration text is missing, unreadable or too short."""


class OutputError(SecateurError):
    """The output cannot be written, or stands in the way."""


class WorkerDied(OutputError):
    """A process that was asked for something ended before it answered."""


class VerifyError(SecateurError):
    """The written model, reopened, does not compute what the plan says."""

    exit_code = 1


class MemoryLimitError(SecateurError):
    """The estimate of memory is above ``--max-memory``."""


class Ended(BaseException):
    """Somebody asked this process to end: SIGTERM, or SIGHUP where its terminal went away.

    Like ``KeyboardInterrupt`` it passes by ``except Exception``.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise :class:`Ended` meanwhile, so that what is begun is tidied up."""

    def raise_it(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # the tidying is not disturbed by a second one
        raise Ended(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # nobody else may
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Who started us with nohup wants SIGHUP ignored.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, raise_it)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def one_line(error: BaseException) -> tuple[str, int]:
    """The text shown to the user for ``error`` and the exit code that goes with it.

    Knows Secateur's own errors, a full or failing disk, too little memory and being stopped.
    Anything else is a bug of ours and is raised again, so that its traceback is seen.
    """
    if isinstance(error, SecateurError):
        line = printable(" ".join(str(error).split()))
        return line if len(line) <= SHOWN else f"{line[:SHOWN]} ...", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted; finished blocks are kept, the same command continues from there",
            INTERRUPTED,
        )
    if isinstance(error, Ended):
        return (
            f"ended by {error.signal.name}; finished blocks are kept, the same command continues "
            "from there",
            128 + error.signal,
        )
    if is_out_of_memory(error):
        return (
            "out of memory; finished blocks are kept: close other programs, or lower --samples or "
            "--length and choose another --out",
            USER_MISTAKE,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{where}; finished blocks are kept: free some space and repeat "
            "the same command",
            USER_MISTAKE,
        )
    if isinstance(error, OSError) and error.errno in FAULTS:
        where = f" at {error.filename}" if error.filename else ""
        return (
            f"{error.strerror}{where}: see to the disk or the permissions and repeat the same "
            "command; finished blocks are kept",
            USER_MISTAKE,
        )
    raise error


def printable(text: str) -> str:
    """Text of a file as a terminal can show it: what would steer the terminal is written out."""
    if text.isprintable():
        return text
    signs = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(signs)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch could not have the memory that it asked for."""
    if isinstance(error, MemoryError):
        return True
    # torch has a class of its own for GPUs only; both are RuntimeErrors with such a text.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )
