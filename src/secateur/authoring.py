"""Calibration windows that the model writes itself, from random first tokens on.

Ten windows of text are few to fit weights to. What a model writes is text of the kind it knows, as
much as is wanted. Writing takes the model as a whole in memory: a token at a time, all blocks.
"""

from __future__ import annotations

import torch

from secateur.drawing import drawn
from secateur.progress import Progress
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
        if not self.has(count, length):
            self._written[length] = self._write(count, length)
        return self._written[length][:count]

    def has(self, count: int, length: int) -> bool:
        """Whether so many windows are there already."""
        return len(self._written.get(length, ())) >= count

    def _write(self, count: int, length: int) -> torch.Tensor:
        from secateur.growing_cache import growing_cache

        # A mixer without attention keeps states, not keys and values.
        heads = any(coupling.keys for coupling in self._stream.anatomy.family.couplings)
        pieces = -(-count // WINDOWS_AT_ONCE)
        self._progress.stage(f"writing {count} windows of calibration text", pieces)
        made = []
        with self._stream.whole() as model, torch.no_grad():
            for piece in range(pieces):
                # Each piece by itself, and numbers for all of it, so that windows do not depend on
                # how many are asked for.
                generator = torch.Generator().manual_seed(self._seed * 1_009 + piece)
                first = self._first_tokens(WINDOWS_AT_ONCE, generator).to(self._stream.device)
                first = first[: count - piece * WINDOWS_AT_ONCE]
                draws = _Draws(model.generation_config.eos_token_id, generator)
                out = model.generate(
                    input_ids=first,
                    attention_mask=torch.ones_like(first),
                    max_new_tokens=length - 1,
                    # Nothing of a config but the draws shall decide: no end, no penalties.
                    eos_token_id=None,
                    do_sample=False,
                    repetition_penalty=1.0,
                    pad_token_id=0,
                    logits_processor=[draws],
                    **({"past_key_values": growing_cache(model.config, length)} if heads else {}),
                )
                made.append(out.cpu())
                self._progress.step()
        self._progress.finish()
        return torch.cat(made)

    def _first_tokens(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Any token of the vocabulary that is text, (count, 1)."""
        tokenizer = self._stream.checkpoint.tokenizer
        special = set(tokenizer.all_special_ids)
        size = min(len(tokenizer), int(self._stream.checkpoint.config.vocab_size))
        plain = torch.tensor([token for token in range(size) if token not in special])
        return plain[torch.randint(len(plain), (count, 1), generator=generator)]


class _Draws:
    """Lets the most likely next token, which transformers takes, be one drawn by its odds.

    Args:
        ends: tokens that end a text, which are never drawn.
    """

    def __init__(self, ends: int | list[int] | None, generator: torch.Generator) -> None:
        self._ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        self._generator = generator

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (windows, vocabulary), which may be written into, with the token drawn on top."""
        scores[:, self._ends] = -torch.inf
        numbers = torch.rand(WINDOWS_AT_ONCE, generator=self._generator)
        new = drawn(scores, numbers[: len(scores)])
        return scores.zero_().scatter_(1, new[:, None], 1.0)
