"""From a source and a recipe to a plan, and from a plan to a folder that opens."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.calibration import Windows, check_vocabulary, draw_windows, load_text
from secateur.checkpoint import Checkpoint, local_path, open_checkpoint
from secateur.checkpoint.writer import (
    Journal,
    check_output,
    drop_waste,
    work_folder,
    write_bytes,
    write_json,
    write_tensors,
)
from secateur.engine import Engine, LayerChoice
from secateur.errors import OutputError, RecipeError, SecateurError, SourceError
from secateur.estimate import Estimate, check_memory, estimate, parse_limit
from secateur.methods import Method, get_method
from secateur.modules import MODEL_TYPE_PREFIX
from secateur.outputs import hf
from secateur.outputs.card import model_card
from secateur.outputs.verify import Verification, verify_folder
from secateur.plans import BlockCut, Plan, Tensors
from secateur.progress import PeakMemory, Progress
from secateur.recipe import Recipe, parameters_to_remove
from secateur.streaming import Stream, check_device

RECORD = "secateur.json"
PLAN_TENSORS = "secateur_plan.safetensors"


@dataclass(frozen=True)
class PlanResult:
    """A plan and what led to it.

    Attributes:
        plan: what stays.
        asked: parameters that were to go.
        choice: the layer stage's outcome.
        trials: held-out loss by number of removed blocks, where that was chosen.
        bytes_written: of the weights in the output's type.
        estimate: of memory and time, made before the start.
        seconds, peak_memory: what it took, in seconds by stage and bytes.
    """

    plan: Plan
    asked: int
    choice: LayerChoice
    trials: list[dict[str, float]]
    bytes_written: int
    estimate: Estimate
    seconds: dict[str, float]
    peak_memory: int


@dataclass(frozen=True)
class PruneResult(PlanResult):
    """A written model: where it is and what the fresh process said."""

    out: Path = field(default=Path())
    verification: Verification | None = None


class _Run:
    """What ``plan`` and ``prune`` share: everything up to the neuron stage."""

    def __init__(
        self,
        source: str | Path,
        recipe: Recipe,
        *,
        device: str,
        max_memory: str | None,
        trust_remote_code: bool,
        progress: Progress,
    ) -> None:
        self.recipe = recipe
        self.progress = progress
        self.checkpoint: Checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
        if str(self.checkpoint.config.model_type).startswith(MODEL_TYPE_PREFIX):
            raise SourceError(
                f"source {source} has been pruned to different sizes in each block already: prune "
                "the original with a larger --remove instead"
            )
        self.method: Method = get_method(recipe.method, recipe.options)
        self.stream = Stream(self.checkpoint, check_device(device))
        self.dtype = self.checkpoint.dtype if recipe.dtype == "auto" else _dtype(recipe.dtype)
        anatomy = self.stream.anatomy
        self.asked = parameters_to_remove(
            recipe,
            parameters=anatomy.parameters,
            decoder=anatomy.decoder_parameters,
            bytes_each=self.dtype.itemsize,
        )
        most = self.asked // anatomy.block_parameters
        counts = self.method.layer_counts(most)
        spec, config = recipe.calibration, self.checkpoint.config
        self.memory = parse_limit(max_memory) if max_memory else None
        self.estimate = estimate(
            anatomy,
            self.method.signals(anatomy),
            windows=spec.samples,
            length=spec.length,
            hidden=int(config.hidden_size),
            vocabulary=int(config.vocab_size),
            overhead=self.checkpoint.overhead,
            passes=2 if len(counts) == 1 else 2 + 2 * min(3, len(counts)),
        )
        progress.note(self.estimate.text())
        check_memory(self.estimate, max_memory)
        self.windows = self._calibrate()
        self.engine = Engine(
            self.stream,
            self.method,
            to_remove=self.asked,
            seed=recipe.seed,
            dtype=self.dtype,
            progress=progress,
        )

    def _calibrate(self) -> Windows:
        spec = self.recipe.calibration
        longest = getattr(self.checkpoint.config, "max_position_embeddings", None)
        if longest is not None and spec.length > longest:
            raise RecipeError(
                f"length is {spec.length}, the model's positions end at {longest}: lower --length"
            )
        check_vocabulary(self.checkpoint.tokenizer, int(self.checkpoint.config.vocab_size))
        text = load_text(
            spec.source, use="calibration", text_field=spec.text_field, data_dir=spec.data_dir
        )
        return draw_windows(
            text,
            self.checkpoint.tokenizer,
            samples=spec.samples,
            length=spec.length,
            seed=self.recipe.seed,
        )

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output."""
        return {
            "recipe": self.recipe.model_dump(),
            "source": self.checkpoint.fingerprint,
            "source_files": self.checkpoint.state(),
            "calibration": self.windows.sha256,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "device": str(self.stream.device),
        }

    def record(self, plan: Plan, choice: LayerChoice, trials: list[dict[str, float]]) -> Any:
        """The content of ``secateur.json``. Nothing here depends on time or place."""
        before, after = plan.sizes_before(), plan.sizes()
        return {
            "format": 1,
            "recipe": self.recipe.model_dump(exclude_defaults=False),
            "method_options": self.method.options.model_dump(),
            "source": {
                "name": Path(self.checkpoint.source).name,
                "fingerprint": self.checkpoint.fingerprint,
                "model_type": plan.anatomy.model_type,
            },
            "calibration": {"origin": self.windows.origin, "sha256": self.windows.sha256},
            "versions": versions(),
            "asked": {"parameters_removed": self.asked},
            "reached": {"parameters_removed": before.parameters - after.parameters},
            "layer_stage": {
                "importances": {str(k): round(v, 6) for k, v in choice.importances.items()},
                "removed_in_order": choice.removed,
                "trials": trials,
            },
            "plan": plan.summary(),
        }

    def result_fields(self, plan: Plan, choice: LayerChoice, peak: int) -> dict[str, Any]:
        return {
            "plan": plan,
            "asked": self.asked,
            "choice": choice,
            "trials": self.engine.trials,
            "bytes_written": plan.sizes().parameters * self.dtype.itemsize,
            "estimate": self.estimate,
            "seconds": dict(self.progress.seconds),
            "peak_memory": peak,
        }


def make_plan(
    source: str | Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    max_memory: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PlanResult:
    """Find out what would go, without writing a model.

    Args:
        source: folder, GGUF file or hub id.
        recipe: what is asked.
        device: where blocks run: ``cpu``, ``cuda``, ``cuda:1``.
        max_memory: refuse to start when the estimate is above this, such as ``4GB``.
        trust_remote_code: run Python code of the checkpoint.
        progress: shows the work; nothing by default.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    with PeakMemory() as memory:
        run = _Run(
            source,
            recipe,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            progress=progress or Progress(),
        )
        tokens = run.windows.tokens
        choice = run.engine.choose_layers(tokens)
        plan = run.engine.neuron_stage(choice.layers, run.engine.quotas(choice), tokens)
    return PlanResult(**run.result_fields(plan, choice, memory.peak))


def prune(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    max_memory: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    verify: bool = True,
) -> PruneResult:
    """Prune ``source`` by ``recipe`` and write the result to the folder ``out``.

    Work goes on in ``OUT.partial``; after a kill the same call continues behind the last finished
    block, and ends in the same bytes. See :func:`make_plan` for the other arguments.

    Args:
        verify: reopen the result in a fresh process and compare logits before it gets its name.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    target = local_path(out).resolve()
    progress = progress or Progress()
    with PeakMemory() as memory:
        drop_waste(target)
        finished = _moved_but_not_cleaned(target)
        if not finished:
            check_output(target, local_path(source))
        run = _Run(
            source,
            recipe,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        journal = Journal(target, run.identity())
        try:
            if finished:
                check_output_of(target, journal)
            plan, choice = _write(run, journal)
            verification = _verified(run, journal, plan) if verify else None
            journal.finish()
        except SecateurError:
            journal.drop_if_fruitless()  # it would be in the way of the mended command
            raise
        finally:
            journal.close()
    return PruneResult(
        **run.result_fields(plan, choice, memory.peak), out=target, verification=verification
    )


def _write(run: _Run, journal: Journal) -> tuple[Plan, LayerChoice]:
    """All files of the model in the journal's work folder."""
    choice = _layer_choice(run, journal)
    quotas = run.engine.quotas(choice)
    blocks = len(choice.layers)
    plan = Plan(run.stream.anatomy, [])
    done = _finished_blocks(journal)
    if done:
        run.progress.note(f"continuing: {len(done)} of {blocks} blocks are finished")

    def sink(cut: BlockCut, state: Tensors) -> None:
        number = choice.layers.index(cut.source)
        digest = hf.write_block(
            journal.model, plan, cut, state, number=number, blocks=blocks, dtype=run.dtype
        )
        write_tensors(_cut_file(journal, cut.source), cut.tensors())
        journal.add("block", {"source": cut.source, "sha256": digest, "notes": cut.notes})
        _check_unchanged(run, journal)

    if journal.find("files") is None:
        plan = run.engine.neuron_stage(
            choice.layers, quotas, run.windows.tokens, sink=sink, done=done
        )
        _write_rest(run, journal, plan, choice)
        _check_unchanged(run, journal)
        journal.add("files", {})
    else:
        plan.blocks.extend(done[layer] for layer in choice.layers)
    return plan, choice


def _layer_choice(run: _Run, journal: Journal) -> LayerChoice:
    found = journal.find("layers")
    if found is None:
        choice = run.engine.choose_layers(run.windows.tokens)
        found = {
            "layers": choice.layers,
            "importances": [choice.importances[i] for i in choice.layers],
            "removed": choice.removed,
            "loss": choice.held_out_loss,
            "trials": run.engine.trials,
        }
        journal.add("layers", found)
    run.engine.trials = found["trials"]
    importances = dict(zip(found["layers"], found["importances"], strict=True))
    return LayerChoice(found["layers"], importances, found["removed"], found["loss"])


def _check_unchanged(run: _Run, journal: Journal) -> None:
    """Whether the source is still the one of the journal's first line.

    Raises:
        SourceError: it has been written to since.
    """
    if run.checkpoint.state() != journal.entries[0]["value"]["source_files"]:
        raise SourceError(
            f"source {run.checkpoint.source} changed while it was read: the finished blocks "
            f"are of no use; remove {journal.folder} and start again"
        )


def _cut_file(journal: Journal, source: int) -> Path:
    return journal.folder / f"cut-{source:05d}.safetensors"


def _finished_blocks(journal: Journal) -> dict[int, BlockCut]:
    from safetensors.torch import load_file

    done: dict[int, BlockCut] = {}
    for entry in journal.entries:
        if entry["kind"] == "block":
            source = entry["value"]["source"]
            tensors = load_file(_cut_file(journal, source))
            done[source] = BlockCut.of(source, tensors, entry["value"]["notes"])
    return done


def _write_rest(run: _Run, journal: Journal, plan: Plan, choice: LayerChoice) -> None:
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
    record = run.record(plan, choice, run.engine.trials)
    write_json(folder / RECORD, record)
    card = model_card(
        plan,
        record,
        source=run.checkpoint.source,
        stock=plan.uniform_ffn_width is not None,
    )
    write_bytes(folder / "README.md", card.encode())
    run.progress.step()
    run.progress.finish()


def _verified(run: _Run, journal: Journal, plan: Plan) -> Verification:
    folder = journal.model if journal.model.is_dir() else journal.out
    run.progress.stage("verifying in a fresh process", 1)
    verification = verify_folder(folder, run.stream, plan, run.dtype, memory=run.memory)
    run.progress.step()
    run.progress.finish()
    return verification


def _moved_but_not_cleaned(target: Path) -> bool:
    """Killed between giving the folder its name and dropping the work folder."""
    work = work_folder(target)
    moved = not any((work / "model").glob("*"))  # opening the journal makes it again, empty
    return work.is_dir() and moved and (target / RECORD).is_file()


def check_output_of(target: Path, journal: Journal) -> None:
    """The folder of an earlier run stands; it must be of this journal.

    Raises:
        OutputError: the journal knows nothing of finished files.
    """
    if journal.find("files") is None:
        raise OutputError(
            f"output {target} exists and is not empty: choose another --out, or remove it first"
        )
    journal.model.rmdir()  # made empty by opening the journal


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import safetensors
    import transformers

    return {
        "secateur": secateur.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


__all__ = ["PlanResult", "PruneResult", "make_plan", "prune"]
