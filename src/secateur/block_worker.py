"""The process in which blocks are cut for a run that has several of them.

A block comes in three steps: ``look`` takes its statistics and does what needs no quota, ``cut``
chooses what stays once the quota is known, ``write`` writes the shard. The process that asks keeps
the journal; until it has, nothing that is written here counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.progress import PeakMemory, Progress, process_memory, quiet
from secateur.workers import serve

if TYPE_CHECKING:
    import torch

    from secateur.methods import Block
    from secateur.pipeline import Prepared
    from secateur.plans import BlockCut, Tensors


class BlockWorker:
    """One block at a time, of one run."""

    _run: Prepared
    _block: Block
    _state: Tensors | None  # of a block that is not large
    _cut: BlockCut

    def __init__(self) -> None:
        self._memory = PeakMemory()
        self._memory.__enter__()
        self._recorded: set[tuple[int, int]] = set()

    def end(self) -> None:
        """Stop measuring; a process that ends need not."""
        self._memory.__exit__()

    def open(
        self,
        source: str,
        recipe: dict[str, Any],
        target: list[str],
        device: str,
        trust_remote_code: bool,
        layers: list[int],
        folder: str,
        threads: int,
    ) -> dict[str, Any]:
        """Open what blocks are cut of.

        Args:
            target: kind and weights of :class:`~secateur.forms.Target`.
            layers: all blocks that stay.
            folder: the journal's.

        Returns:
            what must be the same for all who work on the run.
        """
        import torch

        from secateur.forms import Target
        from secateur.opening import versions
        from secateur.pipeline import Prepared
        from secateur.recipe import make_recipe

        quiet()
        torch.set_num_threads(threads)
        self._run = Prepared(
            source,
            make_recipe(**recipe),
            device=device,
            trust_remote_code=trust_remote_code,
            progress=Progress(),
            target=Target(*target),  # type: ignore[arg-type]
        )
        self._layers = layers
        self._folder = Path(folder)
        return {
            "versions": versions(),
            "source": self._run.checkpoint.fingerprint,
            "threads": torch.get_num_threads(),
        }

    def look(
        self,
        layer: int,
        inputs: str | None,
        late: int,
        share: dict[str, Any],
    ) -> None:
        """Take the statistics of a block, and find out what does not depend on its quota.

        Args:
            inputs: file with what goes into it; None where nothing of that is needed.
            late: windows at the end whose statistics are kept apart.
            share: fields of its :class:`~secateur.methods.Share`, before what blocks ahead have
                missed.
        """
        from secateur.masking import state_of
        from secateur.methods import Share
        from secateur.solvers.ladder import listening
        from secateur.surveys import finite_statistics

        engine, method = self._run.engine, self._run.method
        hidden = None if inputs is None else self._inputs(Path(inputs))
        stream, own = self._run.stream, Share(**share)
        with listening() as self._steps:
            with stream.block(layer) as module:
                block, _ = engine.inside.look(layer, module, hidden, own, late, passes=False)
                self._state = None if stream.large else state_of(module)
            del hidden
            if stream.large:  # it waits in the file while its layers are solved
                block = replace(block, weights=stream.layers_of(layer))
            with finite_statistics(layer):
                prepared = method.prepare(block) if own.parameters else None
        self._block = replace(block, prepared=prepared)

    def _inputs(self, file: Path) -> torch.Tensor:
        """What goes into a block, (windows, length, hidden)."""
        import torch
        from safetensors.torch import load_file

        stream = self._run.stream
        hidden = load_file(file)["hidden"]
        windows, length = hidden.shape[:2]
        size = stream.windows_per_call(length)
        for count in {min(size, windows), windows % size or size}:
            if count <= windows and (count, length) not in self._recorded:
                # How the model calls its blocks depends on the shape alone.
                stream.embed(torch.zeros(count, length, dtype=torch.int64))
                self._recorded.add((count, length))
        return hidden.to(stream.device)

    def cut(self, parameters: int) -> int:
        """Choose what stays of the block that was looked at.

        Args:
            parameters: that it shall lose, with what blocks ahead have missed.

        Returns:
            parameters that are gone.
        """
        from secateur.numerics import cut_by
        from secateur.plans import STEPS, block_removed
        from secateur.solvers.ladder import listening, texts

        with listening() as steps:
            cut = cut_by(self._run.method, self._block, parameters, self._run.dtype)
        steps = list(dict.fromkeys([*self._steps, *steps]))
        if steps:
            cut.notes[STEPS] = texts(steps)
        self._cut = self._run.engine.inside.checked(cut)
        del self._block
        return block_removed(self._run.stream.anatomy, self._cut)

    def write(self) -> dict[str, Any]:
        """Write the shard and the cut.

        Returns:
            the entry for the journal, and bytes of memory: now, and at most until now.
        """
        from secateur.finished import write_cut
        from secateur.outputs import hf
        from secateur.plans import Plan

        run, cut = self._run, self._cut
        number, blocks = self._layers.index(cut.source), len(self._layers)
        state = self._state
        if state is None:
            state = run.stream.read_block(cut.source, run.stream.dtype)
        digest = hf.write_block(
            self._folder / "model",
            Plan(run.stream.anatomy, []),
            cut,
            state,
            number=number,
            blocks=blocks,
            dtype=run.dtype,
        )
        entry = write_cut(self._folder, cut, digest)
        del self._cut, self._state
        memory = process_memory()
        return {"entry": entry, "memory": memory, "peak": max(self._memory.peak, memory)}


def main() -> None:
    """Answer tasks; see the top of this file."""
    worker = BlockWorker()
    serve({"open": worker.open, "look": worker.look, "cut": worker.cut, "write": worker.write})


if __name__ == "__main__":
    main()
