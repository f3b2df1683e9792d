"""Keys and values of what has been written so far, in memory that is there from the beginning.

The cache of transformers copies all of them for every token; where many windows are written at
once, that takes a tenth of the time. This file imports transformers: import it where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Layer(DynamicLayer):  # type: ignore[misc] # transformers is not typed
    """One layer's keys and values, each (windows, heads, length, size), a part of their room.

    Args:
        room: tokens that there is memory for; twice as many each time they are not enough.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._wide: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; returns the keys and values of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        had = self.keys.shape[2]
        length = had + key_states.shape[2]
        if not self._wide or length > self._wide[0].shape[2]:
            while length > self._room:
                self._room *= 2
            self._wide = tuple(self._widened(old) for old in (self.keys, self.values))
        for wide, new in zip(self._wide, (key_states, value_states), strict=True):
            wide[:, :, had:length] = new
        self.keys, self.values = (wide[:, :, :length] for wide in self._wide)
        return self.keys, self.values

    def _widened(self, old: torch.Tensor) -> torch.Tensor:
        windows, heads, length, size = old.shape
        wide = old.new_empty(windows, heads, self._room, size)
        wide[:, :, :length] = old
        return wide


def growing_cache(config: Any, room: int) -> DynamicCache:
    """The cache of a model of this config, with room for as many tokens.

    Layers of other kinds, such as sliding windows and states of a scan, stay as they are.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_Layer(room) if type(each) is DynamicLayer else each for each in cache.layers]
    return cache
