"""Hostile inputs made of good ones: values of JSON changed in place, headers forged, bytes torn."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

#: Text that is meant to be more than text.
MARKUP = (
    "<script>alert(1)</script>", "</code></table>", "\n# a title", "a | b", "](javascript:x)",
    "```", "---\nlicense: mit", "../../x", "{{ 7 * 7 }}", "{% raw %}", "<!--", '"onx="',
)  # fmt: skip
#: What JSON's own writer cannot write, by what stands for it in a tree.
UNWRITTEN = {"@deep@": "[" * 50_000 + "]" * 50_000, "@long@": "9" * 5000}
#: What stands in the place of a value. Only the first nine are of one type with many values.
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), 1e308, "", "x", [],
    [[]], {}, {"a": None}, [None] * 3, "../../../../etc/passwd", "/etc/passwd", "a\nb\r\x1b[31m",
    "<script>alert(1)</script>", "{{ 7 * 7 }}", "\ud800", "x" * 70_000, "!!python/object",
    *UNWRITTEN, "evil.Evil", "evil/evil--evil.Evil", [1, "a", {}], "__class__", "auto", "cuda:0",
)  # fmt: skip
WORDS = (
    b"../../x", b"/etc/passwd", b"null", b"-1", b"1e999", b"9" * 30, b'"', b"{}", b"[" * 2000,
    b"\xff\x00", b"!!python/object/apply:os.system [id]", b"&a [*a,*a]", b"{{7*7}}", b"true", b"[]",
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a tree of JSON."""
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*path, key))


def changed(tree: Any, chance: random.Random) -> Any:
    """The tree with a value of it replaced, removed, renamed, doubled or put elsewhere."""
    tree = copy.deepcopy(tree)
    ways = list(places(tree))
    *way, last = chance.choice(ways) or (None,)
    if last is None:
        return chance.choice(VALUES)
    owner = tree
    for key in way:
        owner = owner[key]
    kind = chance.randrange(10)
    if kind == 0:
        del owner[last]
    elif kind == 1 and isinstance(owner, dict):
        owner[chance.choice(("../x", "\n", "__init__", "", str(chance.randrange(9))))] = owner.pop(
            last
        )
    elif kind == 2:
        value = tree
        for key in chance.choice(ways):
            value = value[key]
        owner[last] = copy.deepcopy(value)
    elif kind == 3 and isinstance(owner[last], int):
        owner[last] += chance.choice((-1, 1, 7, 2**16, -(2**40)))
    elif kind == 4 and isinstance(owner, list):
        owner *= 2
    else:
        owner[last] = chance.choice(VALUES)
    return tree


def written(tree: Any) -> bytes:
    """The tree as JSON, with what its writer cannot write."""
    text = json.dumps(tree)
    for short, long in UNWRITTEN.items():
        text = text.replace(f'"{short}"', long)
    return text.encode()


def torn(good: bytes, chance: random.Random) -> bytes:
    """The file with some bytes, numbers or words of it changed."""
    data = bytearray(good)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(len(data) + 1)
        if chance.random() < 0.7:  # headers stand in front
            place = min(place, chance.randrange(1 + min(len(data), 512)))
        kind = chance.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            number = chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
            data[place : place + 8] = number.to_bytes(8, "little")
        elif kind == 2:
            del data[place : place + chance.choice((1, 7, 100, len(data)))]
        elif kind == 3:
            data[place:place] = data[place : place + chance.choice((1, 16, 400))]
        elif kind == 4:
            data[place : place + chance.choice((0, 1, 5))] = chance.choice(WORDS)
        else:
            other = chance.randrange(len(data) + 1)
            data[place : place + 20] = data[other : other + 20]
    return bytes(data)


def mutated(good: bytes, form: str, chance: random.Random) -> bytes:
    """A hostile input made of a good one.

    Args:
        form: ``json``, ``yaml``, ``safetensors`` (a header of JSON in front) or ``gguf``.
    """
    if form == "gguf" or chance.random() < 0.2:
        return torn(good, chance)
    head, tail = good, b""
    if form == "safetensors":
        length = int.from_bytes(good[:8], "little")
        head, tail = good[8 : 8 + length], good[8 + length :]
    try:
        tree = json.loads(head)
    except (ValueError, RecursionError):
        return torn(good, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        tree = changed(tree, chance)
    new = written(tree)
    if form == "safetensors":
        return struct.pack("<Q", len(new)) + new + tail
    return b" " * (good[:1] == b" ") + new
