"""The plan of a sliced hidden width: how many directions stay, and what that makes of all sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from secateur.anatomy import Anatomy, ResidualStream
from secateur.checkpoint.writer import write_tensors
from secateur.errors import PlanError
from secateur.plans import BlockCut, Plan, Sizes, Widths

#: Furthest that the columns of a basis may be from orthonormal.
ORTHONORMAL = 1e-4


@dataclass(frozen=True)
class Slice:
    """Widths of the stream: in front of every stage, and behind the last block.

    Attributes:
        kept: directions that stay, d'.
        kept_last: those behind the last block, which the head reads: d' or d.
    """

    kept: int
    kept_last: int

    def widths(self, anatomy: Anatomy, stream: ResidualStream, block: int) -> list[int]:
        """In front of each stage of a block, and behind the last of them."""
        end = self.kept_last if block == anatomy.layers - 1 else self.kept
        return [self.kept] * len(stream.stages) + [end]


def shortcut_parameters(anatomy: Anatomy, stream: ResidualStream, cut: Slice) -> int:
    """Of all matrices that lead residuals from one basis to the next."""
    count = 0
    for block in range(anatomy.layers):
        widths = cut.widths(anatomy, stream, block)
        count += sum(a * b for a, b in itertools.pairwise(widths))
    return count


def block_parameters(
    anatomy: Anatomy, stream: ResidualStream, cut: Slice, block: int, *, shortcuts: bool = True
) -> int:
    """Of one block: narrower matrices, no scales and biases of norms, shortcuts, new biases."""
    full = stream.width
    widths = cut.widths(anatomy, stream, block)
    count = anatomy.block_parameters
    for place, stage in enumerate(stream.stages):
        before, behind = widths[place], widths[place + 1]
        count -= full * (stream.norm_weight + stream.norm_bias)
        for name in stage.readers:
            dense = anatomy.denses[name]
            count -= dense.rows * (full - before)
            count += dense.rows * (stream.norm_bias and not dense.bias)
        for name in stage.writers:
            dense = anatomy.denses[name]
            count -= (full - behind) * (dense.inputs + dense.bias)
        if shortcuts:
            count += before * behind
    return count


def outside_parameters(anatomy: Anatomy, stream: ResidualStream, cut: Slice) -> int:
    """Of embeddings and head. A head that was the embedding has a weight of its own now."""
    full = stream.width
    count = anatomy.outside_parameters - full * (stream.norm_weight + stream.norm_bias)
    count -= (full - cut.kept) * sum(stream.sources.values())
    if stream.tied:
        count += stream.reader_rows * cut.kept_last
    else:
        count -= stream.reader_rows * (full - cut.kept_last)
    return count + stream.reader_rows * (stream.norm_bias and not stream.reader_bias)


def sizes_at(anatomy: Anatomy, stream: ResidualStream, cut: Slice) -> Sizes:
    """All parameters of the sliced model, shortcuts included, and those in its blocks."""
    decoder = sum(block_parameters(anatomy, stream, cut, i) for i in range(anatomy.layers))
    return Sizes(decoder + outside_parameters(anatomy, stream, cut), decoder)


class StoredBases:
    """The bases of a written model, read from its folder when they are asked for.

    Basis s, (d, d'), float32, is the one in front of stage s, all stages of all blocks counted
    through. The file of a block holds those behind its stages; that of the first block also the
    one in front of it.
    """

    def __init__(self, folder: Path, blocks: int) -> None:
        self._folder = folder
        self._blocks = blocks

    def of_block(self, block: int) -> list[torch.Tensor]:
        """In front of each stage of a block, and behind the last of them."""
        behind = self._read(block)
        if block == 0:
            return behind
        return [self._read(block - 1)[-1], *behind]

    def _read(self, block: int) -> list[torch.Tensor]:
        from safetensors.torch import load_file

        stored = load_file(self._folder / bases_file(block, self._blocks))
        return [stored[name] for name in sorted(stored, key=lambda n: int(n.split(".")[1]))]


def bases_file(block: int, blocks: int) -> str:
    """File of the bases behind the stages of a block."""
    return f"secateur_plan-{block + 1:05d}-of-{blocks:05d}.safetensors"


def write_bases(
    folder: Path, block: int, blocks: int, bases: Sequence[torch.Tensor]
) -> dict[str, str]:
    """Write the file that :class:`StoredBases` reads; return its name with its SHA-256.

    Args:
        bases: in front of each stage of the block and behind the last.
    """
    named = {f"basis.{place}": basis for place, basis in enumerate(bases)}
    if block > 0:
        del named["basis.0"]  # behind the block before
    name = bases_file(block, blocks)
    return {name: write_tensors(folder / name, named)}


@dataclass
class RotationPlan(Plan):
    """A plan whose every block is cut alike, in the width of the stream.

    Attributes:
        stream: of the original.
        cut: the widths that stay.
        of: what the target was a share of.
        bases: the directions themselves, where they have been written.
    """

    stream: ResidualStream
    cut: Slice
    of: Literal["model", "decoder"] = "model"
    bases: StoredBases | None = None

    why_code: ClassVar[str] = (
        "Its hidden width was rotated and sliced, with a shortcut matrix on every residual"
    )
    held_in: ClassVar[str] = (
        "`secateur_plan-*.safetensors` hold the bases, which only `secateur verify --against` needs"
    )

    def shapes(self, cut: BlockCut) -> dict[str, list[int]]:
        widths = self.cut.widths(self.anatomy, self.stream, cut.source)
        found: dict[str, list[int]] = {}
        for place, stage in enumerate(self.stream.stages):
            for name in stage.readers:
                dense = self.anatomy.denses[name]
                found[name] = [widths[place]] * 2 + [dense.rows] * 2
            for name in stage.writers:
                dense = self.anatomy.denses[name]
                found[name] = [dense.inputs] * 2 + [widths[place + 1]] * 2
        return {name: found[name] for name in self.anatomy.denses if name in found}

    def widths(self, cut: BlockCut) -> Widths | None:
        return None  # no stock class has shortcuts

    def sizes(self) -> Sizes:
        return sizes_at(self.anatomy, self.stream, self.cut)

    def block_gone(self, cut: BlockCut) -> int:
        left = block_parameters(self.anatomy, self.stream, self.cut, cut.source)
        return self.anatomy.block_parameters - left

    @property
    def gone(self) -> int:
        before, after = self.sizes_before(), self.sizes()
        if self.of == "decoder":
            return before.decoder - after.decoder
        return before.parameters - after.parameters

    @property
    def shortcuts(self) -> int:
        """Parameters of the shortcut matrices."""
        return shortcut_parameters(self.anatomy, self.stream, self.cut)

    @property
    def own_head(self) -> int:
        """Parameters of a head that had none of its own before."""
        return self.stream.reader_rows * self.cut.kept_last if self.stream.tied else 0

    def check(self) -> None:
        """Whether the bases have the widths of the plan and orthonormal columns.

        Raises:
            PlanError: they have not, or a file of them is missing.
        """
        for cut in self.blocks:
            where = f"the plan of block {cut.source}"
            try:
                bases = self.bases.of_block(cut.source) if self.bases else []
            except Exception as error:  # a missing or damaged file, in many ways
                raise PlanError(f"{where}: its bases cannot be read ({error})") from error
            widths = self.cut.widths(self.anatomy, self.stream, cut.source)
            wanted = [(self.stream.width, width) for width in widths]
            got = [tuple(basis.shape) for basis in bases]
            if got != wanted:
                raise PlanError(f"{where}: its bases are {got}, they should be {wanted}")
            for place, basis in enumerate(bases):
                gap = basis.T @ basis - torch.eye(basis.shape[1])
                if not float(gap.abs().max()) <= ORTHONORMAL:
                    raise PlanError(
                        f"{where}: the columns of basis {place} are not orthonormal (off by "
                        f"{float(gap.abs().max()):.3g})"
                    )

    def run_time(self) -> dict[str, Any]:
        stages = [
            {
                "norm": stage.norm,
                "readers": list(stage.readers),
                "writers": list(stage.writers),
                "branches": [list(branch) for branch in stage.branches],
                "attention": self.stream.attention,
            }
            for stage in self.stream.stages
        ]
        rotation = {
            "width": self.stream.width,
            "kept": self.cut.kept,
            "kept_last": self.cut.kept_last,
            "stages": stages,
            "sources": list(self.stream.sources),
            "norm": self.stream.norm,
            "reader": self.stream.reader,
            "biases": self.stream.norm_bias,
        }
        return {"rotation": rotation}

    def config_keys(self) -> dict[str, Any]:
        return {"tie_word_embeddings": False} if self.stream.tied else {}

    def summary(self) -> dict[str, Any]:
        before, after = self.sizes_before(), self.sizes()
        return {
            "parameters": {"before": before.parameters, "after": after.parameters},
            "decoder_parameters": {"before": before.decoder, "after": after.decoder},
            "share_removed": round(after.share_removed(before), 6),
            "decoder_share_removed": round(after.decoder_share_removed(before), 6),
            "removed_layers": [],
            "rotation": {
                "width": {"before": self.stream.width, "after": self.cut.kept},
                "width_before_head": self.cut.kept_last,
                "shortcut_parameters": self.shortcuts,
                "untied_head_parameters": self.own_head,
            },
            "blocks": [
                {
                    "source": cut.source,
                    "share_removed": round(self.block_gone(cut) / self.anatomy.block_parameters, 6),
                    "shapes": self.shapes(cut),
                    **({"notes": cut.notes} if cut.notes else {}),
                }
                for cut in self.blocks
            ],
        }


def stored_plan(
    anatomy: Anatomy, stream: ResidualStream, summary: dict[str, Any], folder: Path
) -> RotationPlan:
    """The plan that lies in a written folder.

    Args:
        summary: the record's entry ``plan``, as :meth:`RotationPlan.summary` made it.
    """
    rotation = summary["rotation"]
    cut = Slice(int(rotation["width"]["after"]), int(rotation["width_before_head"]))
    blocks = [BlockCut(int(block["source"])) for block in summary["blocks"]]
    return RotationPlan(anatomy, blocks, stream, cut, bases=StoredBases(folder, len(blocks)))
