"""Tokens drawn by their odds, one uniform number each.

torch.multinomial draws a number for every token of the vocabulary, which for 49,152 of them takes
a fifth of the time in which a small model makes the odds.
"""

from __future__ import annotations

import torch


def drawn(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A token for each row, where its cumulative distribution passes a number.

    Args:
        logits: (rows, vocabulary), float32, which is written over; minus infinity is never drawn.
        uniform: of [0, 1), (rows,), on the CPU.

    Returns:
        (rows,), int64, on the device of the logits.
    """
    logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    # Sums run in float64 on the CPU and are rounded to float32: odds below 1e-7 are drawn roughly
    # as often as they say.
    mass = logits.cumsum_(dim=-1)
    whole = mass[:, -1:].contiguous()
    wanted = uniform.to(mass)[:, None] * whole
    # Rounding may reach the whole, behind which there is no token.
    below = torch.nextafter(whole, torch.zeros_like(whole))
    found = torch.searchsorted(mass, torch.minimum(wanted, below), right=True)[:, 0]
    return found.clamp_(max=logits.shape[-1] - 1)  # of odds that are no numbers, whatever comes
