"""What stands in for a model's blocks: to see how the model calls them, or to run its end alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.errors import SourceError


class Enough(Exception):
    """Leaves the code of a model where nobody needs the rest of the call."""


class Recorder(nn.Module):
    """Stands for a block while the model runs, and notes how the model calls it."""

    def __init__(self, block: nn.Module, calls: list[dict[str, Any]], last: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is not registered as a submodule
        self._calls = calls
        self._last = last
        self.hidden: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            raise SourceError("this model hands positional arguments to its blocks; please report")
        self._calls.append(kwargs)
        self.hidden = hidden
        if self._last:
            raise Enough
        return hidden


class Feeder(nn.Module):
    """Stands for all blocks while the model's end runs: gives back what is to be normed."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, _: torch.Tensor, **__: Any) -> torch.Tensor:
        return self.hidden
