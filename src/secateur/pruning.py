"""From a plan to what runs: a folder or a GGUF file, written block by block under a journal."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.checkpoint import local_path, open_checkpoint
from secateur.checkpoint.writer import (
    JOURNAL,
    Journal,
    check_output,
    drop_waste,
    work_folder,
    write_bytes,
    write_json,
    write_tensors,
)
from secateur.errors import OutputError, SecateurError
from secateur.executors import opened_executor, spreads
from secateur.finished import finished_blocks, write_cut
from secateur.forms import Target
from secateur.layers import LayerChoice, Round
from secateur.methods import Share, Shares
from secateur.outputs import gguf, hf, llama_cpp
from secateur.outputs.card import model_card
from secateur.outputs.hf import PLAN_TENSORS, RECORD
from secateur.outputs.verify import Verification, verify_folder
from secateur.outputs.verify_gguf import GgufVerification, verify_gguf
from secateur.pipeline import PlanResult, Run, open_run
from secateur.plans import BlockCut, Plan, Tensors
from secateur.progress import PeakMemory, Progress
from secateur.recipe import Recipe
from secateur.report.pruning import RunFacts, write_pruning_page
from secateur.rotation.plan import RotationPlan, StoredBases
from secateur.rotation.run import RotationRun
from secateur.spreading import Blocks
from secateur.streaming import Stream


@dataclass(frozen=True)
class PruneResult(PlanResult):
    """A written model: where it is, what the fresh process said, and notes for the user.

    ``facts`` are what the folder's page says of this run; a GGUF file has no page.
    """

    out: Path = field(default=Path())
    facts: RunFacts | None = None
    verification: Verification | None = None
    gguf_verification: GgufVerification | None = None
    notes: list[str] = field(default_factory=list)


def prune(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    weights: str | None = None,
    device: str = "cpu",
    max_memory: str | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    verify: bool = True,
    beside: int = 1,
) -> PruneResult:
    """Prune ``source`` by ``recipe`` and write the result to ``out``.

    Work goes on in ``OUT.partial``; after a kill the same call continues behind the last finished
    block, and ends in the same bytes. See :func:`~secateur.pipeline.make_plan` for the other
    arguments.

    Args:
        out: a folder for transformers, or a file that ends in ``.gguf`` for llama.cpp.
        weights: type of the matrices in a GGUF file: f16 (by default), q8_0, q4_k_m, ...
        max_memory: refuse to start when the estimate, of all processes together, is above this.
        workers: processes that cut blocks side by side and share out the threads of this one; the
            bytes are those of a run of one process with as many threads as each of them has.
        cluster: ``ray`` has the blocks cut on the nodes of a Ray, which must all see the source and
            the output at the same paths: the one that ``RAY_ADDRESS`` names, or ``ray://HOST:PORT``
            in its place, or else one that is started here.
        verify: reopen the result in a fresh process and compare logits before it gets its name.
        beside: runs like this one that share ``max_memory``.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    place = local_path(out).resolve()
    progress = progress or Progress()
    target = Target()
    if place.suffix == ".gguf":
        target = Target("gguf", gguf.check_type(weights or "f16"))
    elif weights is not None:
        raise OutputError(
            f"--type {weights} is for a GGUF file, but output {out} is a folder: let --out end in "
            ".gguf, or use --dtype for the weights of a folder"
        )
    spread = spreads(workers, cluster)
    with PeakMemory() as memory, ExitStack() as stack:
        drop_waste(place)
        finished = moved_but_not_cleaned(place)
        if not finished:
            check_output(place, local_path(source), file=target.kind == "gguf")
        run = open_run(
            source,
            recipe,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            progress=progress,
            target=target,
            beside=beside,
            spreads=spread,
        )
        executor = stack.enter_context(opened_executor(workers, cluster))
        if executor is not None and isinstance(run, Run):
            run.spread_over(executor)
        journal = Journal(place, run.identity())
        continued = len(journal.entries) > 1
        try:
            if finished:
                check_output_of(place, journal)
            if isinstance(run, RotationRun):
                plan, choice, cost = run.write(journal)
            else:
                plan, choice, cost = _write(run, journal)
            verification = _verified(run, journal, plan) if verify else None
            notes: list[str] = []
            ran: GgufVerification | None = None
            facts: RunFacts | None = None
            if target.kind == "gguf":
                notes, ran = _export(run, journal, verify=verify)
            else:
                peak = memory.peak + run.workers_peak
                facts = _facts(run, plan, place.name, peak, verification, continued)
                if journal.model.is_dir():  # else it has moved, and its page with it
                    write_pruning_page(journal.model, facts)
                journal.finish()
            _find_weights(plan, place if target.kind == "hf" else None)
        except SecateurError:
            journal.drop_if_fruitless()  # it would be in the way of the mended command
            raise
        finally:
            journal.close()
    return PruneResult(
        **run.result_fields(plan, choice, cost, memory.peak + run.workers_peak),
        out=place,
        facts=facts,
        verification=verification,
        gguf_verification=ran,
        notes=notes,
    )


def _facts(
    run: Run | RotationRun,
    plan: Plan,
    name: str,
    peak: int,
    verification: Verification | None,
    continued: bool,
) -> RunFacts:
    return RunFacts(
        source=run.checkpoint.source,
        out=name,
        stock=hf.stock_keys(run.checkpoint, plan) is not None,
        bytes_each=run.dtype.itemsize,
        seconds=dict(run.progress.seconds),
        peak_memory=peak,
        estimate=run.estimate,
        verification=verification,
        continued=continued,
    )


def _export(
    run: Run | RotationRun, journal: Journal, *, verify: bool
) -> tuple[list[str], GgufVerification | None]:
    """The GGUF file from the folder that the journal holds; it gets its name when it is verified.

    It replaces an earlier one of ours.
    """
    stream = Stream(open_checkpoint(journal.model))
    run.progress.stage(f"writing {run.target.weights} GGUF", len(stream.stored_parameters()))
    written = gguf.export(
        stream,
        journal.folder / journal.out.name,
        kind=run.target.weights,
        name=Path(run.checkpoint.source).name,
        step=run.progress.step,
    )
    run.progress.finish()
    notes, found = list(written.notes), None
    if verify and llama_cpp.available():
        found = verify_gguf(written.path, stream, against="the pruned model", progress=run.progress)
    elif verify:
        notes.append(llama_cpp.NOT_RUN)
    journal.finish_file(written.path)
    return notes, found


def _write(run: Run, journal: Journal) -> tuple[Plan, LayerChoice, dict[str, float] | None]:
    """All files of the model in the journal's work folder."""
    choice, cost = _layer_choice(run, journal)
    shares = _shares(run, journal, choice)
    blocks = len(choice.layers)
    plan = Plan(run.stream.anatomy, [])
    done = finished_blocks(journal, plan, choice.layers)
    if done:
        run.progress.note(f"continuing: {len(done)} of {blocks} blocks are finished")

    def keep(entry: dict[str, Any]) -> None:
        journal.add("block", entry)
        run.check_unchanged(journal)

    def sink(cut: BlockCut, state: Tensors) -> None:
        number = choice.layers.index(cut.source)
        digest = hf.write_block(
            journal.model, plan, cut, state, number=number, blocks=blocks, dtype=run.dtype
        )
        new = sorted(cut.weights)
        keep(write_cut(journal.folder, cut, digest))
        cut.weights = hf.stored_weights(journal.model, plan, number, blocks, new)

    if journal.find("files") is None or len(done) < blocks:
        if run.executor is not None:
            spread = Blocks(run, journal, choice.layers, shares, done)
            plan.blocks.extend(spread.cut(keep))
            run.workers_peak = spread.peak_memory
        else:
            plan = run.engine.neuron_stage(
                choice.layers, shares, run.windows.tokens, sink=sink, done=done
            )
        _write_rest(run, journal, plan, choice, cost)
        run.check_unchanged(journal)
        journal.add("files", {})
    else:
        plan.blocks.extend(done[layer] for layer in choice.layers)
    return plan, choice, cost


def _layer_choice(run: Run, journal: Journal) -> tuple[LayerChoice, dict[str, float] | None]:
    """The blocks that stay, and what one width for all of them costs; from the journal if known."""
    found = journal.find("layers")
    if found is None:
        known = [Round.of(e["value"]) for e in journal.entries if e["kind"] == "removed"]
        choice = run.engine.choose_layers(
            run.windows.tokens,
            known=known,
            note=lambda done: journal.add("removed", done.to_json()),
        )
        found = {
            "layers": choice.layers,
            "importances": [choice.importances.get(i) for i in choice.layers],
            "removed": choice.removed,
            "growths": [choice.growths.get(i) for i in choice.removed],
            "loss": choice.held_out_loss,
            "trials": run.engine.trials,
            "layout_cost": run.layout_cost(choice),
        }
        journal.add("layers", found)
    run.engine.trials = found["trials"]
    ranked = zip(found["layers"], found["importances"], strict=True)
    importances = {i: value for i, value in ranked if value is not None}
    growths = zip(found["removed"], found["growths"], strict=True)
    choice = LayerChoice(
        found["layers"],
        importances,
        found["removed"],
        found["loss"],
        {i: growth for i, growth in growths if growth is not None},
    )
    return choice, found["layout_cost"]


def _shares(run: Run, journal: Journal, choice: LayerChoice) -> Shares:
    """What each block shall lose; from the journal where finding out took a look at all blocks."""
    found = journal.find("shares")
    if found is None:
        shares = run.engine.shares(choice, run.windows.tokens)
        if run.method.survey_by(run.stream.anatomy, run.windows.tokens.numel()):
            journal.add(
                "shares", [[layer, *vars(share).values()] for layer, share in shares.items()]
            )
        return shares
    return {layer: Share(*share) for layer, *share in found}


def _find_weights(plan: Plan, folder: Path | None) -> None:
    """Let new weights be read where the model has gone to; forget them where there is no folder."""
    if isinstance(plan, RotationPlan):
        if folder is not None:
            plan.bases = StoredBases(folder, len(plan.blocks))
        return
    for number, cut in enumerate(plan.blocks):
        names, blocks = list(cut.weights), len(plan.blocks)
        cut.weights = hf.stored_weights(folder, plan, number, blocks, names) if folder else {}


def _write_rest(
    run: Run,
    journal: Journal,
    plan: Plan,
    choice: LayerChoice,
    cost: dict[str, float] | None,
) -> None:
    folder = journal.model
    run.progress.stage("writing embeddings, config, tokenizer", 1)
    outside = run.stream.read_outside()
    hf.write_outside(folder, outside, blocks=len(plan.blocks), dtype=run.dtype)
    del outside
    hf.write_config(folder, run.checkpoint, plan, run.dtype)
    hf.copy_companions(folder, run.checkpoint)
    tensors = {
        f"blocks.{number}.{name}": tensor
        for number, cut in enumerate(plan.blocks)
        for name, tensor in cut.tensors().items()
    }
    write_tensors(folder / PLAN_TENSORS, tensors)
    record = run.record(plan, choice, run.engine.trials, cost)
    write_json(folder / RECORD, record)
    card = model_card(
        plan,
        record,
        source=run.checkpoint.source,
        stock=hf.stock_keys(run.checkpoint, plan) is not None,
    )
    write_bytes(folder / "README.md", card.encode())
    run.progress.step()
    run.progress.finish()


def _verified(run: Run | RotationRun, journal: Journal, plan: Plan) -> Verification:
    folder = journal.model if journal.model.is_dir() else journal.out
    run.progress.stage("verifying in a fresh process", 1)
    verification = verify_folder(folder, run.stream, plan, run.dtype, memory=run.memory)
    run.progress.step()
    run.progress.finish()
    return verification


def moved_but_not_cleaned(target: Path) -> bool:
    """Killed between giving the result its name and dropping the work folder."""
    work = work_folder(target)
    if target.suffix == ".gguf":
        return target.is_file() and (work / JOURNAL).is_file()
    moved = not any((work / "model").glob("*"))  # opening the journal makes it again, empty
    return work.is_dir() and moved and (target / RECORD).is_file()


def check_output_of(target: Path, journal: Journal) -> None:
    """The folder or file of an earlier run stands; it must be of this journal.

    Raises:
        OutputError: the journal knows nothing of it.
    """
    if target.suffix == ".gguf":
        if journal.find("export") is None:
            raise OutputError(f"output {target} exists: choose another --out, or remove it first")
        return
    if journal.find("files") is None:
        raise OutputError(
            f"output {target} exists and is not empty: choose another --out, or remove it first"
        )
    journal.model.rmdir()  # made empty by opening the journal
