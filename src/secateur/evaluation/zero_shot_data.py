"""Local files of the zero-shot tasks, read into the rows that lm-eval's own definitions expect.

Only the data is ours. Prompts, choices and measures stay those of lm-eval, so that a number here
means what it means elsewhere.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SourceError

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class LocalTask:
    """Where a task's items lie on disk.

    Attributes:
        files: names below ``--data-dir``, or below its folder ``zeroshot``.
        split: the split that lm-eval takes its items from.
        read: from the texts of the files to lm-eval's rows.
    """

    files: tuple[str, ...]
    split: str
    read: Callable[..., Rows]


def _json_lines(text: str) -> Rows:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _boolq(text: str) -> Rows:
    return [
        {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}
        for row in _json_lines(text)
    ]


def _piqa(text: str, labels: str) -> Rows:
    answers = [int(line) for line in labels.split()]
    return [
        {**{key: row[key] for key in ("goal", "sol1", "sol2")}, "label": label}
        for row, label in zip(_json_lines(text), answers, strict=True)
    ]


def _sciq(text: str) -> Rows:
    keys = ("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer")
    return [{key: row[key] for key in keys} for row in _json_lines(text)]


def _winogrande(text: str) -> Rows:
    keys = ("sentence", "option1", "option2", "answer")
    return [{key: row[key] for key in keys} for row in _json_lines(text)]


def _logiqa(text: str) -> Rows:
    """Eight lines an item: blank, letter of the answer, context, question, four options."""
    lines = text.rstrip("\n").split("\n")
    if len(lines) % 8:
        raise ValueError(f"{len(lines)} lines are not eight for each item")

    def spaced(line: str) -> str:  # the file runs sentences together, the hub's copy does not
        return line.replace(".", ". ").strip()

    return [
        {
            "label": lines[start + 1].strip(),
            "context": spaced(lines[start + 2]),
            "question": spaced(lines[start + 3]),
            "options": [spaced(line[2:]) for line in lines[start + 4 : start + 8]],
        }
        for start in range(0, len(lines), 8)
    ]


def _mmlu(text: str) -> Rows:
    """Six columns without a head: question, four choices, letter of the answer."""
    return [
        {"question": question, "choices": choices, "answer": "ABCD".index(letter)}
        for question, *choices, letter in csv.reader(io.StringIO(text))
    ]


MMLU = "mmlu"
MMLU_FILES = "mmlu_test/*_test.csv"
LOCAL: dict[str, LocalTask] = {
    "boolq": LocalTask(("boolq_dev.jsonl",), "validation", _boolq),
    "piqa": LocalTask(("piqa_valid.jsonl", "piqa_valid-labels.lst"), "validation", _piqa),
    "sciq": LocalTask(("sciq_test.jsonl",), "test", _sciq),
    "winogrande": LocalTask(("winogrande_dev.jsonl",), "validation", _winogrande),
    "logiqa": LocalTask(("logiqa1_Test.txt",), "test", _logiqa),
    MMLU: LocalTask((MMLU_FILES,), "test", _mmlu),
}


def read_local(task: str, data_dir: str | Path) -> dict[str, Rows]:
    """The items of ``task`` by the name of the lm-eval task; for mmlu one for each subject.

    Raises:
        SourceError: a file is missing, or does not hold what it should.
    """
    described = LOCAL[task]
    folder = Path(data_dir).expanduser()
    if (folder / "zeroshot").is_dir():
        folder = folder / "zeroshot"
    if task == MMLU:
        paths = sorted(folder.glob(MMLU_FILES))
        if not paths:
            raise _missing(task, MMLU_FILES, folder)
        return {
            f"mmlu_{path.name.removesuffix('_test.csv')}": _read(described, [path])
            for path in paths
        }
    paths = [folder / name for name in described.files]
    for path in paths:
        if not path.is_file():
            raise _missing(task, path.name, folder)
    return {task: _read(described, paths)}


def rows_sha256(rows: dict[str, Rows]) -> str:
    """Of a task's items as :func:`read_local` gives them."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _missing(task: str, file: str, folder: Path) -> SourceError:
    return SourceError(
        f"task {task} needs {file}, which is not in {folder}: put it there, or leave out "
        "--data-dir to fetch the task from the hub"
    )


def _read(described: LocalTask, paths: list[Path]) -> Rows:
    try:
        # newline="": a quoted field of a CSV file may hold ends of line.
        texts = [path.open(encoding="utf-8-sig", newline="").read() for path in paths]
        rows = described.read(*texts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"task file {paths[0]} cannot be read ({type(error).__name__}: {error}): fetch it "
            "again; docs/zero-shot.md says what it should hold"
        ) from error
    if not rows:
        raise SourceError(f"task file {paths[0]} holds no items: fetch it again")
    return rows
