"""Tables that the command line prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.pipeline import PlanResult


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    numeric = [
        bool(rows) and all(row[i][:1].isdigit() or row[i][:1] in "-–" for row in rows)
        for i in range(len(header))
    ]
    for row in [header, *rows] if any(header) else rows:
        cells = [
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())


def print_blocks(result: PlanResult) -> None:
    from secateur.plans import block_removed

    anatomy, ranked = result.plan.anatomy, result.choice.importances
    rows = []
    for cut in result.plan.blocks:
        gone = block_removed(anatomy, cut)
        sizes = ", ".join(
            f"{name.rsplit('.', 1)[-1]} {shape[0]}x{shape[2]}"
            for name, shape in result.plan.shapes(cut).items()
        )
        rows.append(
            (
                str(cut.source),
                f"{ranked[cut.source]:.4f}" if cut.source in ranked else "–",
                f"{gone / anatomy.block_parameters:.1%}",
                sizes or "as it was",
            )
        )
    print_table(("block", "importance", "removed", "inputs x rows left"), rows)
    print()


def _why_off(result: PlanResult, gone: int) -> str:
    if not _cut_inside(result):
        block = result.plan.anatomy.block_parameters
        return f"blocks go whole, {block:,} parameters each"
    if result.form.uniform and result.form.multiple > 1:
        return (
            f"all {len(result.plan.blocks)} widths go in steps of {result.form.multiple} together; "
            "try --round-to 1, or another --layers"
        )
    if result.form.structure == "coupled":
        each = f", and FFN neurons {result.form.multiple} at a time"
        return "KV groups go whole" + (each if result.form.multiple > 1 else "")
    if gone > result.asked:
        return "count: columns leaves dead rows out of the target"
    return "no remaining layer could lose another input"


def _cut_inside(result: PlanResult) -> bool:
    return any(cut.inputs for cut in result.plan.blocks)


def print_result(result: PlanResult) -> None:
    plan = result.plan
    before, after = plan.sizes_before(), plan.sizes()
    gone = before.parameters - after.parameters
    print_table(
        ("", "before", "after", "removed"),
        [
            (
                "parameters",
                f"{before.parameters:,}",
                f"{after.parameters:,}",
                f"{after.share_removed(before):.2%}",
            ),
            (
                "in decoder blocks",
                f"{before.decoder:,}",
                f"{after.decoder:,}",
                f"{after.decoder_share_removed(before):.2%}",
            ),
            (
                "blocks",
                str(plan.anatomy.layers),
                str(len(plan.blocks)),
                ", ".join(map(str, plan.removed_layers)) or "none",
            ),
        ],
    )
    off = (gone - result.asked) / before.parameters
    print(f"asked {result.asked:,} parameters, reached {gone:,} ({off:+.2%} of the model)")
    if abs(off) > 0.002:
        print(f"the difference is above 0.2 points: {_why_off(result, gone)}")
    if _cut_inside(result):
        print(f"FFN widths: multiples of {result.form.multiple} ({result.form.reason})")
    if result.layout_cost is not None:
        free, same = result.layout_cost.get("per-layer"), result.layout_cost["uniform"]
        print(
            f"one width for all blocks: perplexity {math.exp(same):.2f} on held-out windows, with "
            f"widths of their own {math.exp(free):.2f} ({math.expm1(same - free):+.1%})"
            if free is not None
            else f"one width for all blocks: perplexity {math.exp(same):.2f} on held-out windows"
        )
    print(f"weights {result.bytes_written / 1e6:.1f} MB")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    print(f"took {spent}; peak memory {result.peak_memory / 2**20:.0f} MiB")
