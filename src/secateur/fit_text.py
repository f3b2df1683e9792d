"""The windows that statistics are taken from: calibration text, and what the model adds to it."""

from __future__ import annotations

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
        self._resampler.expect(tokens)

    def windows(self, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What statistics are taken from, and how many of the last windows are also kept apart.

        Copies are made of the others alone: what a fit is judged by must not have shaped it.

        Args:
            tokens: (windows, length).
        """
        late = self._method.windows_apart(len(tokens))
        fitted = tokens[: len(tokens) - late]
        parts, anatomy = [fitted], self._stream.anatomy
        if times := self._method.copies(anatomy, *tokens.shape):
            copies = self._resampler.copies(tokens, times)
            parts.append(copies[:, : len(fitted)].flatten(0, 1))
        if own := self._method.written(anatomy, *tokens.shape):
            parts.append(self._author.windows(own, tokens.shape[1]))
        return torch.cat([*parts, tokens[len(fitted) :]]), late
