"""Calibration windows that the model writes itself, from random first tokens on.

Ten windows of text are few to fit weights to. What a model writes is text of the kind it knows, as
much as is wanted. Writing takes the model as a whole in memory: a token at a time, all blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from secateur.progress import Progress, give_back_memory
from secateur.skeleton import build_skeleton, fill_skeleton
from secateur.streaming import Stream

#: Windows that are written at once.
WINDOWS_AT_ONCE = 64


class Author:
    """Windows written by the model of a stream; made once and kept, ids are small.

    Args:
        stream: the model.
        seed: of first tokens and draws.
    """

    def __init__(self, stream: Stream, *, seed: int, progress: Progress) -> None:
        self._stream = stream
        self._seed = seed
        self._progress = progress
        self._written: dict[int, torch.Tensor] = {}

    def windows(self, count: int, length: int) -> torch.Tensor:
        """``count`` windows, (count, length) int64: tokens drawn from the model's own odds."""
        known = self._written.get(length)
        if known is None or len(known) < count:
            self._written[length] = self._write(count, length)
        return self._written[length][:count]

    def _write(self, count: int, length: int) -> torch.Tensor:
        pieces = -(-count // WINDOWS_AT_ONCE)
        self._progress.stage(f"writing {count} windows of calibration text", pieces)
        checkpoint = self._stream.checkpoint
        model: Any = build_skeleton(checkpoint)
        fill_skeleton(checkpoint, model, self._stream.dtype)
        model.to(self._stream.device)
        made = []
        # generate draws from the global generator; it is put back as it was.
        devices = [self._stream.device] if self._stream.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            for piece in range(pieces):
                # Each piece by itself, so that windows do not depend on how many are asked for.
                torch.manual_seed(self._seed * 1_009 + piece)
                first = self._first_tokens(WINDOWS_AT_ONCE)
                out = model.generate(
                    input_ids=first.to(self._stream.device),
                    attention_mask=torch.ones_like(first).to(self._stream.device),
                    max_new_tokens=length - 1,
                    min_new_tokens=length - 1,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    pad_token_id=0,
                )
                made.append(out.cpu())
                self._progress.step()
        self._progress.finish()
        del model
        give_back_memory()
        return torch.cat(made)

    def _first_tokens(self, count: int) -> torch.Tensor:
        """Any token of the vocabulary that is text, (count, 1)."""
        tokenizer = self._stream.checkpoint.tokenizer
        special = set(tokenizer.all_special_ids)
        size = min(len(tokenizer), int(self._stream.checkpoint.config.vocab_size))
        plain = torch.tensor([token for token in range(size) if token not in special])
        return plain[torch.randint(len(plain), (count, 1))]
