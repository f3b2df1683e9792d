"""``heal``: a pruned folder, trained for a while, written in the same layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from secateur.calibration import check_vocabulary, hides_a_set, load_text
from secateur.checkpoint import local_path, open_checkpoint
from secateur.checkpoint.writer import Journal, check_output, drop_waste, write_tensors
from secateur.devices import check_device
from secateur.errors import RecipeError, SecateurError
from secateur.evaluation import load_whole
from secateur.opening import versions
from secateur.outputs.verify import Verification, verify_itself
from secateur.progress import PeakMemory, Progress
from secateur.pruning import check_output_of, moved_but_not_cleaned
from secateur.recovery.groupwise import Groupwise, poor_rows
from secateur.recovery.linears import stored_name
from secateur.recovery.lora import Lora, require_peft
from secateur.recovery.settings import HealSettings
from secateur.recovery.source import Pruned, check_fits, open_pruned
from secateur.recovery.text import HealingText, healing_windows, steps_of_one_pass
from secateur.recovery.training import Training
from secateur.recovery.writing import write_record, write_weights
from secateur.streaming import Stream

#: The state that a killed run goes on from, in the work folder.
STATE = "training.safetensors"


class Adapters(Protocol):
    """What a method puts into a model to be trained.

    Attributes:
        parameters: what is trained, by names that are the same in every run.
        names: of the layers that get new weights, by block and path.
    """

    parameters: dict[str, nn.Parameter]

    @property
    def names(self) -> list[str]: ...

    def merged(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The weight of a layer with its adapter in it, (p, q) float32, of what is stored."""


@dataclass(frozen=True)
class HealResult:
    """A healed folder.

    Attributes:
        out: the folder.
        before, after: loss on windows that were kept out, in nats a token, as the files have it.
        losses: of each step, before it.
        record: the content of ``secateur.json``.
        verification: what the fresh process said.
        peak_memory: bytes.
        notes: what a user should know, a line each.
    """

    out: Path
    before: float
    after: float
    losses: list[float]
    record: dict[str, Any]
    verification: Verification | None
    peak_memory: int
    notes: list[str] = field(default_factory=list)


def heal(
    source: str | Path,
    out: str | Path,
    settings: HealSettings,
    *,
    data_dir: str | Path | None = None,
    device: str = "cpu",
    every: int = 25,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    verify: bool = True,
) -> HealResult:
    """Train a pruned model on a text and write it to ``out``, in the layout that it has.

    Work goes on in ``OUT.partial``; after a kill the same call continues from the last state that
    was saved, and ends in the same bytes.

    Args:
        source: a folder that ``prune`` wrote.
        out: a folder that does not exist.
        settings: what decides the result.
        data_dir: local copies of the named sets.
        device: where the model runs.
        every: steps between two saved states.
        verify: reopen the result in a fresh process before it gets its name.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    place = local_path(out).resolve()
    progress = progress or Progress()
    if settings.method == "lora":
        require_peft()
    with PeakMemory() as memory:
        drop_waste(place)
        finished = moved_but_not_cleaned(place)
        if not finished:
            check_output(place, local_path(source))
        run = _Run(source, settings, data_dir, check_device(device), trust_remote_code, progress)
        journal = Journal(place, run.identity())
        try:
            if finished:
                check_output_of(place, journal)
            if journal.find("files") is None:
                run.train_and_write(journal, every)
            done = journal.find("files")
            assert done is not None
            folder = journal.model if any(journal.model.glob("*")) else place
            found = run.verified(folder) if verify else None
            journal.finish()
        except SecateurError:
            journal.drop_if_fruitless()  # it would be in the way of the mended command
            raise
        finally:
            journal.close()
    held = done["record"]["healed"]["held_out_loss"]
    return HealResult(
        place, held["before"], held["after"], done["losses"], done["record"], found, memory.peak,
        run.notes(held),
    )  # fmt: skip


class _Run:
    """One run of :func:`heal`: the pruned model, the text, the settings."""

    def __init__(
        self,
        source: str | Path,
        settings: HealSettings,
        data_dir: str | Path | None,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
    ) -> None:
        self.pruned: Pruned = open_pruned(source, trust_remote_code=trust_remote_code)
        self.settings, self.device, self.progress = settings, device, progress
        checkpoint = self.pruned.checkpoint
        longest = getattr(checkpoint.config, "max_position_embeddings", None)
        if longest is not None and settings.length > longest:
            raise RecipeError(
                f"length is {settings.length}, the model's positions end at {longest}: lower "
                "--length"
            )
        check_fits(self.pruned.stream)
        check_vocabulary(checkpoint.tokenizer, int(checkpoint.config.vocab_size))
        if note := hides_a_set(settings.data):
            self.progress.note(note)
        text = load_text(
            settings.data, use="calibration", text_field=settings.text_field, data_dir=data_dir
        )
        self.text: HealingText = healing_windows(
            text,
            checkpoint.tokenizer,
            examples=settings.examples,
            length=settings.length,
            seed=settings.seed,
        )
        self.steps = settings.steps or steps_of_one_pass(
            len(self.text.train.tokens), settings.batch
        )
        self.dtype = _dtype(settings, checkpoint.dtype)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output."""
        return {
            "settings": self.settings.model_dump(),
            "source": self.pruned.checkpoint.fingerprint,
            "source_files": self.pruned.checkpoint.state(),
            "text": self.text.train.sha256,
            "versions": self._versions(),
            "threads": torch.get_num_threads(),
            "device": self.device,
        }

    def train_and_write(self, journal: Journal, every: int) -> None:
        """Everything from the first step to the journal's line ``files``."""
        started = journal.find("state")
        before = self._held_out(self.pruned.stream) if started is None else started["before"]
        adapters, training = self._prepare()
        if started is not None:
            training.load(_read(journal))
            self.progress.note(f"continuing after step {len(training.losses)} of {self.steps}")

        def save() -> None:
            write_tensors(journal.folder / STATE, training.state())
            journal.add("state", {"step": len(training.losses), "before": before})

        self.progress.stage("healing", self.steps - len(training.losses))
        training.run(every=every, save=save, shown=self.progress.step)
        self.progress.finish()
        if started is None or started["step"] < self.steps:
            save()  # so that a full disk while the model is written costs no step
        self._write(journal, adapters)
        after = self._held_out(Stream(open_checkpoint(journal.model)))
        record = write_record(journal.model, self.pruned, self._healed(before, after))
        journal.add("files", {"record": record, "losses": training.losses})

    def _prepare(self) -> tuple[Adapters, Training]:
        """The whole model with its adapters, and the training of them."""
        settings = self.settings
        model = load_whole(self.pruned.checkpoint).to(self.device)
        kinds: dict[str, Callable[..., Adapters]] = {"lora": Lora, "groupwise": Groupwise}
        adapters = kinds[settings.method](model, self.pruned.stream.anatomy, settings)
        if settings.compute == "bfloat16":
            trained = {id(parameter) for parameter in adapters.parameters.values()}
            for parameter in model.parameters():
                if id(parameter) not in trained:
                    parameter.data = parameter.data.bfloat16()
        training = Training(
            model,
            adapters.parameters,
            self.text.train.tokens,
            steps=self.steps,
            batch=settings.batch,
            lr=settings.lr,
            seed=settings.seed,
        )
        return adapters, training

    def _write(self, journal: Journal, adapters: Adapters) -> None:
        checkpoint = self.pruned.checkpoint
        layers = {stored_name(self.pruned.stream.anatomy, name): name for name in adapters.names}

        def merged(stored: str, tensor: torch.Tensor) -> torch.Tensor:
            return adapters.merged(layers[stored], tensor) if stored in layers else tensor

        self.progress.stage("writing the healed model", len(checkpoint.files))
        write_weights(journal.model, checkpoint, merged, self.dtype, self.progress.step)
        self.progress.finish()

    def _held_out(self, stream: Stream) -> float:
        """Mean loss on the windows kept out, as the files have it, one block in memory."""
        tokens = self.text.held_out.tokens
        self.progress.stage("loss on windows kept out", stream.anatomy.layers)
        hidden = stream.forward(tokens, lambda layer: self.progress.step(f"block {layer}"))
        loss = float(stream.losses(hidden, tokens).double().mean())
        self.progress.finish()
        return loss

    def _healed(self, before: float, after: float) -> dict[str, Any]:
        """The record's entry ``healed``."""
        text = self.text
        return {
            "settings": self.settings.model_dump(),
            "steps": self.steps,
            "text": {
                "origin": text.train.origin,
                "examples": text.examples,
                "windows": len(text.train.tokens),
                "held_out": len(text.held_out.tokens),
                "sha256": text.train.sha256,
            },
            "held_out_loss": {"before": before, "after": after},
            "versions": self._versions(),
        }

    def _versions(self) -> dict[str, str]:
        if self.settings.method != "lora":
            return versions()
        from importlib.metadata import version

        return {**versions(), "peft": version("peft")}

    def verified(self, folder: Path) -> Verification:
        """The folder reopened in a fresh process."""
        self.progress.stage("verifying in a fresh process", 1)
        found = verify_itself(folder, Stream(open_checkpoint(folder)), trust_remote_code=True)
        self.progress.step()
        self.progress.finish()
        return found

    def notes(self, held: dict[str, float]) -> list[str]:
        """What a user should know of the result."""
        found = []
        if not held["after"] < held["before"]:
            found.append(
                f"the loss on windows kept out rose from {held['before']:.3f} to "
                f"{held['after']:.3f}: try more --steps, more text, or another --lr"
            )
        if self.settings.method == "groupwise":
            found += poor_rows(self.pruned.stream)
        return found


def _dtype(settings: HealSettings, source: torch.dtype) -> torch.dtype:
    """Type of the written weights. Quantised ones are found again exactly in float32 alone."""
    if settings.dtype == "auto":
        return torch.float32 if settings.method == "groupwise" else source
    chosen: torch.dtype = getattr(torch, settings.dtype)
    return chosen


def _read(journal: Journal) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(journal.folder / STATE)
