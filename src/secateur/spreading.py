"""The blocks of one run, cut side by side by several workers.

That can be done where what goes into a block does not depend on how others are cut: the uncut
model is run once, here, and what goes into each block is written to a file; from there on a block
is the business of whichever worker is free. Only the number of parameters that a block should have
lost and has not is handed on to the next (:class:`Quotas`). The journal is kept here and by nobody
else, so that a run that is killed continues with workers or without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from secateur.checkpoint import local_path
from secateur.checkpoint.writer import Journal, write_tensors
from secateur.errors import OutputError, SourceError, WorkerDied
from secateur.executors import Asked, Pool
from secateur.finished import inputs_file, read_cut
from secateur.methods import Shares
from secateur.opening import versions
from secateur.pipeline import Run
from secateur.plans import BlockCut, Plan, block_removed
from secateur.progress import process_memory

#: Workers that may die at one block before the run is given up.
TRIES = 3


class Quotas:
    """What each block shall lose, which of some methods depends on what others could.

    Args:
        shares: of all blocks.
        layers: blocks that stay, in order.
        carries: whether a block's miss is made up for by the next (:attr:`Method.carries`).
    """

    def __init__(self, shares: Shares, layers: Sequence[int], carries: bool) -> None:
        self._wanted = {layer: shares[layer].parameters for layer in layers}
        chain = [layer for layer in layers if self._wanted[layer]]
        self._before = dict(zip(chain[1:], chain, strict=False)) if carries else {}
        self._missed: dict[int, int] = {}
        self._news = threading.Condition()
        self._ended = False

    def of(self, layer: int) -> int:
        """Parameters that the block shall lose; waits until it is known.

        Raises:
            WorkerDied: the run has ended meanwhile.
        """
        with self._news:
            return self._of(layer)

    def _of(self, layer: int) -> int:
        before = self._before.get(layer)
        if before is None:
            return self._wanted[layer]
        self._news.wait_for(lambda: before in self._missed or self._ended)
        if self._ended:
            raise WorkerDied("the run has ended")
        return self._wanted[layer] + self._missed[before]

    def lost(self, layer: int, removed: int) -> None:
        """So many parameters of the block are gone."""
        with self._news:
            self._missed[layer] = self._of(layer) - removed
            self._news.notify_all()

    def end(self) -> None:
        """Let go of those who wait."""
        with self._news:
            self._ended = True
            self._news.notify_all()


class Blocks:
    """Has blocks cut, and hands on what the journal shall say of them.

    Args:
        run: that they belong to.
        journal: in whose folder shards are written.
        layers: all blocks that stay, in order.
        shares: what each shall lose.
        done: blocks that are finished.
    """

    def __init__(
        self,
        run: Run,
        journal: Journal,
        layers: Sequence[int],
        shares: Shares,
        done: Mapping[int, BlockCut],
    ) -> None:
        assert run.executor is not None
        self._run = run
        self._executor = run.executor
        self._journal = journal
        self._layers = list(layers)
        self._shares = shares
        self._late = 0
        self._quotas = Quotas(shares, layers, run.method.carries)
        for layer in self._layers:  # in order: each needs what those before it have missed
            if layer not in done:
                break
            self._quotas.lost(layer, block_removed(run.stream.anatomy, done[layer]))
        self._done = dict(done)
        self._own = threading.local()
        self._memory: dict[int, tuple[int, int]] = {}

    def cut(self, keep: Callable[[dict[str, Any]], None]) -> list[BlockCut]:
        """Cut all that are not finished.

        Args:
            keep: called with the journal's entry of each block, when its files stand.

        Returns:
            the cuts of all blocks, in order.

        Raises:
            SecateurError: a worker's, or that workers die.
        """
        run, progress = self._run, self._run.progress
        progress.stage("cutting blocks", len(self._layers))
        progress.step(steps=len(self._done))
        own, progress.memory = progress.memory, self._all_memory
        plan = Plan(run.stream.anatomy, [])
        try:
            idle = lambda: progress.step("", steps=0)  # noqa: E731
            with Pool(self._executor.workers, self._one, end=self._end, idle=idle) as pool:

                def take(layer: int, entry: dict[str, Any]) -> None:
                    keep(entry)
                    inputs_file(self._journal.folder, layer).unlink(missing_ok=True)
                    self._done[layer] = read_cut(
                        self._journal.folder, self._journal.model, plan, self._layers, entry
                    )
                    progress.step(f"block {layer}")

                for layer in self._hand_out():
                    pool.give(layer)
                    for finished in pool.ready():
                        take(*finished)
                for finished in pool.rest():
                    take(*finished)
        finally:
            progress.memory = own
        progress.finish()
        return [self._done[layer] for layer in self._layers]

    @property
    def peak_memory(self) -> int:
        """Bytes of all workers together, each at its most."""
        return sum(peak for _, peak in self._memory.values())

    def _all_memory(self) -> int:
        return process_memory() + sum(now for now, _ in list(self._memory.values()))

    def _hand_out(self) -> Any:
        """Run the uncut model; yields each open block when that which goes into it is on disk."""
        run, engine = self._run, self._run.engine
        open_ = [layer for layer in self._layers if layer not in self._done]
        reads = [i for i in open_ if engine.inside.signals(self._shares[i].parameters)]
        last = max(reads, default=-1)
        windows = None
        if reads:
            windows, self._late = engine.text.windows(run.windows.tokens)
        hidden = run.stream.embed(windows) if windows is not None else None
        for layer in self._layers:
            if layer in reads:
                assert hidden is not None
                write_tensors(inputs_file(self._journal.folder, layer), {"hidden": hidden.cpu()})
            if layer not in self._done:
                yield layer
            if layer < last and hidden is not None:
                with run.stream.block(layer) as module:
                    hidden = run.stream.forward_block(layer, module, hidden)
                run.progress.step(f"block {layer} run", steps=0)

    def _end(self) -> None:
        self._quotas.end()
        self._executor.close()

    # ---- in the threads of the pool ----------------------------------------------------------

    def _one(self, layer: int) -> dict[str, Any]:
        """One block from beginning to end, by another worker should one die."""
        for attempt in range(TRIES):
            try:
                return self._through(layer)
            except WorkerDied as error:
                self._drop()
                if attempt == TRIES - 1:
                    raise OutputError(
                        f"{TRIES} workers died at block {layer}, the last one so: {error}; "
                        "finished blocks are kept: repeat the command, with fewer --workers if "
                        "memory is short"
                    ) from error
        raise AssertionError

    def _through(self, layer: int) -> dict[str, Any]:
        share, folder = self._shares[layer], self._journal.folder
        reads = bool(self._run.engine.inside.signals(share.parameters))
        worker = self._worker()
        worker.ask(
            "look",
            layer=layer,
            inputs=str(inputs_file(folder, layer)) if reads else None,
            late=self._late if reads else 0,
            share=asdict(share),
        )
        removed = worker.ask("cut", parameters=self._quotas.of(layer))
        self._quotas.lost(layer, removed)
        found = worker.ask("write")
        self._memory[threading.get_ident()] = (found["memory"], found["peak"])
        entry: dict[str, Any] = found["entry"]
        return entry

    def _worker(self) -> Asked:
        """This thread's worker, opened."""
        worker: Asked | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._executor.worker("secateur.block_worker", "a worker")
            self._own.worker = worker
            run = self._run
            path = local_path(run.checkpoint.source)
            said = worker.ask(
                "open",
                source=str(path.resolve()) if path.exists() else run.checkpoint.source,
                recipe=run.recipe.model_dump(mode="json"),
                target=[run.target.kind, run.target.weights],
                device=str(run.stream.device),
                trust_remote_code=run.trust_remote_code,
                layers=self._layers,
                folder=str(self._journal.folder),
                threads=self._executor.threads,
            )
            _agree(said, {"versions": versions(), "source": run.checkpoint.fingerprint})
        return worker

    def _drop(self) -> None:
        worker: Asked | None = getattr(self._own, "worker", None)
        if worker is not None:
            self._own.worker = None
            self._executor.end(worker)


def _agree(said: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Whether a worker, perhaps on another machine, makes the same bytes as this process would.

    Raises:
        SourceError: it reads another model.
        OutputError: it has other packages.
    """
    if said["source"] != wanted["source"]:
        raise SourceError(
            "a worker finds another model at the path of the source than this process: let all "
            "nodes see the same checkpoint"
        )
    for package, version in wanted["versions"].items():
        if said["versions"][package] != version:
            raise OutputError(
                f"a worker has {package} {said['versions'][package]}, this process {version}: "
                "install the same packages on all nodes"
            )
