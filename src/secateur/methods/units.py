"""Units that go whole, KV groups and FFN neurons: their numbers, and what they cost.

What stays of a block is a matter of arithmetic once it is known how many units go where; that is
the same for all methods, however they choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.coupled import live_rows, norm_scales, removed_by_counts, with_readers
from secateur.errors import RecipeError
from secateur.methods.base import Method
from secateur.plans import BlockCut

#: Blocks of the models that papers say how many to spare of.
DEPTH_OF_PAPERS = 32

#: How many blocks at an end are spared.
Exempt = Annotated[int, Field(ge=0)] | Literal["auto"]


def exempt(wanted: int | Literal["auto"], of_32: int, depth: int) -> int:
    """Blocks to spare at one end of a model; ``auto``: the paper's number, fewer of few blocks.

    Args:
        of_32: what the paper spares of 32 blocks.
        depth: blocks of this model.
    """
    return min(of_32, round(of_32 * depth / DEPTH_OF_PAPERS)) if wanted == "auto" else wanted


def not_exempt(
    layers: Sequence[int], options: Any, of_32: tuple[int, int], depth: int
) -> Sequence[int]:
    """The blocks between those that are spared at both ends.

    Args:
        layers: blocks that are left.
        options: with ``exempt_first`` and ``exempt_last``.
        of_32, depth: see :func:`exempt`; of both ends.
    """
    first = exempt(options.exempt_first, of_32[0], depth)
    last = exempt(options.exempt_last, of_32[1], depth)
    return layers[first : max(0, len(layers) - last)]


class Units(Method):
    """A method that removes units at the entry of the attention output and of the FFN's last layer.

    Its options have ``groups``: KV groups that each block keeps, ``keep`` for all, or ``auto``.
    """

    options: Any

    def signals_cut(self) -> set[str]:
        """With structure inputs: signals whose readers lose inputs."""
        return {"neurons"}

    def check(self, anatomy: Anatomy) -> None:
        """Whether blocks of this model can keep the wanted number of KV groups."""
        kinds, wanted = anatomy.consumers("values", "neurons"), self.options.groups
        if len(kinds) == 1 and wanted != "auto":
            raise RecipeError(
                f"groups is {wanted}, but blocks of {anatomy.model_type} are not made of KV groups "
                "and neurons: leave it out"
            )
        if self.form.structure == "coupled" and anatomy.scan_groups > 1:
            raise RecipeError(
                f"heads of this {anatomy.model_type} model share B and C in {anatomy.scan_groups} "
                f"groups ({anatomy.family.scan_groups}), whose heads cannot go one by one: use "
                "--method comp with --structure inputs, or --method shortgpt"
            )
        if not self._denses(anatomy):
            raise RecipeError(
                f"the stock class of {anatomy.model_type} holds {anatomy.kv_heads} heads and no "
                f"other number, and method {self.name} removes nothing else: use --layout per-layer"
            )
        legal = self.form.groups or tuple(range(1, anatomy.kv_heads + 1))
        if isinstance(wanted, int) and wanted not in legal:
            raise RecipeError(
                f"groups is {wanted}, but the stock class of {anatomy.model_type} holds "
                f"{', '.join(map(str, legal))} KV groups: choose one of these, auto or keep"
                if self.form.uniform
                else f"groups is {wanted}, but every block has {anatomy.kv_heads} KV groups: "
                f"allowed are 1 to {anatomy.kv_heads}, auto and keep"
            )

    def unit(self, anatomy: Anatomy) -> int:
        """Parameters of one piece, where all pieces that may go cost the same; else 1."""
        denses = self._denses(anatomy)
        if len(denses) > 1:
            return 1
        dense = anatomy.denses[denses[0]]
        step = self.form.multiple if dense.reads == "neurons" else 1
        return self._removed(anatomy, {denses[0]: torch.arange(dense.inputs - step)})

    @property
    def carries(self) -> bool:
        """Heads and neurons differ in size: a block meets its quota only to half a piece."""
        return self.form.structure == "coupled" and not self.form.uniform

    def _most_removable(self, anatomy: Anatomy) -> int:
        """Parameters gone if every layer that may lose inputs kept the least it can."""
        least = {name: self._legal(anatomy, name)[-1] for name in self._denses(anatomy)}
        inputs = {n: torch.arange(anatomy.denses[n].inputs - c) for n, c in least.items()}
        return self._removed(anatomy, inputs)

    def _denses(self, anatomy: Anatomy) -> list[str]:
        if self.form.structure == "inputs":
            wanted = self.signals_cut()
        else:
            keep = self.options.groups in ("keep", anatomy.kv_heads) or (
                self.form.groups == (anatomy.kv_heads,)
            )
            wanted = {"neurons"} if keep else {"heads", "neurons"}
        return [name for name, dense in anatomy.denses.items() if dense.reads in wanted]

    def signals(self, anatomy: Anatomy) -> set[str]:
        return {anatomy.denses[name].reads for name in self._denses(anatomy)}

    def _legal(self, anatomy: Anatomy, name: str) -> Sequence[int]:
        """Numbers of inputs that a layer may lose, rising from 0."""
        dense = anatomy.denses[name]
        if dense.reads == "neurons":
            widths = range(self.form.multiple, dense.inputs, self.form.multiple)
            return [0, *(dense.inputs - width for width in reversed(widths))]
        if self.form.structure == "coupled":
            kept = self.form.groups or range(1, anatomy.kv_heads + 1)
            return [dense.inputs - group_width(anatomy) * n for n in reversed(kept)]
        return range(dense.inputs)

    def _removed(self, anatomy: Anatomy, inputs: dict[str, torch.Tensor]) -> int:
        if self.form.structure == "coupled":
            inputs = with_readers(anatomy, inputs)
        counts = {name: len(kept) for name, kept in inputs.items()}
        live = live_rows(anatomy, inputs, self._groups(anatomy, inputs))
        rows = {name: len(kept) for name, kept in live.items()}
        return removed_by_counts(anatomy, counts, rows)

    def _groups(self, anatomy: Anatomy, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The KV groups that make the kept inputs of the attention output, if some went."""
        kept = next((inputs.get(name) for name in anatomy.consumers("values")), None)
        if self.form.structure == "inputs" or kept is None:
            return None
        return kept[:: group_width(anatomy)] // group_width(anatomy)

    def _block_cut(
        self, source: int, anatomy: Anatomy, inputs: dict[str, torch.Tensor]
    ) -> BlockCut:
        """The cut of a block whose linear layers keep these inputs, and all that follows."""
        groups = self._groups(anatomy, inputs)
        if self.form.structure == "coupled":
            inputs = with_readers(anatomy, inputs)
        rows = live_rows(anatomy, inputs, groups)
        return BlockCut(source, inputs, norm_scales(anatomy, rows), rows, groups=groups)

    def _in_groups(self, anatomy: Anatomy, name: str) -> bool:
        """Whether the inputs of a layer go in whole KV groups."""
        return self.form.structure == "coupled" and anatomy.denses[name].reads == "heads"


@dataclass(frozen=True)
class Member:
    """The part that a unit owns in one linear layer: ``width`` rows (axis 0) or columns (axis 1).

    Units own them in order: those of unit u begin at u * ``width``.
    """

    path: str
    axis: Literal[0, 1]
    width: int


def has_members(anatomy: Anatomy) -> bool:
    """Whether :func:`members` knows what its units are made of."""
    heads = anatomy.find("values")
    return heads is not None and bool(heads.queries)


def check_members(anatomy: Anatomy, what: str, instead: str) -> None:
    """Refuse a model whose units are not what :func:`members` knows.

    Args:
        what: asks for them.
        instead: what to do.

    Raises:
        RecipeError: its blocks have no attention.
    """
    if not has_members(anatomy):
        raise RecipeError(
            f"{what} adds up gradients over the layers of attention and FFN, and blocks of "
            f"{anatomy.model_type} have others: {instead}"
        )


def members(anatomy: Anatomy, consumer: str) -> list[Member]:
    """All that goes when a unit at the entry of ``consumer`` goes, in the order of the data.

    A KV group owns rows of its query heads, its key and its value, and columns of the attention
    output; a neuron one row of each layer that makes it and one column of the next.
    """
    coupling = anatomy.coupling_of(consumer)
    assert coupling is not None
    if coupling.kind == "neurons":
        return [*(Member(path, 0, 1) for path in coupling.producers), Member(consumer, 1, 1)]
    wide = group_width(anatomy)
    return [
        *(Member(path, 0, wide) for path in coupling.queries),
        *(Member(path, 0, anatomy.head_size) for path in (*coupling.keys, *coupling.producers)),
        Member(consumer, 1, wide),
    ]


def group_width(anatomy: Anatomy) -> int:
    """Inputs of the attention output that one KV group makes, through all its query heads."""
    return anatomy.heads_per_group * anatomy.head_size
