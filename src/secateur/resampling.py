"""Calibration windows in which the model itself has drawn some tokens anew.

Ten short windows are too few to fit weights to, and the model knows what other text looks like: in
every copy a share of the tokens is replaced by draws from the model's own predictions at their
places, and the next copy starts from this one. One pass over the blocks makes one copy of all
windows, so it streams like everything else and needs no text.
"""

from __future__ import annotations

import torch

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
        known = self._source[: len(tokens)]
        if known.shape != tokens.shape or not torch.equal(known, tokens):
            self.expect(tokens)
        while len(self._copies) < times:
            last = self._copies[-1] if self._copies else self._source
            self._copies.append(self._next(last, len(self._copies)))
        made = [copy[: len(tokens)] for copy in self._copies[:times]]
        return torch.stack(made) if made else tokens.new_empty(0, *tokens.shape)

    def _next(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        stream = self._stream
        layers = range(stream.anatomy.layers)
        self._progress.stage(f"drawing copy {number + 1} of the calibration text", len(layers))
        hidden = stream.embed(tokens)
        for layer in layers:
            with stream.block(layer) as module:
                hidden = stream.forward_block(layer, module, hidden)
            self._progress.step(f"block {layer}")
        drawn = tokens.clone()

        def draw(window: int, logits: torch.Tensor) -> None:
            generator = torch.Generator().manual_seed(
                (self._seed * 1_009 + number) * 100_003 + window
            )
            odds = logits[:-1].softmax(dim=-1).cpu()
            new = torch.multinomial(odds, 1, generator=generator)[:, 0]
            replaced = torch.rand(len(new), generator=generator) < self._rate
            drawn[window, 1:][replaced] = new[replaced].to(drawn.dtype)

        stream.head(hidden, tokens, draw)
        self._progress.finish()
        return drawn
