"""The plan: which blocks, inputs and rows stay, with which scales. The only truth downstream.

Writers, the verifier and the reports take sizes and indices from here and from nowhere else, so
that config, tensors and numbers cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.anatomy import Anatomy

Tensors = dict[str, torch.Tensor]


@dataclass
class BlockCut:
    """What stays of one block. A layer that is not named keeps everything.

    Attributes:
        source: number of the block in the original model.
        inputs: kept inputs of a linear layer, ascending, (q',) int64.
        scales: factor of each kept input, (q',) float32.
        rows: kept rows of a linear layer, ascending, (p',) int64.
        notes: what happened, for the report: errors, thresholds, fallbacks.
    """

    source: int
    inputs: Tensors = field(default_factory=dict)
    scales: Tensors = field(default_factory=dict)
    rows: Tensors = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """All tensors under flat names, for a file."""
        parts = {"inputs": self.inputs, "scales": self.scales, "rows": self.rows}
        # Coupled layers share one index tensor; a file wants each name to have its own.
        return {f"{k}.{name}": t.clone() for k, named in parts.items() for name, t in named.items()}

    @classmethod
    def of(
        cls, source: int, tensors: Mapping[str, torch.Tensor], notes: dict[str, Any]
    ) -> BlockCut:
        """The reverse of :meth:`tensors`."""
        cut = cls(source, notes=notes)
        for flat, tensor in tensors.items():
            kind, name = flat.split(".", 1)
            getattr(cut, kind)[name] = tensor
        return cut


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, those in decoder blocks, and bytes of the weights as stored."""

    parameters: int
    decoder: int

    def share_removed(self, before: Sizes) -> float:
        return 1 - self.parameters / before.parameters

    def decoder_share_removed(self, before: Sizes) -> float:
        return 1 - self.decoder / before.decoder if before.decoder else 0.0


@dataclass
class Plan:
    """What stays of a model.

    Attributes:
        anatomy: of the original.
        blocks: the blocks that stay, in order.
    """

    anatomy: Anatomy
    blocks: list[BlockCut]

    @property
    def kept_layers(self) -> list[int]:
        return [cut.source for cut in self.blocks]

    @property
    def removed_layers(self) -> list[int]:
        return sorted(set(range(self.anatomy.layers)) - set(self.kept_layers))

    def shapes(self, cut: BlockCut) -> dict[str, list[int]]:
        """For each cut layer [kept inputs, inputs as they come, kept rows, rows as expected].

        Inputs come as they are kept where the rows that feed them have been cut to the same set
        (FFN neurons); value rows go back to their places, since attention counts on them.
        """
        found: dict[str, list[int]] = {}
        for name, dense in self.anatomy.denses.items():
            if name not in cut.inputs and name not in cut.rows:
                continue
            kept_in = len(cut.inputs[name]) if name in cut.inputs else dense.inputs
            kept_out = len(cut.rows[name]) if name in cut.rows else dense.rows
            feeds = self._fed_compactly(name, cut)
            full_out = kept_out if self._produces_compactly(name, cut) else dense.rows
            found[name] = [kept_in, kept_in if feeds else dense.inputs, kept_out, full_out]
        return found

    def _fed_compactly(self, name: str, cut: BlockCut) -> bool:
        coupling = self.anatomy.coupling_of(name)
        return coupling is not None and coupling.kind == "neurons" and name in cut.inputs

    def _produces_compactly(self, name: str, cut: BlockCut) -> bool:
        return any(
            name in c.producers and c.kind == "neurons" and c.consumer in cut.inputs
            for c in self.anatomy.family.couplings
        )

    @property
    def uniform_ffn_width(self) -> int | None:
        """The common FFN width if stock classes can hold this plan, else None."""
        widths = set()
        for cut in self.blocks:
            for name, (kept_in, full_in, kept_out, full_out) in self.shapes(cut).items():
                if kept_in != full_in or kept_out != full_out:
                    return None
                if self.anatomy.denses[name].reads == "neurons":
                    widths.add(kept_in)
            if not any(self.anatomy.denses[n].reads == "neurons" for n in cut.inputs):
                widths.add(self.anatomy.ffn_width)
        return widths.pop() if len(widths) == 1 else None

    def sizes(self) -> Sizes:
        """Parameters that are left."""
        decoder = sum(
            self.anatomy.block_parameters - block_removed(self.anatomy, cut) for cut in self.blocks
        )
        return Sizes(self.anatomy.outside_parameters + decoder, decoder)

    def sizes_before(self) -> Sizes:
        return Sizes(self.anatomy.parameters, self.anatomy.decoder_parameters)

    def summary(self) -> dict[str, Any]:
        """Sizes, shares and notes of every block, for ``secateur.json``."""
        before, after = self.sizes_before(), self.sizes()
        return {
            "parameters": {"before": before.parameters, "after": after.parameters},
            "decoder_parameters": {"before": before.decoder, "after": after.decoder},
            "share_removed": round(after.share_removed(before), 6),
            "decoder_share_removed": round(after.decoder_share_removed(before), 6),
            "removed_layers": self.removed_layers,
            "blocks": [
                {
                    "source": cut.source,
                    "share_removed": round(
                        block_removed(self.anatomy, cut) / self.anatomy.block_parameters, 6
                    ),
                    "shapes": self.shapes(cut),
                    **({"notes": cut.notes} if cut.notes else {}),
                }
                for cut in self.blocks
            ],
        }


def live_rows(anatomy: Anatomy, inputs: Mapping[str, torch.Tensor]) -> Tensors:
    """Rows that still feed something, for every layer that loses any.

    Args:
        inputs: kept inputs by layer.
    """
    rows: Tensors = {}
    for coupling in anatomy.family.couplings:
        kept = inputs.get(coupling.consumer)
        if kept is None:
            continue
        if coupling.kind == "values":
            heads_per_group = anatomy.query_heads // anatomy.kv_heads
            head, dimension = kept // anatomy.head_size, kept % anatomy.head_size
            kept = ((head // heads_per_group) * anatomy.head_size + dimension).unique()
        for producer in coupling.producers:
            if len(kept) < anatomy.denses[producer].rows:
                rows[producer] = kept
    return rows


def block_removed(anatomy: Anatomy, cut: BlockCut) -> int:
    """Parameters of a block that are absent from the file."""
    return removed_by_counts(
        anatomy,
        {name: len(kept) for name, kept in cut.inputs.items()},
        {name: len(kept) for name, kept in cut.rows.items()},
    )


def removed_by_counts(anatomy: Anatomy, inputs: Mapping[str, int], rows: Mapping[str, int]) -> int:
    """Parameters gone when layers keep these numbers of inputs and rows."""
    gone = 0
    for name in {*inputs, *rows}:
        dense = anatomy.denses[name]
        left_in = inputs.get(name, dense.inputs)
        left_out = rows.get(name, dense.rows)
        gone += dense.parameters - left_in * left_out - (left_out if dense.bias else 0)
    return gone


def slice_block(state: Tensors, plan: Plan, cut: BlockCut, dtype: torch.dtype) -> Tensors:
    """The tensors of the smaller block, as they go into the file.

    Args:
        state: the original block by name inside it.
        dtype: floating type to write.

    Returns:
        weights scaled and cut, the indices of gathers and scatters, everything else as it was.
    """
    out = {k: _cast(v, dtype) for k, v in state.items()}
    for name, (kept_in, full_in, kept_out, full_out) in plan.shapes(cut).items():
        weight = _scaled(state[f"{name}.weight"], cut, name)
        if name in cut.inputs:
            weight = weight[:, cut.inputs[name]]
        if name in cut.rows:
            weight = weight[cut.rows[name]]
            if f"{name}.bias" in state:
                out[f"{name}.bias"] = _cast(state[f"{name}.bias"][cut.rows[name]], dtype)
        out[f"{name}.weight"] = _cast(weight, dtype)
        if kept_in != full_in:
            out[f"{name}.in_index"] = cut.inputs[name]
        if kept_out != full_out:
            out[f"{name}.out_index"] = cut.rows[name]
    return out


def mask_block(state: Tensors, cut: BlockCut, dtype: torch.dtype) -> Tensors:
    """The same cut as zeros and scales in the original shapes: what :func:`slice_block` must equal.

    Values pass through ``dtype`` as they would in the file and come back as float32.
    """
    out = {k: _cast(_cast(v, dtype), torch.float32) for k, v in state.items()}
    for name in {*cut.inputs, *cut.rows}:
        weight = _scaled(state[f"{name}.weight"], cut, name)
        keep = torch.zeros_like(weight, dtype=torch.bool)
        inputs = cut.inputs.get(name, torch.arange(weight.shape[1]))
        rows = cut.rows.get(name, torch.arange(weight.shape[0]))
        keep[rows[:, None], inputs[None, :]] = True
        out[f"{name}.weight"] = _cast(weight * keep, dtype).float()
        if name in cut.rows and f"{name}.bias" in state:
            alive = torch.zeros(len(weight), dtype=torch.bool)
            alive[rows] = True
            out[f"{name}.bias"] = out[f"{name}.bias"] * alive
    return out


def _scaled(weight: torch.Tensor, cut: BlockCut, name: str) -> torch.Tensor:
    """W in float32, its kept columns times their scales."""
    weight = weight.to(torch.float32)
    if name in cut.scales:
        factor = torch.ones(weight.shape[1])
        factor[cut.inputs[name]] = cut.scales[name]
        weight = weight * factor
    return weight


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
