"""Rows that exist only to feed inputs of other layers: which are left, and what goes with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.anatomy import Anatomy, Coupling

Tensors = dict[str, torch.Tensor]


def group_inputs(anatomy: Anatomy, groups: torch.Tensor) -> torch.Tensor:
    """Inputs of the attention output that these KV groups make, ascending."""
    return _spread(groups, anatomy.heads_per_group * anatomy.head_size)


def _spread(units: torch.Tensor, width: int) -> torch.Tensor:
    """All places of units that are ``width`` places wide each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def with_readers(anatomy: Anatomy, inputs: Mapping[str, torch.Tensor]) -> Tensors:
    """Kept inputs of whole units: also of the other layers that read them."""
    found = dict(inputs)
    for coupling in anatomy.family.couplings:
        if coupling.consumer in inputs:
            found |= dict.fromkeys(coupling.readers, inputs[coupling.consumer])
    return found


def live_rows(
    anatomy: Anatomy, inputs: Mapping[str, torch.Tensor], groups: torch.Tensor | None = None
) -> Tensors:
    """Rows that still feed something, for every layer and other tensor that loses any.

    Args:
        inputs: kept inputs by layer.
        groups: kept KV groups, where whole groups go: their queries and keys go with them.
    """
    rows: Tensors = {}
    for coupling in anatomy.family.couplings:
        kept = inputs.get(coupling.consumer)
        if kept is None:
            continue
        if coupling.kind == "values" and groups is not None:
            in_group = _spread(groups, anatomy.head_size)
            rows |= dict.fromkeys(coupling.queries, kept)
            rows |= dict.fromkeys(coupling.keys, in_group)
            rows |= _laid_out(anatomy, coupling, in_group, groups)
            continue
        if coupling.kind == "values":
            if coupling.norm:
                continue
            head, dimension = kept // anatomy.head_size, kept % anatomy.head_size
            group = head // anatomy.heads_per_group
            kept = (group * anatomy.head_size + dimension).unique()
        elif not in_whole_units(coupling, inputs, groups):
            continue
        rows |= _laid_out(anatomy, coupling, kept, None)
    return rows


def norm_scales(anatomy: Anatomy, rows: Mapping[str, torch.Tensor]) -> Tensors:
    """Factors of the kept rows of norms that see k of n units, (k,) float32.

    With the others zero, the norm of all divides by sqrt(S / n + eps), S the sum of squares; the
    norm of the kept by sqrt(S / k + eps n / k), given that epsilon, which is sqrt(n / k) of it.
    """
    norms = [c.norm for c in anatomy.family.couplings if c.norm in rows]
    return {
        name: torch.full_like(rows[name], 1, dtype=torch.float32)
        * (anatomy.tensors[name].rows / len(rows[name])) ** 0.5
        for name in norms
        if name is not None
    }


def in_whole_units(
    coupling: Coupling, inputs: Mapping[str, torch.Tensor], groups: torch.Tensor | None
) -> bool:
    """Whether the rows that feed ``coupling.consumer`` went together with its inputs.

    So they did where all layers that read the units have lost the same of them.
    """
    if coupling.kind == "values":
        return groups is not None
    kept = inputs.get(coupling.consumer)
    return kept is not None and all(
        name in inputs and torch.equal(inputs[name], kept) for name in coupling.readers
    )


def _laid_out(
    anatomy: Anatomy, coupling: Coupling, kept: torch.Tensor, units: torch.Tensor | None
) -> Tensors:
    """Kept rows of the producers and other tensors, where any go."""
    rows: Tensors = {}
    for name in (*coupling.producers, *(t for t in coupling.tensors if t in anatomy.tensors)):
        if name not in coupling.layout:  # one row for each of what is kept
            left, full = kept, row_count(anatomy, name)
        else:
            parts, full = [], 0
            for span, width in anatomy.spans(coupling, name):
                of = kept if span == "inputs" else units if span == "units" else None
                of = torch.arange(width, device=kept.device) if of is None else of
                parts.append(of + full)
                full += width
            left = torch.cat(parts)
        if len(left) < full:
            rows[name] = left
    return rows


def row_count(anatomy: Anatomy, name: str) -> int:
    """Rows of a linear layer or of another tensor."""
    return anatomy.denses[name].rows if name in anatomy.denses else anatomy.tensors[name].rows


def removed_by_counts(anatomy: Anatomy, inputs: Mapping[str, int], rows: Mapping[str, int]) -> int:
    """Parameters gone when layers and other tensors keep these numbers of inputs and rows."""
    gone = 0
    for name in {*inputs, *rows}:
        if name in anatomy.tensors:
            shape = anatomy.tensors[name]
            gone += (shape.rows - rows[name]) * shape.each
            continue
        dense = anatomy.denses[name]
        left_in = inputs.get(name, dense.inputs)
        left_out = rows.get(name, dense.rows)
        gone += dense.parameters - left_in * left_out - (left_out if dense.bias else 0)
    return gone
