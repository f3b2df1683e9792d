"""The plan: which blocks, inputs and rows stay, with which scales. The only truth downstream.

Writers, the verifier and the reports take sizes and indices from here and from nowhere else, so
that config, tensors and numbers cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from secateur.anatomy import Anatomy
from secateur.coupled import (
    group_inputs,
    in_whole_units,
    live_rows,
    removed_by_counts,
    row_count,
)
from secateur.errors import PlanError

Tensors = dict[str, torch.Tensor]
#: The key of a block's notes under which the steps of its solvers stand, as lines.
STEPS = "numerics"

#: What of a cut is tensors by the names of layers; in a file, the first part of their names.
KINDS_OF_TENSORS = ("inputs", "scales", "rows", "biases")


@dataclass
class BlockCut:
    """What stays of one block. A layer that is not named keeps everything.

    Attributes:
        source: number of the block in the original model.
        inputs: kept inputs of a linear layer, ascending, (q',) int64.
        scales: factor of each kept input, (q',) float32; or of each kept row of a norm's weight.
        rows: kept rows of a linear layer, ascending, (p',) int64; or of a tensor that no linear
            layer holds (:attr:`Anatomy.tensors`), by its own name.
        weights: new weights of what a linear layer keeps, (p', q') float32, as they are in the
            file; they stand in the place of the original ones and of scales.
        biases: new biases of a linear layer, all its rows, (p,) float32; in the place of the
            original ones, or where there was none.
        groups: kept KV groups, ascending, (g',) int64, where whole groups went; else None.
        notes: what happened, for the report: errors, thresholds, fallbacks.
    """

    source: int
    inputs: Tensors = field(default_factory=dict)
    scales: Tensors = field(default_factory=dict)
    rows: Tensors = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    biases: Tensors = field(default_factory=dict)
    groups: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """All tensors but new weights under flat names, for a file; those are in the shards."""
        parts: dict[str, Tensors] = {kind: getattr(self, kind) for kind in KINDS_OF_TENSORS}
        # Coupled layers share one index tensor; a file wants each name to have its own.
        flat = {f"{k}.{name}": t.clone() for k, named in parts.items() for name, t in named.items()}
        return flat if self.groups is None else {**flat, "groups.kept": self.groups.clone()}

    def joined(self, other: BlockCut) -> BlockCut:
        """This cut and another of other layers of the block; where both name one, the other's."""
        notes = dict(self.notes)
        for key, value in other.notes.items():
            both = isinstance(value, dict) and isinstance(notes.get(key), dict)
            notes[key] = {**notes[key], **value} if both else value
        return BlockCut(
            self.source,
            {**self.inputs, **other.inputs},
            {**self.scales, **other.scales},
            {**self.rows, **other.rows},
            {**self.weights, **other.weights},
            {**self.biases, **other.biases},
            other.groups if other.groups is not None else self.groups,
            notes,
        )

    def on_cpu(self) -> BlockCut:
        """The same with its tensors on the CPU, where everything behind a method has them."""

        def moved(named: Mapping[str, torch.Tensor]) -> Tensors:
            return {name: tensor.cpu() for name, tensor in named.items()}

        return replace(
            self,
            inputs=moved(self.inputs),
            scales=moved(self.scales),
            rows=moved(self.rows),
            weights=moved(self.weights),
            biases=moved(self.biases),
            groups=None if self.groups is None else self.groups.cpu(),
        )

    @property
    def steps(self) -> list[str]:
        """What solvers had to do for this block (:mod:`secateur.solvers.ladder`), as lines."""
        return [f"block {self.source}, {line}" for line in self.notes.get(STEPS, [])]

    @classmethod
    def of(
        cls, source: int, tensors: Mapping[str, torch.Tensor], notes: dict[str, Any]
    ) -> BlockCut:
        """The reverse of :meth:`tensors`.

        Raises:
            ValueError: tensors of other names.
        """
        cut = cls(source, notes=notes)
        for flat, tensor in tensors.items():
            kind, name = flat.split(".", 1)
            if kind == "groups":
                cut.groups = tensor
                continue
            if kind not in KINDS_OF_TENSORS:
                raise ValueError(f"no plan holds {flat}")
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


@dataclass(frozen=True)
class Widths:
    """What remains of one block when only whole units went: numbers of heads and neurons."""

    query_heads: int
    kv_groups: int
    ffn: int


@dataclass
class Plan:
    """What stays of a model.

    Attributes:
        anatomy: of the original.
        blocks: the blocks that stay, in order.
    """

    anatomy: Anatomy
    blocks: list[BlockCut]

    #: For the model card: why the stock class does not do, and where the rest of the plan lies.

    @property
    def why_code(self) -> str:
        """Why the stock class cannot open the folder, where it cannot, for the model card."""
        if self.uniform is not None and any(map(self.new_biases, self.blocks)):
            return "Its layers have biases that the stock class has not"
        return "Its blocks have different sizes"

    @property
    def held_in(self) -> str:
        """Where the folder keeps what stays, for the model card."""
        biases = ", the new biases" if any(cut.biases for cut in self.blocks) else ""
        return f"`secateur_plan.safetensors` holds the kept indices{biases} and the scales"

    @property
    def kept_layers(self) -> list[int]:
        return [cut.source for cut in self.blocks]

    @property
    def removed_layers(self) -> list[int]:
        return sorted(set(range(self.anatomy.layers)) - set(self.kept_layers))

    def shapes(self, cut: BlockCut) -> dict[str, list[int]]:
        """For each cut layer [kept inputs, inputs as they come, kept rows, rows as expected].

        Inputs come as they are kept where the rows that feed them have been cut to the same set
        (FFN neurons, whole KV groups). Single value rows go back to their places, since attention
        counts on them.
        """
        couplings = self.anatomy.family.couplings
        whole = [c for c in couplings if in_whole_units(c, cut.inputs, cut.groups)]
        fed = {name for c in whole for name in c.fed}
        feeding = {name for c in whole for name in c.layers if name not in c.fed}
        found: dict[str, list[int]] = {}
        for name, dense in self.anatomy.denses.items():
            if name not in cut.inputs and name not in cut.rows:
                continue
            kept_in = len(cut.inputs[name]) if name in cut.inputs else dense.inputs
            kept_out = len(cut.rows[name]) if name in cut.rows else dense.rows
            full_in = kept_in if name in fed else dense.inputs
            full_out = kept_out if name in feeding else dense.rows
            found[name] = [kept_in, full_in, kept_out, full_out]
        return found

    def new_biases(self, cut: BlockCut) -> list[str]:
        """Layers that get a bias which the model's class does not give them."""
        return sorted(name for name in cut.biases if not self.anatomy.denses[name].bias)

    def lengths(self, cut: BlockCut) -> dict[str, int]:
        """Rows that are left of each tensor that no linear layer holds and that lost any."""
        return {name: len(kept) for name, kept in cut.rows.items() if name in self.anatomy.tensors}

    def counts(self, cut: BlockCut) -> dict[str, list[Any]]:
        """What modules of a block note of their sizes: the tensor, and the dimension, to ask."""
        touched = {*self.shapes(cut), *self.lengths(cut)}
        return {
            count.path: [count.tensor, count.dim]
            for count in self.anatomy.family.counts
            if touched & {count.tensor, count.tensor.removesuffix(".weight")}
        }

    def widths(self, cut: BlockCut) -> Widths | None:
        """Heads and neurons of one block; None where a layer reads or writes through an index."""
        if any(i != fi or o != fo for i, fi, o, fo in self.shapes(cut).values()):
            return None
        anatomy, units = self.anatomy, self.anatomy.consumers("values", "neurons")
        if any(c.consumer in cut.inputs and c.consumer not in units
               for c in anatomy.family.couplings):  # fmt: skip
            return None
        groups = anatomy.kv_heads if cut.groups is None else len(cut.groups)
        neurons = next((cut.inputs.get(name) for name in anatomy.consumers("neurons")), None)
        return Widths(
            groups * anatomy.heads_per_group,
            groups,
            anatomy.ffn_width if neurons is None else len(neurons),
        )

    @property
    def uniform(self) -> Widths | None:
        """The widths that all blocks have in common, else None."""
        found = {self.widths(cut) for cut in self.blocks}
        return found.pop() if len(found) == 1 else None

    def check(self) -> None:
        """Refuse what no block can be, before anything is written by it.

        Raises:
            PlanError: no KV group or neuron is left, indices are out of range or order, or layers
                that are coupled keep different units.
        """
        for cut in self.blocks:
            check_cut(self.anatomy, cut)

    def sizes(self) -> Sizes:
        """Parameters that are left."""
        decoder = sum(
            self.anatomy.block_parameters - block_removed(self.anatomy, cut) for cut in self.blocks
        )
        return Sizes(self.anatomy.outside_parameters + decoder, decoder)

    def sizes_before(self) -> Sizes:
        return Sizes(self.anatomy.parameters, self.anatomy.decoder_parameters)

    def block_gone(self, cut: BlockCut) -> int:
        """Parameters of a block that are absent from the file; below 0 where it has grown."""
        return block_removed(self.anatomy, cut)

    @property
    def gone(self) -> int:
        """Parameters that went, of those that the target is a share of."""
        return self.sizes_before().parameters - self.sizes().parameters

    @property
    def zeros(self) -> int:
        """Weights that a sparse method made zero; they are in the file like all others."""
        return sum(sum(cut.notes.get("zeros", {}).values()) for cut in self.blocks)

    def run_time(self) -> dict[str, Any]:
        """What the modelling file has to know, for the config's entry ``secateur``."""
        biases = [self.new_biases(cut) for cut in self.blocks]
        more: dict[str, Any] = {"biases": biases} if any(biases) else {}
        if self.anatomy.family.counts:
            lengths = [self.lengths(cut) for cut in self.blocks]
            more |= {"lengths": lengths, "counts": [self.counts(cut) for cut in self.blocks]}
        return {"shapes": [self.shapes(cut) for cut in self.blocks], **more}

    def config_keys(self) -> dict[str, Any]:
        """Keys of the config that change with the plan, where no stock class holds it."""
        return {}

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
                    **({"new_weights": sorted(cut.weights)} if cut.weights else {}),
                    **({"new_biases": sorted(cut.biases)} if cut.biases else {}),
                    **({"notes": cut.notes} if cut.notes else {}),
                }
                for cut in self.blocks
            ],
        }


def check_cut(anatomy: Anatomy, cut: BlockCut) -> None:
    """One block of :meth:`Plan.check`."""
    where = f"the plan of block {cut.source}"
    for name, kept in cut.inputs.items():
        _check_indices(f"{where}: inputs of {name}", kept, anatomy.denses[name].inputs)
        if name in cut.scales and len(cut.scales[name]) != len(kept):
            raise PlanError(
                f"{where}: {name} keeps {len(kept)} inputs but has {len(cut.scales[name])} scales"
            )
    for name, weight in cut.weights.items():
        full = anatomy.denses[name]
        shape = (
            len(cut.rows[name]) if name in cut.rows else full.rows,
            len(cut.inputs[name]) if name in cut.inputs else full.inputs,
        )
        if tuple(weight.shape) != shape:
            raise PlanError(
                f"{where}: new weights of {name} are {tuple(weight.shape)}, they should be {shape}"
            )
    for name, bias in cut.biases.items():
        if tuple(bias.shape) != (anatomy.denses[name].rows,):
            raise PlanError(
                f"{where}: the new bias of {name} is {tuple(bias.shape)}, it should be "
                f"({anatomy.denses[name].rows},)"
            )
    for name, kept in cut.rows.items():
        _check_indices(f"{where}: rows of {name}", kept, row_count(anatomy, name))
    if cut.groups is not None:
        if not len(cut.groups):
            raise PlanError(
                f"{where} keeps no KV group for its query heads: allowed are 1 to "
                f"{anatomy.kv_heads} groups; to do without a block's attention, remove the block"
            )
        _check_indices(f"{where}: KV groups", cut.groups, anatomy.kv_heads)
    _check_coupled(anatomy, cut, where)


def _check_coupled(anatomy: Anatomy, cut: BlockCut, where: str) -> None:
    expected = live_rows(anatomy, cut.inputs, cut.groups)
    for coupling in anatomy.family.couplings:
        if not in_whole_units(coupling, cut.inputs, cut.groups):
            continue
        if coupling.kind == "values":
            assert cut.groups is not None
            whole = group_inputs(anatomy, cut.groups)
            if not torch.equal(cut.inputs.get(coupling.consumer, whole[:0]), whole):
                raise PlanError(
                    f"{where} keeps {len(cut.groups)} KV groups, but {coupling.consumer} does not "
                    f"keep the {len(whole)} inputs that their query heads make"
                )
        for name in (*coupling.layers, *coupling.tensors):
            if name in expected and not torch.equal(
                cut.rows.get(name, expected[name][:0]), expected[name]
            ):
                raise PlanError(
                    f"{where}: {name} keeps other rows than {coupling.consumer} reads "
                    f"({len(expected[name])})"
                )


def _check_indices(what: str, kept: torch.Tensor, count: int) -> None:
    if not len(kept):
        raise PlanError(f"{what}: none is kept; allowed are 1 to {count}")
    if int(kept[0]) < 0 or int(kept[-1]) >= count or not bool((kept.diff() > 0).all()):
        raise PlanError(f"{what}: indices must rise, from 0 up to {count - 1} at most")


def block_removed(anatomy: Anatomy, cut: BlockCut) -> int:
    """Parameters of a block that are absent from the file, less biases that were not there."""
    added = {name for name in cut.biases if not anatomy.denses[name].bias}
    return removed_by_counts(
        anatomy,
        {name: len(kept) for name, kept in cut.inputs.items()},
        {name: len(kept) for name, kept in cut.rows.items()},
    ) - sum(len(cut.rows.get(name, cut.biases[name])) for name in added)
