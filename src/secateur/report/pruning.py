"""``report.html`` of one pruned model: what was asked and reached, where, from what, at what cost.

It is the one file of an output folder that differs from run to run, because it says how long the
run took. Everything else in it comes from ``secateur.json``.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint.writer import write_bytes
from secateur.magnitude import said
from secateur.outputs.hf import RECORD
from secateur.plans import STEPS
from secateur.report.charts import Bar, Point, Series, bar_chart, column_chart, key, line_chart
from secateur.report.page import render

if TYPE_CHECKING:
    from secateur.estimate import Estimate
    from secateur.outputs.verify import Verification

PAGE = "report.html"
#: A loss in nats above this is no perplexity that a float can hold.
MOST_LOSS = 700.0


@dataclass(frozen=True)
class RunFacts:
    """What ``secateur.json`` leaves out because it is not the same in every run.

    Attributes:
        source: what the user called the model.
        out: name of the output folder.
        stock: whether stock transformers classes open it.
        bytes_each: of one written parameter.
        seconds: by stage.
        peak_memory: of this process, in bytes.
        estimate: made before the start.
        verification: what the fresh process found, where there was one.
        continued: whether an earlier run did part of the work.
        perplexity: before and after by the name of the text, where both models were evaluated.
        protocol: how, in words.
    """

    source: str
    out: str
    stock: bool
    bytes_each: int
    seconds: Mapping[str, float]
    peak_memory: int
    estimate: Estimate
    verification: Verification | None = None
    continued: bool = False
    perplexity: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    protocol: str = ""


def write_pruning_page(folder: Path, facts: RunFacts) -> None:
    """Write the page into an output folder, or write it anew with what is known by then."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    write_bytes(folder / PAGE, pruning_page(record, facts).encode())


def pruning_page(record: Mapping[str, Any], facts: RunFacts) -> str:
    """The page as text.

    Args:
        record: the content of ``secateur.json``.
    """
    import yaml

    plan = record["plan"]
    blocks = _blocks(record)
    name = facts.source if _is_hub_id(facts.source) else Path(facts.source).name
    errors = _errors(plan["blocks"], len(blocks))
    return render(
        "pruning.html",
        name=name,
        recipe=record["recipe"],
        sizes=_sizes(record, facts.bytes_each),
        asked=record["asked"]["parameters_removed"],
        reached=record["reached"]["parameters_removed"],
        off=_off(record),
        zeros=_zeros(record),
        form=record["form"],
        layout_cost=_layout_cost(record),
        perplexity=[
            (text, f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}")
            for text, (before, after) in facts.perplexity.items()
        ],
        protocol=facts.protocol,
        verification=facts.verification.text() if facts.verification else "",
        shares=_shares_chart(blocks),
        whole=bool(plan["removed_layers"]),
        adds=said(block.get("notes", {}) for block in plan["blocks"]),
        importances=_importance_chart(blocks),
        errors=errors["svg"],
        error_series=errors["series"],
        trials=_trials_chart(record["layer_stage"]["trials"]),
        blocks=blocks,
        steps=[
            f"block {block['source']}, {line}"
            for block in plan["blocks"]
            for line in block.get("notes", {}).get(STEPS, [])
        ],
        calibration=_calibration(record),
        sha256=record["calibration"]["sha256"],
        yaml=yaml.safe_dump(_said(record["recipe"]), sort_keys=False, allow_unicode=True).rstrip(),
        seconds=_seconds_chart(facts.seconds),
        total=f"{sum(facts.seconds.values()):,.0f}",
        memory=_memory_chart(facts),
        continued=facts.continued,
        versions=record["versions"],
        fingerprint=record["source"]["fingerprint"],
        trust="" if facts.stock else ", trust_remote_code=True",
        out=facts.out,
        quoted=shlex.quote(facts.out),
        source=shlex.quote(name),
    )


def _is_hub_id(source: str) -> bool:
    return "/" in source and not Path(source).exists()


def _sizes(record: Mapping[str, Any], bytes_each: int) -> list[tuple[str, str, str, str]]:
    plan = record["plan"]
    rows = []
    for title, name, share in (
        ("parameters", "parameters", "share_removed"),
        ("in decoder blocks", "decoder_parameters", "decoder_share_removed"),
    ):
        before, after = plan[name]["before"], plan[name]["after"]
        rows.append((title, f"{before:,}", f"{after:,}", f"{plan[share]:.2%}"))
    whole, left = (plan["parameters"][when] * bytes_each / 1e6 for when in ("before", "after"))
    rows.append(
        (f"weights at {8 * bytes_each} bits, MB", f"{whole:,.1f}", f"{left:,.1f}", rows[0][3])
    )
    gone = plan["removed_layers"]
    kept = len(plan["blocks"])
    which = f"{len(gone)} ({', '.join(map(str, gone))})" if gone else "0"
    rows.append(("blocks", str(kept + len(gone)), str(kept), which))
    return rows


def _zeros(record: Mapping[str, Any]) -> str:
    """What zeros there are, and what they are good for; empty where none were asked for."""
    from secateur.outputs.card import asked_for

    return asked_for(dict(record)) if "zeros" in record["reached"] else ""


def _off(record: Mapping[str, Any]) -> str:
    gone = record["reached"]["parameters_removed"] - record["asked"]["parameters_removed"]
    return f"{gone / record['plan']['parameters']['before']:+.2%}"


def _calibration(record: Mapping[str, Any]) -> str:
    recipe = record["recipe"]
    spec = recipe["calibration"]
    return (
        f"{spec['samples']} windows of {spec['length']} tokens of "
        f"{record['calibration']['origin']}, seed {recipe['seed']}"
    )


def _layout_cost(record: Mapping[str, Any]) -> str:
    """What one width for all blocks costs, where both layouts were tried."""
    cost = record["form"].get("held_out_loss", {})
    if len(cost) < 2:
        return ""
    rise = math.expm1(cost["uniform"] - cost["per-layer"])
    return (
        f"One width for all blocks costs {rise:.1%} of perplexity against own widths, on "
        "calibration windows kept out of the statistics."
    )


def _said(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what was left open."""
    return {
        key: _said(value) if isinstance(value, Mapping) else value
        for key, value in recipe.items()
        if value is not None
    }


# ---- block by block ------------------------------------------------------------------------------


def _blocks(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every block of the original, removed ones too."""
    plan = record["plan"]
    left = {block["source"]: block for block in plan["blocks"]}
    importances = record["layer_stage"]["importances"]
    found: list[dict[str, Any]] = []
    for number in sorted([*left, *plan["removed_layers"]]):
        block = left.get(number)
        importance = importances.get(str(number))
        found.append(
            {
                "number": number,
                "share": None if block is None else block["share_removed"],
                "importance": importance,
                "importance_text": "" if importance is None else f"{importance:.4f}",
                "removed": "whole" if block is None else f"{block['share_removed']:.1%}",
                "sizes": "" if block is None else _left(block["shapes"]),
                "errors": "" if block is None else _error_text(block),
            }
        )
    return found


def _left(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(
        f"{name.rsplit('.', 1)[-1]} {shape[0]}×{shape[2]}" for name, shape in shapes.items()
    )


def _error_text(block: Mapping[str, Any]) -> str:
    errors = _layer_errors(block)
    return ", ".join(f"{name.rsplit('.', 1)[-1]} {100 * v:.2f}" for name, v in errors.items())


def _layer_errors(block: Mapping[str, Any]) -> dict[str, float]:
    """The errors of a block's linear layers, where its method notes them so.

    Notes are each method's own, and a finished run must not fail at its page.
    """
    found = block.get("notes", {}).get("error")
    if not isinstance(found, Mapping):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _shares_chart(blocks: Sequence[Mapping[str, Any]]) -> str:
    notes = [f"block {b['number']}: {b['removed']} removed" for b in blocks]
    return column_chart(
        [b["share"] for b in blocks],
        x_title="block",
        y_title="removed of its parameters, %",
        notes=notes,
    )


def _importance_chart(blocks: Sequence[Mapping[str, Any]]) -> str:
    points = [
        Point(b["number"], b["importance"], note=f"block {b['number']}, {b['importance']:.4f}")
        for b in blocks
        if b["importance"] is not None and b["importance"] > 0
    ]
    if not points:
        return ""
    return line_chart(
        [Series("importance", points)], x_title="block", y_title="importance", log=True,
        places=len(blocks), height=220,
    )  # fmt: skip


def _errors(blocks: Sequence[Mapping[str, Any]], places: int) -> dict[str, Any]:
    """Relative squared error of each cut linear layer, where the method says it."""
    found: dict[str, list[Point]] = {}
    for block in blocks:
        for name, value in _layer_errors(block).items():
            note = f"block {block['source']}, {100 * value:.2f}%"
            found.setdefault(name, []).append(Point(block["source"], 100 * value, note=note))
    series = [Series(name, points, number) for number, (name, points) in enumerate(found.items())]
    if not series:
        return {"svg": "", "series": []}
    svg = line_chart(
        series, x_title="block", y_title="error of the layer's output, %", y_zero=True,
        places=places, height=220,
    )  # fmt: skip
    return {
        "svg": svg,
        "series": [{"label": one.label, "key": key(one.number)} for one in series],
    }


def _trials_chart(trials: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Perplexity by number of removed blocks: a choice among numbers, or one greedy way down."""
    held_out = all("held_out_loss" in trial for trial in trials)
    losses = [trial["held_out_loss" if held_out else "loss"] for trial in trials]
    if len(trials) < 2 or not all(loss < MOST_LOSS for loss in losses):
        return {}
    points = [
        Point(
            trial["layers"],
            math.exp(loss),
            note=f"{trial['layers']:.0f} blocks removed, {math.exp(loss):.2f}",
        )
        for trial, loss in zip(trials, losses, strict=True)
    ]
    svg = line_chart(
        [Series("perplexity", points)],
        x_title="whole blocks removed",
        y_title=f"perplexity on {'held-out' if held_out else 'calibration'} windows",
        places=len(points),
        height=220,
    )
    caption = (
        "How the number of whole blocks was chosen: the same share removed each time, judged on "
        "windows kept out of the statistics."
        if held_out
        else "What the removal of each further block did, on the calibration windows."
    )
    return {"svg": svg, "caption": caption}


# ---- what it took --------------------------------------------------------------------------------


def _seconds_chart(seconds: Mapping[str, float]) -> str:
    bars = [Bar(name, value, f"{value:,.1f} s") for name, value in seconds.items()]
    return bar_chart(bars, title="Seconds by stage") if bars else ""


def _memory_chart(facts: RunFacts) -> str:
    mib = 2**20
    bars = [Bar("measured, all", facts.peak_memory, f"{facts.peak_memory / mib:,.0f} MiB", 1)]
    estimate = facts.estimate
    bars.append(Bar("estimated, all", estimate.memory, f"{estimate.memory / mib:,.0f} MiB"))
    bars += [
        Bar(name, size, f"{size / mib:,.0f} MiB") for name, size in estimate.parts.items() if size
    ]
    return bar_chart(bars, title="Peak memory")
