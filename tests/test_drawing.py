"""Tokens drawn by their odds, against the odds."""

from __future__ import annotations

import pytest
import torch

from secateur.drawing import drawn


def test_each_token_has_a_part_of_the_line_as_long_as_its_odds() -> None:
    """Evenly spaced numbers fall on each token as often as its odds say, to one."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50, generator=generator)
    odds = logits.double().softmax(-1)
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    made = drawn(logits.repeat(count, 1), uniform.float())
    assert made.dtype == torch.int64
    assert float((torch.bincount(made, minlength=50) - odds * count).abs().max()) <= 1.01


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_what_has_no_odds_is_not_drawn(uniform: float) -> None:
    logits = torch.full((1000, 6), -torch.inf)
    logits[:, [1, 3, 4]] = 30 * torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
    made = drawn(logits, torch.full((1000,), uniform))
    assert set(made.tolist()) <= {1, 3, 4}


def test_a_token_comes_whatever_the_odds_are() -> None:
    made = drawn(torch.tensor([[torch.nan] * 4, [-torch.inf] * 4]), torch.tensor([0.2, 0.9]))
    assert all(0 <= token < 4 for token in made.tolist())
