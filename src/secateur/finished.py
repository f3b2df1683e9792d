"""What stands in the work folder of each finished block, besides its shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.writer import Journal, is_whole, newest_blocks, write_tensors
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
    of_cut = write_tensors(cut_file(work, cut.source), cut.tensors())
    return {
        "source": cut.source,
        "sha256": digest,
        "cut_sha256": of_cut,
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
    """The cuts of all blocks that the journal says are finished, and whose files say so too."""
    # The files are still in the work folder, or under their name already.
    model = journal.model if any(journal.model.glob("*")) else journal.out
    done: dict[int, BlockCut] = {}
    for entry in newest_blocks(journal):
        source = entry["source"]
        wanted = {
            cut_file(journal.folder, source): entry["cut_sha256"],
            model / hf.shard_name(layers.index(source), len(layers)): entry["sha256"],
        }
        if is_whole(wanted):
            done[source] = read_cut(journal.folder, model, plan, layers, entry)
    return done
