"""Errors a user can cause, and the one place that turns them into a line and an exit code.

Every message names the thing, says what was got, what is allowed and what to type next.
Nothing inside the package prints or exits; the command line calls :func:`one_line`.
"""

from __future__ import annotations

USER_MISTAKE = 2
INTERRUPTED = 130


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


def one_line(error: BaseException) -> tuple[str, int]:
    """The text shown to the user for ``error`` and the exit code that goes with it.

    Knows Secateur's own errors, a full or failing disk and Ctrl-C. Anything else is a bug of ours
    and is raised again, so that its traceback is seen.
    """
    import errno

    if isinstance(error, SecateurError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return (
            "interrupted; finished blocks are kept, the same command continues from there",
            INTERRUPTED,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{where}; finished blocks are kept: free some space and repeat "
            "the same command",
            USER_MISTAKE,
        )
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EROFS, errno.EACCES):
        where = f" at {error.filename}" if error.filename else ""
        return (
            f"{error.strerror}{where}: see to the disk or the permissions and repeat the same "
            "command; finished blocks are kept",
            USER_MISTAKE,
        )
    raise error
