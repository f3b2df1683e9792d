"""Perplexity, streamed: one block in memory, all windows passing through it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from secateur.calibration import (
    Windows,
    check_vocabulary,
    consecutive_windows,
    hides_a_set,
    load_text,
)
from secateur.checkpoint import Checkpoint, open_checkpoint
from secateur.devices import check_device
from secateur.progress import Progress
from secateur.streaming import Stream


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood over predicted tokens, with its protocol.

    Attributes:
        value: the perplexity; 1 is best, the vocabulary's size is blind guessing.
        text: where the tokens come from.
        windows, length: consecutive windows of this many tokens; the first token of each is given.
        sha256: of the tokens.
    """

    value: float
    text: str
    windows: int
    length: int
    sha256: str

    @property
    def protocol(self) -> str:
        return (
            f"{self.text}, {self.windows} windows of {self.length} tokens, float32, "
            f"tokens {self.sha256[:12]}"
        )


def evaluate(
    source: str | Path | Checkpoint,
    *,
    text: str = "builtin",
    length: int = 1024,
    windows: int | None = 10,
    text_field: str = "text",
    data_dir: str | Path | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a model, dense or pruned, folder, GGUF file or hub id.

    Args:
        source: the model, or one that is open already.
        text: ``builtin``, a file, or a named set (its test side).
        length: tokens a window; capped at the model's positions.
        windows: consecutive windows from the start of the text; None for all.
        text_field, data_dir: as for calibration.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    progress = progress or Progress()
    if note := hides_a_set(text):
        progress.note(note)
    stream = Stream(checkpoint, check_device(device))
    found = evaluation_windows(
        checkpoint,
        text=text,
        length=length,
        windows=windows,
        text_field=text_field,
        data_dir=data_dir,
    )
    value = perplexity_of(stream, found, progress)
    count, size = found.tokens.shape
    return Perplexity(value, found.origin, count, size, found.sha256)


def evaluation_windows(
    checkpoint: Checkpoint,
    *,
    text: str,
    length: int,
    windows: int | None,
    text_field: str = "text",
    data_dir: str | Path | None = None,
) -> Windows:
    """The tokens that :func:`evaluate` takes the perplexity over; arguments as there.

    Raises:
        SecateurError: no such text, or a tokenizer of another model.
    """
    check_vocabulary(checkpoint.tokenizer, int(checkpoint.config.vocab_size))
    longest = getattr(checkpoint.config, "max_position_embeddings", None) or length
    return consecutive_windows(
        load_text(text, use="evaluation", text_field=text_field, data_dir=data_dir),
        checkpoint.tokenizer,
        length=min(length, longest),
        most=windows,
    )


def perplexity_of(stream: Stream, windows: Windows, progress: Progress) -> float:
    """Perplexity over given windows."""
    tokens = windows.tokens
    progress.stage("perplexity", stream.anatomy.layers)
    hidden = stream.forward(tokens, lambda layer: progress.step(f"block {layer}"))
    losses = stream.losses(hidden, tokens)
    progress.finish()
    return math.exp(float(losses.mean()))
