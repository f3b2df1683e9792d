"""The windows that statistics are taken from: calibration text, and what the model adds to it."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from secateur.authoring import Author
from secateur.methods import Method
from secateur.progress import Progress
from secateur.resampling import Resampler
from secateur.streaming import Stream


class FitText:
    """Calibration windows with what the method wants beside them; made once and kept.

    Args:
        seed: of everything that the model draws.
    """

    def __init__(self, stream: Stream, method: Method, *, seed: int, progress: Progress) -> None:
        self._stream = stream
        self._method = method
        self._author = Author(stream, seed=seed, progress=progress)
        self._resampler = Resampler(stream, rate=method.resampled, seed=seed, progress=progress)

    def expect(self, tokens: torch.Tensor) -> None:
        """All windows that will be asked for, where fewer are asked for first."""
        self._resampler.expect(tokens[: len(tokens) - self._late(tokens)])

    def windows(self, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What statistics are taken from, and how many of the last windows are also kept apart.

        Copies are made of the others alone: what a fit is judged by must not have shaped it.

        Args:
            tokens: (windows, length).
        """
        late = self._late(tokens)
        fitted = tokens[: len(tokens) - late]
        anatomy, length = self._stream.anatomy, tokens.shape[1]
        times = self._method.copies(anatomy, *tokens.shape)
        own = self._method.written(anatomy, *tokens.shape)
        there = self._author.has(own, length) and (not times or self._resampler.has(fitted, times))
        # Writing takes the model as a whole; while it is there, copies need not read it again.
        with self._stream.whole() if own and not there else nullcontext():
            parts = [fitted]
            if times:
                parts.append(self._resampler.copies(fitted, times).flatten(0, 1))
            if own:
                parts.append(self._author.windows(own, length))
        return torch.cat([*parts, tokens[len(fitted) :]]), late

    def _late(self, tokens: torch.Tensor) -> int:
        return math.ceil(self._method.held_out * len(tokens))
