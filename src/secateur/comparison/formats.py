"""A comparison for people and for programs: Markdown, CSV, JSON; the page is the report's."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.checkpoint.writer import write_bytes, write_json
from secateur.comparison.table import Table, short_name


def write_tables(folder: Path, table: Table) -> None:
    """``compare.md``, ``compare.csv``, ``compare.json`` and ``report.html``."""
    from secateur.report.comparison import comparison_page

    write_bytes(folder / "compare.md", markdown(table).encode())
    write_bytes(folder / "compare.csv", comma_separated(table).encode())
    write_json(folder / "compare.json", as_json(table))
    write_bytes(folder / "report.html", comparison_page(table).encode())


def markdown(table: Table) -> str:
    """The table, and below it under which conditions it holds."""
    head = ["", "asked", *(column.title for column in table.columns)]
    lines = [_line(head), _line(["---", "---", *("---:" for _ in table.columns)])]
    remarks: list[str] = []
    for row in table.rows:
        cells = row.texts(table.columns)
        lines.append(_line([row.label, row.asked, *cells]))
        remarks += [f"- {row.label}, {row.asked}: {remark}" for remark in row.remarks()]
    text = f"# {table.settings['source']['name']}, pruned in {len(table.rows) - 1} ways\n\n"
    text += "\n".join(lines) + "\n"
    if remarks:
        text += "\n" + "\n".join(remarks) + "\n"
    return text + "\n" + "\n".join(f"- {line}" for line in conditions(table)) + "\n"


def conditions(table: Table) -> list[str]:
    """What a number of the table is worth nothing without, a sentence each."""
    settings = table.settings
    found = protocols(settings)
    found += zero_shot_protocol(table)
    found += [f"{who}." for who in _calibrations(table)]
    seeds = sorted({seed for row in table.rows for seed in row.seeds})
    if len(seeds) > 1:
        found.append(
            f"Medians over the seeds {', '.join(map(str, seeds))}, with the smallest and the "
            "largest value in parentheses."
        )
    found.append(
        "Shares are counted from the plan of what was written. Seconds and peak memory are of "
        f"pruning alone, each cell in a process of its own, {settings['threads']} "
        f"thread{'s' if settings['threads'] > 1 else ''} on {settings['device']}; memory without "
        "the pages of mapped files."
    )
    if any(cell.get("continued") for cell in table.cells):
        those = [cell["name"] for cell in table.cells if cell.get("continued")]
        found.append(
            f"Interrupted and continued, with the seconds of all parts: {', '.join(those)}."
        )
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    found.append(f"Versions: {versions}.")
    return found


def protocols(settings: Mapping[str, Any]) -> list[str]:
    """How perplexity was measured, a sentence for each text."""
    return [
        f"Perplexity on {short_name(text)} ({about['origin']}): {about['windows']} windows of "
        f"{about['length']} tokens, {about['predictions']:,} predictions, float32."
        for text, about in settings["evaluation"].items()
    ]


def zero_shot_protocol(table: Table) -> list[str]:
    """How accuracy was measured, of which items and how exactly; empty without tasks."""
    tasks = table.settings.get("tasks", {})
    if not tasks:
        return []
    about = next(iter(tasks.values()))  # of one command, so origin and version are those of all
    where = "the hub" if about["origin"] == "hub" else about["origin"]
    asked = "; ".join(items_text(table, task) for task in tasks)
    found = (
        f"Zero-shot accuracy by lm-eval {about['lm_eval']}, items from {where}, no "
        f"examples in the prompt, float32: {asked}."
    )
    errors = [error for task in tasks if (error := largest_error(table, task)) is not None]
    if errors:
        found += f" The largest standard error of an acc is {100 * max(errors):.1f} points."
    if len(tasks) > 1:
        found += " The mean is that of acc, each task counted once."
    return [found]


def items_text(table: Table, task: str) -> str:
    """``piqa, the first 20 of 1,838 items``."""
    score, limit = table.cells[0]["scores"][task], table.settings["tasks"][task]["limit"]
    items, of = score["items"], score["of"]
    if items == of:
        return f"{task}, all {of:,} items"
    if score["subjects"] > 1:
        each = f"the first {limit:,} of each of {score['subjects']} subjects"
        return f"{task}, {each}, {items:,} of {of:,} items"
    return f"{task}, the first {items:,} of {of:,} items"


def largest_error(table: Table, task: str) -> float | None:
    """Of ``acc``, from 0 to 1, over all models; None for a single item."""
    scores = [cell["scores"][task] for cell in table.cells if task in cell.get("scores", {})]
    errors = [score["acc_error"] for score in scores if score["acc_error"] is not None]
    return max(errors, default=None)


def _calibrations(table: Table) -> list[str]:
    """How the settings were calibrated; said once where it is the same for all."""
    by_text: dict[str, list[str]] = {}
    for cell in table.cells:
        if "recipe" in cell:
            spec = cell["recipe"]["calibration"]
            text = f"{spec['samples']} windows of {spec['length']} tokens of {spec['source']}"
            by_text.setdefault(text, []).append(cell["label"])
    if len(by_text) == 1:
        return [f"Calibration: {text}" for text in by_text]
    return [
        f"Calibration of {', '.join(dict.fromkeys(labels))}: {text}"
        for text, labels in by_text.items()
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def comma_separated(table: Table) -> str:
    """One line a cell, numbers in full: shares and accuracies from 0 to 1, seconds, bytes."""
    buffer = io.StringIO()
    keys = [column.key for column in table.columns]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["setting", "method", "asked", "seed", *keys, "failed"])
    for cell in table.cells:
        numbers = [cell["measures"].get(key, "") for key in keys]
        method = cell.get("recipe", {}).get("method", "")
        about = [cell["label"], method, cell.get("asked", ""), cell.get("seed", "")]
        writer.writerow([*about, *numbers, cell.get("failed", "")])
    return buffer.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    """All there is to know, numbers in full."""
    source = {k: v for k, v in table.settings["source"].items() if k != "files"}
    return {
        "format": 1,
        "settings": {**table.settings, "source": source},
        "columns": [asdict(column) for column in table.columns],
        "rows": [
            {
                "label": row.label,
                "asked": row.asked,
                "seeds": list(row.seeds),
                "values": {key: asdict(spread) for key, spread in row.values.items()},
                "failed": {str(seed): why for seed, why in row.failed.items()},
                "waiting": list(row.waiting),
            }
            for row in table.rows
        ],
        "cells": table.cells,
    }
