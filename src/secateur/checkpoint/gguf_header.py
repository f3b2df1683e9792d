"""A first walk over the header of a GGUF file, with every length held against the file's own.

The reader of the package gguf trusts what a file says: an array that claims 2^40 entries is read
entry by entry, past the end, until memory is gone. Nothing is kept here, only looked at.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

#: Bytes of each type of value that has a fixed size.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
#: The reader makes an object of each entry: what a vocabulary and its merges have, and to spare.
MOST_ENTRIES = 2**23
#: ggml knows no more.
MOST_DIMENSIONS = 4
#: Keys and names are this long at most; the format says 2^16 - 1.
MOST_NAME = 2**16


class HeaderError(ValueError):
    """The header says what cannot be."""


def check_header(path: Path) -> None:
    """Walk over keys and tensor entries.

    Raises:
        HeaderError: a length leaves the file, or is beyond reason.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._place = 4  # behind the letters GGUF
        self._entries = 0
        (version,) = struct.unpack_from("<I", data, 4) if len(data) >= 8 else (0,)
        self._order = ">" if version & 0xFFFF == 0 else "<"

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._place:
            raise HeaderError(f"a length at byte {self._place} leaves the file")
        self._place += count

    def _number(self, kind: str) -> int:
        start = self._place
        self._skip(struct.calcsize(kind))
        return int(struct.unpack_from(self._order + kind, self._data, start)[0])

    def _name(self) -> None:
        length = self._number("Q")
        if length > MOST_NAME:
            raise HeaderError(f"a name at byte {self._place} claims {length} bytes")
        self._skip(length)

    def header(self) -> None:
        """All of it."""
        self._number("I")
        tensors, keys = self._number("Q"), self._number("Q")
        for _ in range(keys):  # ends with the file at the latest: each takes some bytes
            self._name()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._name()
            dimensions = self._number("I")
            if dimensions > MOST_DIMENSIONS:
                raise HeaderError(f"a tensor claims {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int) -> None:
        if kind == STRING:
            self._skip(self._number("Q"))
        elif kind in SIZES:
            self._skip(SIZES[kind])
        elif kind == ARRAY:
            self._array(self._number("I"), self._number("Q"))
        else:
            raise HeaderError(f"a value at byte {self._place} is of the unknown type {kind}")

    def _array(self, kind: int, count: int) -> None:
        self._entries += count
        if self._entries > MOST_ENTRIES:
            raise HeaderError(f"an array at byte {self._place} claims {count} entries")
        if kind in SIZES:
            self._skip(SIZES[kind] * count)
        elif kind == STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            raise HeaderError(f"an array at byte {self._place} holds values of type {kind}")
