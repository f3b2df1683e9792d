"""English text that comes with every Python: the documentation in its standard library.

About two million characters under the licence of Python itself, so that a model trained on it may
be kept and passed on. Which words there are depends on the version of Python.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: Parts of the library without documentation in English, or made by others.
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
#: Modules whose documentation is only measured on.
HELD_OUT = ("argparse", "decimal", "pathlib", "statistics", "turtle", "zipfile")


def documents() -> tuple[list[str], list[str]]:
    """Documentation to train on, and that of :data:`HELD_OUT`: a module a document."""
    from pydoc_data.topics import topics

    train, held_out = [], []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _LEFT_OUT & set(inside.parts) or inside.parts[0].startswith("config-"):
            continue
        text = "\n\n".join(_docstrings(path))
        if text:
            (held_out if inside.parts[0].split(".")[0] in HELD_OUT else train).append(text)
    # The chapters of the language reference that help() shows.
    return train + [topics[name] for name in sorted(topics)], held_out


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
