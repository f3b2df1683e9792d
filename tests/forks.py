"""Runs of ``prune`` in forks of one process, which may be killed at any moment; see test_kill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from test_kill import SERVER

from secateur.recipe import Recipe


@contextmanager
def forks(source: Path, recipe: Callable[[str], Recipe]) -> Iterator[Any]:
    """Prune ``source`` by the recipe of a case, to its end or to the moment of its death.

    Yields:
        a function of the case, the output and the moment (None: to the end), which returns the exit
        status and the names of the moments that have passed.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(case: str, out: Path, at: int | None = None) -> tuple[int, list[str]]:
        request = {
            "source": str(source), "out": str(out), "at": at, "recipe": recipe(case).model_dump(),
        }  # fmt: skip
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        said = answer["said"] or {"error": None, "moments": []}
        assert said["error"] is None
        return answer["status"], said["moments"]

    yield ask
    server.stdin.close()
    assert server.wait(timeout=60) == 0
