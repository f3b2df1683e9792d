"""The windows that statistics are taken from: calibration text, and what the model adds to it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from secateur.anatomy import Anatomy
from secateur.authoring import Author
from secateur.methods import Method
from secateur.progress import Progress
from secateur.resampling import Resampler
from secateur.streaming import Stream


@dataclass(frozen=True)
class TextWork:
    """What the windows of a run are, and what it takes to make them, for the estimate.

    Attributes:
        windows: from which statistics are taken.
        passes: over all blocks, of so many windows each.
        heads: the same through the head.
    """

    windows: int
    passes: float
    heads: float


def text_work(method: Method, anatomy: Anatomy, samples: int, length: int) -> TextWork:
    """What :class:`FitText` does with so many calibration windows."""
    written = method.written(anatomy, samples, length)
    copies = method.copies(anatomy, samples, length)
    windows = method.windows_seen(samples, copies, written)
    copied = windows - samples - written
    heads = copied * method.resampled + written
    passed = copied
    if copies and not method.chains_copies(anatomy):
        passed = copied // copies
    return TextWork(windows, (passed + written) / windows, heads / windows)


class FitText:
    """Calibration windows with what the method wants beside them; made once and kept.

    Args:
        seed: of everything that the model draws.
    """

    def __init__(self, stream: Stream, method: Method, *, seed: int, progress: Progress) -> None:
        self._stream = stream
        self._method = method
        self._author = Author(stream, seed=seed, progress=progress)
        self._resampler = Resampler(
            stream,
            rate=method.resampled,
            seed=seed,
            progress=progress,
            chained=method.chains_copies(stream.anatomy),
        )

    def expect(self, tokens: torch.Tensor) -> None:
        """All windows that will be asked for, where fewer are asked for first."""
        self._resampler.expect(tokens[: len(tokens) - self._method.windows_apart(len(tokens))])

    def windows(self, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What statistics are taken from, and how many of the last windows are also kept apart.

        Copies are made of the others alone: what a fit is judged by must not have shaped it.

        Args:
            tokens: (windows, length).
        """
        late = self._method.windows_apart(len(tokens))
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
