"""One model's parts: a family's table, filled with the shapes of the model at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from secateur.anatomy.families import FAMILIES, Coupling, Family, Span
from secateur.errors import FamilyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DenseShape:
    """A linear layer's rows (p), inputs (q), whether it has a bias, and the signal it reads."""

    path: str
    reads: str
    rows: int
    inputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.rows * self.inputs + (self.rows if self.bias else 0)


@dataclass(frozen=True)
class RowsShape:
    """A tensor that belongs to no linear layer: its rows, and parameters of each."""

    rows: int
    each: int


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model. Sizes are counts of parameters, tied ones counted once.

    Attributes:
        family: the table entry.
        denses: the linear layers of a block by path, in the order of the data.
        layers: number of blocks.
        block_parameters: parameters of one block, norms included.
        outside_parameters: parameters outside the blocks (embeddings, final norm, head).
        parameters_by_part: the same, by first path component inside or outside a block.
        query_heads, kv_heads, head_size: of the attention, or of a mixer with heads, each of which
            is then a group of its own; 0 where there are none.
        scan_groups: in which heads of a mixer share B and C.
        tensors: what no linear layer holds and goes with units, by name inside a block.
    """

    family: Family
    model_type: str
    denses: dict[str, DenseShape]
    layers: int
    block_parameters: int
    outside_parameters: int
    parameters_by_part: dict[str, int]
    query_heads: int
    kv_heads: int
    head_size: int
    tensors: dict[str, RowsShape] = field(default_factory=dict)
    scan_groups: int = 1

    @property
    def decoder_parameters(self) -> int:
        return self.layers * self.block_parameters

    @property
    def parameters(self) -> int:
        return self.decoder_parameters + self.outside_parameters

    def behind(self, signal: str) -> tuple[str, int] | None:
        """Where a signal passes no layer's entry: whose first outputs it is, and how many."""
        for dense in self.family.denses:
            if dense.reads == signal and dense.behind is not None:
                return dense.behind, self.denses[dense.path].inputs
        return None

    @cached_property
    def by_signal(self) -> dict[str, list[str]]:
        """The linear layers that read each signal."""
        groups: dict[str, list[str]] = {}
        for path, dense in self.denses.items():
            groups.setdefault(dense.reads, []).append(path)
        return groups

    def coupling_of(self, path: str) -> Coupling | None:
        """The rows that exist to feed ``path``, if any do."""
        for coupling in self.family.couplings:
            if coupling.consumer == path:
                return coupling
        return None

    def find(self, kind: str) -> Coupling | None:
        """The coupling of this kind: ``values`` (attention) or ``neurons`` (FFN)."""
        return next((c for c in self.family.couplings if c.kind == kind), None)

    def coupling(self, kind: str) -> Coupling:
        """:meth:`find` where there must be one."""
        found = self.find(kind)
        assert found is not None, f"{self.family.name} has no {kind}"
        return found

    def consumers(self, *kinds: str) -> list[str]:
        """The layers at whose entry units of these kinds stand, of those that there are."""
        return [c.consumer for kind in kinds if (c := self.find(kind)) is not None]

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV group."""
        return self.query_heads // self.kv_heads if self.kv_heads else 0

    @property
    def ffn_width(self) -> int:
        """Inputs of the layer at whose entry the FFN's neurons stand; 0 where there is none."""
        return next((d.inputs for d in self.denses.values() if d.reads == "neurons"), 0)

    def spans(self, coupling: Coupling, name: str) -> list[tuple[Span, int]]:
        """How the rows of a producer or tensor follow one another, and how many of each kind."""
        inputs = self.denses[coupling.consumer].inputs
        width = {"inputs": inputs, "units": self.kv_heads}
        layout = coupling.layout.get(name, ("inputs",))
        rows = self.denses[name].rows if name in self.denses else self.tensors[name].rows
        rest = rows - sum(width.get(span, 0) for span in layout)
        return [(span, width.get(span, rest)) for span in layout]


def describe(model: PreTrainedModel) -> Anatomy:
    """Fill the family table for ``model``, which may be on the meta device.

    Raises:
        FamilyError: no entry for this model type, or the entry's paths are not in the model.
    """
    from secateur.modules import MODEL_TYPE_PREFIX

    model_type = str(model.config.model_type)
    base_type = model_type.removeprefix(MODEL_TYPE_PREFIX)
    family = next((f for f in FAMILIES if base_type in f.model_types), None)
    if family is None:
        known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
        raise FamilyError(
            f"model type {model_type} is not described: its blocks look like "
            f"{_what_is_there(model)}; described are {known}; to add one, fill an entry in "
            "secateur/anatomy/families.py (blocks, denses, couplings)"
        )
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError as error:
        raise FamilyError(
            f"model type {model_type} should keep its blocks at {family.blocks}, but there are "
            f"{_what_is_there(model)}"
        ) from error
    if not len(blocks):
        raise FamilyError(f"model type {model_type} has no blocks here: its config asks for none")
    block = blocks[0]
    denses: dict[str, DenseShape] = {}
    missing = []
    for dense in family.denses:
        try:
            layer = block.get_submodule(dense.path)
        except AttributeError:
            missing.append(dense.path)
            continue
        rows, inputs = layer.weight.shape
        denses[dense.path] = DenseShape(
            dense.path, dense.reads, rows, inputs, layer.bias is not None
        )
    if missing:
        raise FamilyError(
            f"model type {model_type} lacks {', '.join(missing)} in its blocks; found are "
            f"{', '.join(n for n, m in block.named_modules() if hasattr(m, 'weight'))}"
        )
    config = model.config
    heads = kv_heads = head_size = 0
    if family.heads is not None:
        heads = int(getattr(config, family.heads))
        kv_heads = int(getattr(config, family.kv_heads, None) or heads)
        head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    in_blocks = sum(p.numel() for p in blocks.parameters())
    return Anatomy(
        family=family,
        model_type=model_type,
        denses=denses,
        layers=len(blocks),
        block_parameters=sum(p.numel() for p in block.parameters()),
        outside_parameters=sum(p.numel() for p in model.parameters()) - in_blocks,
        parameters_by_part=_by_part(model, family.blocks),
        query_heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        tensors=_tensors(block, family),
        scan_groups=int(getattr(config, family.scan_groups)) if family.scan_groups else 1,
    )


def _tensors(block: Any, family: Family) -> dict[str, RowsShape]:
    """Tensors of no linear layer that go with units; a bias may be absent, its module not."""
    found = {}
    for path in (path for coupling in family.couplings for path in coupling.tensors):
        owner, _, leaf = path.rpartition(".")
        tensor = getattr(block.get_submodule(owner), leaf)
        if tensor is not None:
            found[path] = RowsShape(len(tensor), tensor.numel() // len(tensor))
    return found


def _by_part(model: PreTrainedModel, blocks: str) -> dict[str, int]:
    """Parameters by module, all blocks together; ``parameters()`` gives tied ones once."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(blocks + "."):
            inner = name[len(blocks) + 1 :].split(".", 1)[1]
            part = "blocks: " + inner.rsplit(".", 1)[0]
        else:
            part = name.rsplit(".", 1)[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _what_is_there(model: Any) -> str:
    """A short description of the lists of blocks found in an unknown model."""
    from torch import nn

    lists = [
        f"{name} ({len(module)} x {type(module[0]).__name__} with "
        f"{', '.join(n for n, m in module[0].named_modules() if hasattr(m, 'weight'))})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and name.count(".") <= 2
    ]
    return "; ".join(lists) or "no list of blocks at all"
