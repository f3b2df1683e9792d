"""Calibration windows in which the model itself has drawn some tokens anew.

Ten short windows are too few to fit weights to, and the model knows what other text looks like: in
every copy a share of the tokens is replaced by draws from the model's own predictions at their
places, and the next copy starts from this one. One pass over the blocks makes one copy of all
windows, so it streams like everything else and needs no text.
"""

from __future__ import annotations

import torch

from secateur.drawing import drawn
from secateur.progress import Progress
from secateur.streaming import Stream


class Resampler:
    """Copies of windows, made once and kept: ids are small.

    Args:
        rate: share of the tokens that each copy draws anew; the first of a window stays.
        seed: with the numbers of copy and window it decides every draw, so that a copy does not
            depend on which other windows are asked for.
    """

    def __init__(self, stream: Stream, *, rate: float, seed: int, progress: Progress) -> None:
        self._stream = stream
        self._rate = rate
        self._seed = seed
        self._progress = progress
        self._source = torch.empty(0, 0, dtype=torch.int64)
        self._copies: list[torch.Tensor] = []

    def expect(self, tokens: torch.Tensor) -> None:
        """All windows that will be asked for, (windows, length), to copy them at once."""
        self._source, self._copies = tokens, []

    def copies(self, tokens: torch.Tensor, times: int) -> torch.Tensor:
        """The first ``times`` copies of these windows.

        Args:
            tokens: (windows, length).

        Returns:
            (times, windows, length).
        """
        if not self._are_known(tokens):
            self.expect(tokens)
        while len(self._copies) < times:
            last = self._copies[-1] if self._copies else self._source
            self._copies.append(self._next(last, len(self._copies)))
        made = [copy[: len(tokens)] for copy in self._copies[:times]]
        return torch.stack(made) if made else tokens.new_empty(0, *tokens.shape)

    def has(self, tokens: torch.Tensor, times: int) -> bool:
        """Whether these copies are there already."""
        return self._are_known(tokens) and len(self._copies) >= times

    def _are_known(self, tokens: torch.Tensor) -> bool:
        known = self._source[: len(tokens)]
        return known.shape == tokens.shape and torch.equal(known, tokens)

    @torch.no_grad()
    def _next(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        stream = self._stream
        layers = range(stream.anatomy.layers)
        self._progress.stage(f"drawing copy {number + 1} of the calibration text", len(layers))
        hidden = stream.forward(tokens, lambda layer: self._progress.step(f"block {layer}"))
        replaced, uniform = self._places(tokens, number)
        # A place is predicted by the one before it. Head and draw are made for these alone.
        behind, before = hidden[:, :-1][replaced.to(hidden.device)], tokens[:, :-1][replaced]
        copy = tokens.clone()
        new = tokens.new_empty(len(before))
        with stream.outside():
            for _, start, logits in stream.head_pieces(behind[None], before[None]):
                part = slice(start, start + len(logits))
                new[part] = drawn(logits, uniform[replaced][part]).to(new)
        copy[:, 1:][replaced] = new
        self._progress.finish()
        return copy

    def _places(self, tokens: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens but the first are replaced, and the number that each is drawn by.

        Each (windows, length - 1).
        """
        parts = []
        for window in range(len(tokens)):
            generator = torch.Generator().manual_seed(
                (self._seed * 1_009 + number) * 100_003 + window
            )
            parts.append(torch.rand(2, tokens.shape[1] - 1, generator=generator))
        chosen, uniform = torch.stack(parts, dim=1)
        return chosen < self._rate, uniform
