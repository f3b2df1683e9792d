"""Weights of a large block that are read again when they are needed, rather than kept.

A block of a 7B model is 772 MiB in float32, and what is solved with one of its layers takes as much
again. Once it is known what the block puts out, nobody needs more than one layer at a time, and
the system has just read the file: to read it again costs a hundredth of what is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from secateur.anatomy import Anatomy

#: Bytes of a block in float32 from which it is large. Smaller ones stay while they are cut.
LARGE_BLOCK = 2**26


def is_large(anatomy: Anatomy) -> bool:
    """Whether the blocks of this model are large."""
    return 4 * anatomy.block_parameters >= LARGE_BLOCK


class StoredLayers(Mapping[str, torch.Tensor]):
    """Weights of the linear layers of a block, (p, q), read each time one is asked for.

    Args:
        names: of the layers inside the block.
        read: gives the weight of one.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        self._names = list(names)
        self._read = read

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)
