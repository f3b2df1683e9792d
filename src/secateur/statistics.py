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

    def less(self, part: Moments) -> Moments:
        """The moments of the tokens that are not in ``part``."""
        return Moments(
            self.second - part.second, self.total - part.total, self.tokens - part.tokens
        )

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of tokens."""
        return Moments(
            self.second + other.second, self.total + other.total, self.tokens + other.tokens
        )

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
    block: nn.Module, layer_of_signal: Mapping[str, str], apart: int | None = None
) -> Iterator[tuple[dict[str, Moments], dict[str, Moments]]]:
    """Gather the moments of each signal while ``block`` runs.

    Args:
        layer_of_signal: for each signal wanted, one linear layer of the block that reads it.
        apart: number of the token from which on moments are also summed on their own.

    Yields:
        the moments of all tokens, and of those from ``apart`` on; filled while the block runs.
    """
    found: dict[str, Moments] = {}
    late: dict[str, Moments] = {}
    seen = dict.fromkeys(layer_of_signal, 0)
    handles = []
    for signal, path in layer_of_signal.items():
        layer = block.get_submodule(path)

        def hook(_: nn.Module, args: tuple[Any, ...], signal: str = signal) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            for moments in (found, late):
                moments.setdefault(signal, Moments.empty(x.shape[-1], x.device))
            early = len(x) if apart is None else min(max(apart - seen[signal], 0), len(x))
            seen[signal] += len(x)
            if early:
                found[signal].add(x[:early])
            if early < len(x):
                late[signal].add(x[early:])

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield found, late
    finally:
        for handle in handles:
            handle.remove()
    if apart is not None:
        for signal, part in late.items():
            found[signal] = found[signal].plus(part)
