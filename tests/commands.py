"""The program as a shell calls it, in this process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from secateur import cli


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, what it printed, and lines of errors and progress."""

    code: int
    out: str
    err: list[str]

    def fine(self) -> str:
        """What it printed; it must have ended well."""
        assert self.code == 0, self.err
        return self.out

    def refused(self, text: str, code: int = 2) -> None:
        """The last line is this error; nothing was printed but progress."""
        assert (self.code, self.out) == (code, ""), self
        assert self.err[-1] == f"error: {text}"
        assert not any(line.startswith(("error", "Traceback")) for line in self.err[:-1])

    def refused_at_once(self, text: str) -> None:
        """The same, before any work was begun."""
        self.refused(text)
        assert len(self.err) == 1


def secateur(*arguments: object) -> Ended:
    """Run ``secateur`` with these arguments. A bug of ours is raised as it is."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue().strip().splitlines())
