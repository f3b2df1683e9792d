"""What stands in the work folder of each finished block, besides its shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.writer import Journal, write_tensors
from secateur.outputs import hf
from secateur.plans import BlockCut, Plan


def cut_file(work: Path, source: int) -> Path:
    """Where the cut of a block is kept; the model that is written has all of them in one file."""
    return work / f"cut-{source:05d}.safetensors"


def inputs_file(work: Path, source: int) -> Path:
    """Where that which goes into a block waits for the worker that cuts it."""
    return work / f"inputs-{source:05d}.safetensors"


def write_cut(work: Path, cut: BlockCut, digest: str) -> dict[str, Any]:
    """Write the cut of a block whose shard stands; return its entry for the journal.

    Args:
        digest: SHA-256 of the shard.
    """
    write_tensors(cut_file(work, cut.source), cut.tensors())
    return {
        "source": cut.source,
        "sha256": digest,
        "notes": cut.notes,
        "new_weights": sorted(cut.weights),
    }


def read_cut(
    work: Path, model: Path, plan: Plan, layers: Sequence[int], entry: Mapping[str, Any]
) -> BlockCut:
    """The cut of a finished block by its entry; new weights are read where they are asked for.

    Args:
        work: the journal's folder.
        model: where the shards are.
        layers: all blocks that stay, by which shards are numbered.
    """
    from safetensors.torch import load_file

    source = entry["source"]
    cut = BlockCut.of(source, load_file(cut_file(work, source)), entry["notes"])
    number, new = layers.index(source), entry["new_weights"]
    cut.weights = hf.stored_weights(model, plan, number, len(layers), new)
    return cut


def finished_blocks(journal: Journal, plan: Plan, layers: Sequence[int]) -> dict[int, BlockCut]:
    """The cuts of all blocks that the journal says are finished."""
    # The files are still in the work folder, or under their name already.
    model = journal.model if any(journal.model.glob("*")) else journal.out
    entries = [entry["value"] for entry in journal.entries if entry["kind"] == "block"]
    cuts = (read_cut(journal.folder, model, plan, layers, entry) for entry in entries)
    return {cut.source: cut for cut in cuts}
