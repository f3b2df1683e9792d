"""The command line: one thin command per verb. It reads options, calls the library, prints."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import typer

from secateur.cli import comparing, healing, look, outputs, prune
from secateur.errors import INTERRUPTED, Ended, end_on_signals, one_line

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a language model smaller, on this machine, without training it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _quietly(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with transformers silenced when it runs."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        from secateur.progress import quiet

        quiet()
        command(**options)

    return run


_COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune.prune,
    "plan": prune.plan,
    "inspect": look.inspect,
    "eval": look.evaluate,
    "compare": comparing.compare,
    "export": outputs.export,
    "verify": outputs.verify,
    "bench": outputs.bench,
    "heal": healing.heal,
    "demo": prune.demo,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_quietly(_command))


def _forget_stdout() -> None:
    """Let what is still to be flushed at the end go nowhere, instead of failing there."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point: run a command; a user's mistake becomes one line and exit code 2."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        with end_on_signals():
            code = app(arguments, standalone_mode=False)
        sys.stdout.flush()  # here, where it can be said that nobody reads it any more
        if code == INTERRUPTED:  # typer makes this of Ctrl-C, and says nothing
            raise KeyboardInterrupt
    except BrokenPipeError:  # who reads has had enough, as head has
        _forget_stdout()
        code = 1  # as click ends where it meets this first
    except (Exception, KeyboardInterrupt, Ended) as error:
        if hasattr(error, "format_message"):  # typer's own: unknown options, missing arguments
            text, code = error.format_message().rstrip(".") + "; see secateur --help", 2
        elif isinstance(error, typer.Abort):
            text, code = one_line(KeyboardInterrupt())
        else:
            text, code = one_line(error)
        print(f"error: {text}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
