"""``report.html`` of a comparison: its table and what can be seen in pictures."""

from __future__ import annotations

import math
import shlex
from typing import Any

from secateur.comparison.formats import conditions, items_text, largest_error
from secateur.comparison.table import MEAN, Column, Row, Table, short_name
from secateur.report.charts import (
    Bar,
    Point,
    Series,
    Stripe,
    bar_chart,
    depth_key,
    heat_map,
    key,
    line_chart,
)
from secateur.report.page import render


def comparison_page(table: Table) -> str:
    """The page of a comparison as far as it has come."""
    columns = {column.key: column for column in table.columns}
    measured = [row for row in table.rows[1:] if row.values]
    labels = list(dict.fromkeys(row.label for row in table.rows[1:]))
    layers = _layers(table)
    waiting = sum(len(row.waiting) for row in table.rows)
    shown = [cell for cell in table.cells if "recipe" in cell]
    return render(
        "comparison.html",
        name=table.settings["source"]["name"],
        lead=_lead(table, labels),
        waiting=waiting,
        columns=table.columns,
        rows=[
            {
                "label": row.label,
                "asked": row.asked,
                "numbers": [
                    row.values[c.key].texts(c) if c.key in row.values else ("", "")
                    for c in table.columns
                ]
                if row.values
                else [],
                "remarks": row.remarks(),
                "failed": bool(row.failed),
                "begins": before is None or before.asked != row.asked,
            }
            for before, row in zip([None, *table.rows], table.rows, strict=False)
        ],
        remarks=[
            f"{row.label}, {row.asked}: {remark}"
            for row in measured
            if row.failed
            for remark in row.remarks()
        ],
        series=[{"label": label, "key": key(number)} for number, label in enumerate(labels)],
        quality=_quality(table, measured, labels) if measured else [],
        accuracy=_accuracy(table, measured, labels) if measured else [],
        spread=any(len(row.seeds) > 1 for row in measured),
        layers=layers,
        depth_key=depth_key(),
        costs=_costs(columns, measured, labels),
        conditions=conditions(table),
        command=_command(table, shown[0]["name"]) if shown else "",
        cells=[
            {"name": cell["name"], "about": f"{cell['label']}, {cell['asked']}"} for cell in shown
        ],
    )


def _lead(table: Table, labels: list[str]) -> str:
    source = table.settings["source"]
    return (
        f"{source['parameters']:,} parameters in {source['blocks']} blocks "
        f"({source['decoder_parameters']:,} of them in the blocks), pruned without training by "
        f"{', '.join(labels)}. The dense model is the first row."
    )


def _command(table: Table, name: str) -> str:
    source = shlex.quote(table.settings["source"]["name"])
    recipe = shlex.quote(f"recipes/{name}.yaml")
    return f"secateur prune {source} --recipe {recipe} --out {shlex.quote(name)}"


def _share(table: Table) -> Column:
    """The share that the horizontal axis is of: what the command asked for."""
    columns = {column.key: column for column in table.columns}
    measured = [row for row in table.rows[1:] if row.values]
    if measured and all("zeros" in row.values for row in measured):
        return columns["zeros"]
    decoder = all("decoder" in row.asked for row in table.rows[1:])
    return columns["decoder_share_removed" if decoder else "share_removed"]


def _quality(table: Table, rows: list[Row], labels: list[str]) -> list[dict[str, str]]:
    """Perplexity over the share, a picture for each text."""
    charts = []
    for text, about in table.settings["evaluation"].items():
        title = f"perplexity on {short_name(text)}"
        svg = _over_share(table, rows, labels, f"perplexity {text}", title, log=True)
        caption = f"{about['origin']}, {about['windows']} windows of {about['length']} tokens"
        charts += [{"svg": svg, "caption": caption}] if svg else []
    return charts


def _accuracy(table: Table, rows: list[Row], labels: list[str]) -> list[dict[str, str]]:
    """Accuracy over the share, a picture for each task; their mean first."""
    tasks = list(table.settings.get("tasks", {}))
    charts = []
    if len(tasks) > 1:
        svg = _over_share(table, rows, labels, MEAN, "mean acc, %")
        charts += [{"svg": svg, "caption": f"the mean over {', '.join(tasks)}"}] if svg else []
    for task in tasks:
        svg = _over_share(table, rows, labels, f"acc {task}", f"acc on {task}, %")
        error = largest_error(table, task)
        exact = "" if error is None else f"; standard errors up to {100 * error:.1f} points"
        charts += [{"svg": svg, "caption": items_text(table, task) + exact}] if svg else []
    return charts


def _over_share(
    table: Table, rows: list[Row], labels: list[str], key: str, title: str, log: bool = False
) -> str:
    """A measure over the share that was asked for; empty where no row has it.

    Args:
        key: of the measure's column, in whose unit it is drawn.
        title: of the upright axis.
        log: of that axis.
    """
    share = _share(table)
    of = "all parameters" if share.key == "share_removed" else "the decoder's parameters"
    done = "made zero" if share.key == "zeros" else "removed"
    column = next(c for c in table.columns if c.key == key)
    name = title.removesuffix(", %")
    dense = table.rows[0].values[key].median
    series = []
    for number, label in enumerate(labels):
        points = [
            Point(
                100 * row.values[share.key].median,
                column.scale * spread.median,
                column.scale * spread.low,
                column.scale * spread.high,
                f"{row.asked} asked, {row.values[share.key].text(share)}% of {of} {done}, "
                f"{name} {spread.text(column)}",
            )
            for row in rows
            if row.label == label
            and key in row.values
            and math.isfinite((spread := row.values[key]).high)
        ]
        if points:
            series.append(Series(label, points, number))
    if not series:
        return ""
    return line_chart(
        series,
        x_title=f"{done} of {of}, %",
        y_title=title,
        log=log,
        baseline=(f"dense {column.text(dense)}", column.scale * dense),
    )


def _layers(table: Table) -> dict[str, str]:
    """The heat map of the first seed of each row, what its depths mean, and that seed."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in table.cells:
        if "blocks" in cell:
            first.setdefault((cell["label"], cell["asked"]), cell)
    if not first:
        return {}
    count = table.settings["source"]["blocks"]
    most = max(b["share_removed"] for cell in first.values() for b in cell["blocks"])
    top = max(0.2, math.ceil(most * 5 - 1e-9) / 5)  # a fifth, two fifths, ...
    stripes = []
    for (label, asked), cell in first.items():
        left = {block["block"]: block["share_removed"] for block in cell["blocks"]}
        shares = [left.get(block) for block in range(count)]
        who = f"{label}, {asked}"
        notes = [
            f"{who}: block {block} " + ("removed whole" if share is None else f"loses {share:.1%}")
            for block, share in enumerate(shares)
        ]
        stripes.append(Stripe(f"{label} {asked.split(' ')[0]}", shares, notes))
    seeds = {cell["seed"] for cell in first.values()}
    several = len({cell["seed"] for cell in table.cells if "seed" in cell}) > 1
    title = "Share of each block that was removed"
    return {
        "svg": heat_map(stripes, top=top, x_title="block", title=title),
        "depths": ", ".join(f"{25 * top * step:g}" for step in range(5)) + "%",
        "seed": ", ".join(map(str, sorted(seeds))) if several else "",
    }


def _costs(columns: dict[str, Column], rows: list[Row], labels: list[str]) -> list[dict[str, str]]:
    charts = []
    for name, title in (
        ("seconds", "Time to prune, seconds"),
        ("peak_memory", "Peak memory of pruning, MiB"),
        ("gpu_peak_memory", "Peak memory on the GPU, MiB"),
    ):
        bars = [
            Bar(
                f"{row.label} {row.asked.split(' ')[0]}",
                row.values[name].median,
                row.values[name].text(columns[name]),
                labels.index(row.label),
            )
            for row in rows
            if name in row.values and name in columns
        ]
        if bars:
            charts.append({"title": title, "svg": bar_chart(bars, title=title)})
    return charts
