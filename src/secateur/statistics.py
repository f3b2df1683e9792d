"""Running sums over tokens, gathered by hooks while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Rows of a chunk whose products are summed in float32 before they join the float64 total.
TOKENS_PER_CHUNK = 2048


@dataclass
class Moments:
    """Second moment and mean of the inputs of a linear layer.

    Attributes:
        second: sum over tokens of x x^T, (q, q), float64.
        total: sum over tokens of x, (q,), float64.
        tokens: number of tokens.
    """

    second: torch.Tensor
    total: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Moments:
        return cls(
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(width, dtype=torch.float64, device=device),
        )

    def add(self, x: torch.Tensor) -> None:
        """Take in tokens x, (..., q). Products in float32, sums in float64."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        for chunk in flat.split(TOKENS_PER_CHUNK):
            self.second += chunk.T @ chunk
            self.total += chunk.sum(0, dtype=torch.float64)
        self.tokens += len(flat)

    @property
    def covariance(self) -> torch.Tensor:
        """H / T = E[x x^T], (q, q), float64."""
        return self.second / self.tokens

    @property
    def mean(self) -> torch.Tensor:
        """E[x], (q,), float64."""
        return self.total / self.tokens


@contextmanager
def gather_moments(
    block: nn.Module, layer_of_signal: Mapping[str, str]
) -> Iterator[dict[str, Moments]]:
    """Gather the moments of each signal while ``block`` runs.

    Args:
        layer_of_signal: for each signal wanted, one linear layer of the block that reads it.
    """
    found: dict[str, Moments] = {}
    handles = []
    for signal, path in layer_of_signal.items():
        layer = block.get_submodule(path)

        def hook(_: nn.Module, args: tuple[Any, ...], signal: str = signal) -> None:
            x = args[0]
            if signal not in found:
                found[signal] = Moments.empty(x.shape[-1], x.device)
            found[signal].add(x)

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
