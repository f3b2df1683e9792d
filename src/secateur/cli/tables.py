"""Tables that the command line prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.errors import printable

if TYPE_CHECKING:
    from secateur.pipeline import PlanResult
    from secateur.rotation.plan import RotationPlan


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    header, rows = tuple(map(printable, header)), [tuple(map(printable, row)) for row in rows]
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
    from secateur.rotation.plan import RotationPlan

    if isinstance(result.plan, RotationPlan):
        _print_slices(result.plan)
        return
    anatomy, ranked = result.plan.anatomy, result.choice.importances
    rows = []
    for cut in result.plan.blocks:
        gone = block_removed(anatomy, cut)
        sizes = ", ".join(
            f"{name.rsplit('.', 1)[-1]} {shape[0]}x{shape[2]}"
            for name, shape in result.plan.shapes(cut).items()
        )
        zeros = sum(cut.notes.get("zeros", {}).values())
        if zeros:
            left = anatomy.block_parameters - gone
            sizes = f"{sizes}{', ' if sizes else ''}{zeros / left:.1%} zeros"
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


def _print_slices(plan: RotationPlan) -> None:
    """Blocks of a sliced hidden width, and what the directions that stay hold of the stream."""
    from secateur.rotation.stages import KEPT

    rows = []
    for cut in plan.blocks:
        widths = plan.cut.widths(plan.anatomy, plan.stream, cut.source)
        shares = cut.notes[KEPT]
        rows.append(
            (
                str(cut.source),
                f"{plan.block_gone(cut) / plan.anatomy.block_parameters:.1%}",
                " ".join(map(str, widths)),
                " ".join(f"{share:.4f}" for share in shares[-len(plan.stream.stages) :]),
            )
        )
    print_table(("block", "removed", "widths of the stream", "kept of its second moment"), rows)
    print()


def _print_slice(plan: RotationPlan) -> None:
    full, kept = plan.stream.width, plan.cut.kept
    parts = [f"the shortcuts of its residuals take {plan.shortcuts:,} parameters"]
    if plan.own_head:
        parts.append(f"the head, until now the embedding, {plan.own_head:,}")
    print(f"hidden width {full} -> {kept} ({kept / full:.1%}): {', '.join(parts)}")


def _why_off(result: PlanResult, gone: int) -> str:
    from secateur.rotation.plan import RotationPlan

    if isinstance(result.plan, RotationPlan):
        return (
            "one width serves the whole model and is rounded down (--set multiple=1 comes closest)"
        )
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
    from secateur.rotation.plan import RotationPlan

    plan = result.plan
    rotated = plan if isinstance(plan, RotationPlan) else None
    before, after, gone = plan.sizes_before(), plan.sizes(), plan.gone
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
    for step in (step for cut in plan.blocks for step in cut.steps):
        print(f"numerics: {step}")
    if result.form.sparsity is not None:
        _print_zeros(result)
        if not gone:
            _print_cost(result)
            return
    whole, name = before.parameters, "the model"
    if rotated is not None and rotated.of == "decoder":  # the rest of the model changes too
        whole, name = before.decoder, "the blocks"
    off = (gone - result.asked) / whole
    print(f"asked {result.asked:,} parameters, reached {gone:,} ({off:+.2%} of {name})")
    if abs(off) > 0.002:
        print(f"the difference is above 0.2 points: {_why_off(result, gone)}")
    if rotated is not None:
        _print_slice(rotated)
    elif _cut_inside(result):
        print(f"FFN widths: multiples of {result.form.multiple} ({result.form.reason})")
    if result.layout_cost is not None:
        free, same = result.layout_cost.get("per-layer"), result.layout_cost["uniform"]
        print(
            f"one width for all blocks: perplexity {math.exp(same):.2f} on held-out windows, with "
            f"widths of their own {math.exp(free):.2f} ({math.expm1(same - free):+.1%})"
            if free is not None
            else f"one width for all blocks: perplexity {math.exp(same):.2f} on held-out windows"
        )
    _print_cost(result)


def _print_zeros(result: PlanResult) -> None:
    """How many weights are zero, and what that is good for."""
    from secateur.methods.sparse import SAME_SIZE

    zeros, decoder = result.plan.zeros, result.plan.sizes().decoder
    asked = f", asked {result.asked:,}" if not result.plan.gone else ""
    print(f"zeros {zeros:,}{asked} ({zeros / decoder:.1%} of the blocks' parameters); {SAME_SIZE}")


def _print_cost(result: PlanResult) -> None:
    print(f"weights {result.bytes_written / 1e6:.1f} MB")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    print(f"took {spent}; peak memory {result.peak_memory / 2**20:.0f} MiB")
