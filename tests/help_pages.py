"""The help of every command as a Markdown page: ``python tests/help_pages.py docs/help.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from secateur.cli import app

HEAD = """# Help of every command

Made by `make help-pages` from the program itself; a test compares the two.
"""
#: As on a terminal of this width that knows no colours.
PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": None, "LINES": "50"}


def commands() -> list[str]:
    """Names of all commands, in the order of the help."""
    return list(getattr(get_command(app), "commands"))  # noqa: B009


def help_of(*arguments: str) -> str:
    """What ``secateur ARGUMENTS --help`` prints."""
    result = CliRunner().invoke(app, [*arguments, "--help"], prog_name="secateur", env=PLAIN)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())


def page() -> str:
    """The whole page."""
    parts = [HEAD, f"```text\n{help_of()}\n```\n"]
    parts += [f"## secateur {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands()]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
