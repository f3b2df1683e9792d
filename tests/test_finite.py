"""One NaN or infinity among numbers is found, wherever it stands."""

from __future__ import annotations

import pytest
import torch

from secateur.finite import all_finite

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [1, 7, 100, 4097])
def test_one_bad_value_is_enough(dtype: torch.dtype, value: float, size: int) -> None:
    for place in {0, size // 2, size - 1}:
        x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        assert all_finite(x)
        x[place] = value
        assert not all_finite(x)
        assert not all_finite(x.view(1, -1).T)


def test_nothing_and_the_largest_are_finite() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor([torch.finfo(torch.float16).max], dtype=torch.float16))
