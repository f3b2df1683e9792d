"""What every run starts with: the open source, the recipe, the windows of text."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.calibration import (
    Windows,
    check_vocabulary,
    draw_windows,
    hides_a_set,
    load_text,
)
from secateur.checkpoint import Checkpoint, open_checkpoint
from secateur.checkpoint.writer import Journal
from secateur.devices import check_device
from secateur.errors import RecipeError, SourceError
from secateur.forms import Target
from secateur.modules import MODEL_TYPE_PREFIX
from secateur.outputs.record import healed
from secateur.progress import Progress
from secateur.recipe import Recipe
from secateur.streaming import Stream


class Opened:
    """A source that can be pruned, and the recipe to prune it by."""

    windows: Windows
    #: Bytes of other processes that worked for this one, each at its most.
    workers_peak: int = 0

    def __init__(
        self,
        source: str | Path,
        recipe: Recipe,
        *,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
        target: Target | None,
    ) -> None:
        self.recipe = recipe
        self.progress = progress
        self.target = target or Target()
        self.checkpoint: Checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
        self._state = self.checkpoint.state()
        training = healed(self.checkpoint)
        if training is not None:
            raise SourceError(
                f"source {source} was healed, which is training ({training}): prune the original, "
                "and heal the result"
            )
        if str(self.checkpoint.config.model_type).startswith(MODEL_TYPE_PREFIX):
            raise SourceError(
                f"source {source} has been pruned to different sizes in each block already: prune "
                "the original with a larger --remove instead"
            )
        self.stream = Stream(self.checkpoint, check_device(device))
        self.dtype = self.checkpoint.dtype if recipe.dtype == "auto" else _dtype(recipe.dtype)

    def _calibrate(self) -> Windows:
        spec = self.recipe.calibration
        longest = getattr(self.checkpoint.config, "max_position_embeddings", None)
        if longest is not None and spec.length > longest:
            raise RecipeError(
                f"length is {spec.length}, the model's positions end at {longest}: lower --length"
            )
        check_vocabulary(self.checkpoint.tokenizer, int(self.checkpoint.config.vocab_size))
        if note := hides_a_set(spec.source):
            self.progress.note(note)
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
            "source_files": self._state,
            "calibration": self.windows.sha256,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "device": str(self.stream.device),
            "target": [self.target.kind, self.target.weights],
        }

    def provenance(self) -> dict[str, Any]:
        """The part of ``secateur.json`` that says what a model was made of."""
        return {
            "format": 1,
            "recipe": self.recipe.model_dump(exclude_defaults=False),
            "source": {
                "name": Path(self.checkpoint.source).name,
                "fingerprint": self.checkpoint.fingerprint,
                "model_type": self.stream.anatomy.model_type,
            },
            "calibration": {"origin": self.windows.origin, "sha256": self.windows.sha256},
            "versions": versions(),
        }

    def check_unchanged(self, journal: Journal) -> None:
        """Whether the source is still the one of the journal's first line.

        Raises:
            SourceError: it has been written to since.
        """
        try:
            changed = self.checkpoint.state() != journal.entries[0]["value"]["source_files"]
        except OSError:
            changed = True  # gone
        if changed:
            raise SourceError(
                f"source {self.checkpoint.source} changed while it was read: the finished blocks "
                f"are of no use; remove {journal.folder} and start again"
            )


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
