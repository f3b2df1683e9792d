"""Calibration windows in which the model itself has drawn some tokens anew.

Ten short windows are too few to fit weights to, and the model knows what other text looks like: in
every copy a share of the tokens is replaced by draws from the model's own predictions at their
places. Copies in a chain start each from the one before, which takes a pass over the blocks for
every copy; else all start from the original windows, whose predictions come from one pass. So it
streams like everything else and needs no text.
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
        chained: whether each copy starts from the one before.
        seed: with the numbers of copy and window it decides every draw, so that a copy does not
            depend on which other windows are asked for.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        rate: float,
        seed: int,
        progress: Progress,
        chained: bool = True,
    ) -> None:
        self._stream = stream
        self._rate = rate
        self._chained = chained
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
        while (there := len(self._copies)) < times:
            if self._chained:
                last = self._copies[-1] if self._copies else self._source
                self._copies += self._drawn_from(last, range(there, there + 1))
            else:
                self._copies += self._drawn_from(self._source, range(there, times))
        made = [copy[: len(tokens)] for copy in self._copies[:times]]
        return torch.stack(made) if made else tokens.new_empty(0, *tokens.shape)

    def has(self, tokens: torch.Tensor, times: int) -> bool:
        """Whether these copies are there already."""
        return self._are_known(tokens) and len(self._copies) >= times

    def _are_known(self, tokens: torch.Tensor) -> bool:
        known = self._source[: len(tokens)]
        return known.shape == tokens.shape and torch.equal(known, tokens)

    @torch.no_grad()
    def _drawn_from(self, tokens: torch.Tensor, numbers: range) -> list[torch.Tensor]:
        """The copies of these numbers, by the predictions of one pass."""
        stream = self._stream
        layers = range(stream.anatomy.layers)
        which = f"copy {numbers[0] + 1}" if len(numbers) == 1 else f"{len(numbers)} copies"
        self._progress.stage(f"drawing {which} of the calibration text", len(layers))
        hidden = stream.forward(tokens, lambda layer: self._progress.step(f"block {layer}"))
        found = []
        with stream.outside():
            for number in numbers:
                replaced, uniform = self._places(tokens, number)
                # A place is predicted by the one before it. Head and draw are made for these alone.
                behind = hidden[:, :-1][replaced.to(hidden.device)]
                before = tokens[:, :-1][replaced]
                copy = tokens.clone()
                new = tokens.new_empty(len(before))
                for _, start, logits in stream.head_pieces(behind[None], before[None]):
                    part = slice(start, start + len(logits))
                    new[part] = drawn(logits, uniform[replaced][part]).to(new)
                copy[:, 1:][replaced] = new
                found.append(copy)
        self._progress.finish()
        return found

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
