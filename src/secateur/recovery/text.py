"""The text that a model is healed on: examples in a row, cut into windows, in a seeded order.

Nothing here remembers where a run stands: the windows of a step follow from its number, which is
what lets a killed run go on in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from secateur.calibration import Text, Windows, encode
from secateur.errors import CalibrationError

#: Windows that are kept out of the training, to see whether it helps: one in so many, at most.
ONE_IN, MOST_HELD_OUT = 20, 8


@dataclass(frozen=True)
class HealingText:
    """Windows to train on and windows kept out of it.

    Attributes:
        train: tokens (windows, length), with origin and hash.
        held_out: the same, of other examples.
        examples: how many examples went in.
    """

    train: Windows
    held_out: Windows
    examples: int


def healing_windows(
    text: Text, tokenizer: Any, *, examples: int, length: int, seed: int
) -> HealingText:
    """The first ``examples`` of a text in a seeded order, end to end, cut into windows.

    Between two examples stands the tokenizer's end of text, or a blank line where it has none. The
    last windows are held out; only the example that is cut by that border is in both.

    Raises:
        CalibrationError: not enough text for one window of each kind.
    """
    chosen = text.documents[:examples]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
    end = tokenizer.eos_token_id
    gap = encode(tokenizer, "\n\n") if end is None else torch.tensor([end], dtype=torch.int64)
    pieces = [piece for n in order for piece in (encode(tokenizer, chosen[n]), gap)]
    tokens = torch.cat(pieces)
    count = len(tokens) // length
    if count < 2:
        raise CalibrationError(
            f"the text to heal on ({text.origin}) has {len(tokens)} tokens, enough for {count} "
            f"windows of {length}; needed are 2, one of them to measure on: give more text, or "
            "lower --length"
        )
    windows = tokens[: count * length].view(count, length)
    kept_out = min(MOST_HELD_OUT, max(1, count // ONE_IN))
    return HealingText(
        Windows.of(windows[:-kept_out], text.origin),
        Windows.of(windows[-kept_out:], text.origin),
        len(chosen),
    )


def steps_of_one_pass(windows: int, batch: int) -> int:
    """Steps after which every window has been seen once."""
    return -(-windows // batch)


def windows_of_step(step: int, *, windows: int, batch: int, seed: int) -> list[int]:
    """Numbers of the windows of one step, counted from 0: each pass in an order of its own."""
    places = range(step * batch, (step + 1) * batch)
    orders = {turn: _order(turn, windows, seed) for turn in {place // windows for place in places}}
    return [orders[place // windows][place % windows] for place in places]


def _order(turn: int, windows: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed + 1_000_003 * (turn + 1))
    return torch.randperm(windows, generator=generator).tolist()
