"""Hostile bytes for everything that reads files of others: each is read, or refused in one line.

    python bench/fuzz.py [TARGET ...] [--seconds 60] [--seed 0]

A target takes any bytes as one file of a model (or a recipe) and opens it the way the program does.
With atheris installed (pip install atheris) the parsers of this package are instrumented and inputs
grow by coverage; otherwise good files are mutated at random. Prints a Markdown table of inputs
tried; the input at which something else happens than an answer or an error of ours is printed, and
left in the folder of the moment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

#: Longest that one input may take, in seconds.
SLOW = 20.0
Target = Callable[[bytes], None]


def targets(root: Path) -> dict[str, tuple[bytes, Target]]:
    """For each target a good file to start from, and what opens bytes in its place.

    Args:
        root: an empty folder to work in.
    """
    import tiny
    from test_checkpoint import write_gguf

    from secateur.checkpoint import open_checkpoint
    from secateur.checkpoint.gguf_file import open_reader
    from secateur.checkpoint.safetensors_folder import _weight_files, load_config, read_header
    from secateur.exporting import plan_of
    from secateur.pruning import prune
    from secateur.recipe import load_recipe, make_recipe
    from secateur.streaming import Stream

    model = tiny.write_model(root / "model", "llama-gqa-tied")
    recipe = make_recipe(
        remove="10%", method="magnitude-sp", calibration={"samples": 2, "length": 16}
    )
    prune(model, root / "pruned", recipe, verify=False)
    pruned = open_checkpoint(root / "pruned")
    source = Stream(open_checkpoint(model))
    gguf = write_gguf(root / "model.gguf", tiny.make_model("llama-gqa-tied", layers=1))
    index = json.loads((root / "pruned" / "model.safetensors.index.json").read_text())
    pipe = root / "recipe.yaml"
    pipe.write_text(json.dumps(recipe.model_dump(exclude_none=True)))

    def config(_: bytes) -> None:
        load_config(model, "model", trust_remote_code=False)
        Stream(open_checkpoint(model))

    def shards(_: bytes) -> None:
        for path in _weight_files(root / "pruned"):
            assert path.parent == root / "pruned", path  # nothing outside of the folder

    def tokenizer(_: bytes) -> None:
        opened = open_checkpoint(model).tokenizer
        opened("one text", add_special_tokens=False)

    def at(path: Path, work: Target, limit: int = 1 << 16) -> tuple[bytes, Target]:
        good = path.read_bytes()

        def put(data: bytes) -> None:
            path.write_bytes(data)
            try:
                work(data)
            finally:
                path.write_bytes(good)

        return good[:limit] if path.suffix != ".gguf" else good, put

    assert index
    return {
        "recipe": at(pipe, lambda _: load_recipe(pipe) and None),
        "secateur.json": at(
            root / "pruned" / "secateur.json", lambda _: plan_of(pruned, source) and None
        ),
        "safetensors": at(
            model / "model.safetensors", lambda _: read_header(model / "model.safetensors") and None
        ),
        "index": at(root / "pruned" / "model.safetensors.index.json", shards),
        "config": at(model / "config.json", config),
        "tokenizer": at(model / "tokenizer.json", tokenizer),
        "gguf": at(gguf, lambda _: open_reader(gguf) and None),
    }


def refused_or_read(work: Target, data: bytes) -> bool:
    """Whether the input was read; an error of ours is the other good answer."""
    began = time.monotonic()
    try:
        work(data)
        return True
    except SecateurError:
        return False
    finally:
        assert time.monotonic() - began < SLOW, "an input took too long"


def mutated(good: bytes, chance: random.Random) -> bytes:
    """The file with some bytes, numbers or words of it changed."""
    data = bytearray(good)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(len(data) + 1)
        if chance.random() < 0.7:  # headers stand in front
            place = min(place, chance.randrange(1 + min(len(data), 512)))
        kind = chance.randrange(7)
        if kind == 0:
            data[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            data[place : place + 8] = chance.choice(
                (0, 1, 2**31, 2**40, 2**63, 2**64 - 1)
            ).to_bytes(8, "little")
        elif kind == 2:
            del data[place : place + chance.choice((1, 7, 100, len(data)))]
        elif kind == 3:
            data[place:place] = data[place : place + chance.choice((1, 16, 400))]
        elif kind == 4:
            words = (b"../../x", b"/etc/passwd", b"null", b"-1", b"1e999", b"9" * 30, b'"', b"{}",
                     b"[" * 2000, b"\xff\x00", b"!!python/object/apply:os.system [id]",
                     b"&a [*a,*a]", b"{{7*7}}", b"true", b"[]")  # fmt: skip
            data[place : place + chance.choice((0, 1, 5))] = chance.choice(words)
        elif kind == 5 and data:
            other = chance.randrange(len(data))
            data[place : place + 20] = data[other : other + 20]
        else:
            # A whole value of JSON: from a colon to the next comma.
            begin = data.find(b":", place)
            end = data.find(b",", begin)
            if 0 <= begin < end:
                words = (b" null", b" -5", b' "x"', b" [[]]", b" {}", b" 99999999999", b" 0.5")
                data[begin + 1 : end] = chance.choice(words)
    return bytes(data)


def hammer(name: str, seconds: float, seed: int, *, inputs: int | None = None) -> tuple[int, int]:
    """Try mutations of the good file; return how many, and how many of them were read."""
    with tempfile.TemporaryDirectory(prefix="secateur-fuzz-") as folder:
        good, work = targets(Path(folder))[name]
        chance = random.Random(f"{name} {seed}")
        tried = read = 0
        end = time.monotonic() + seconds
        while tried < inputs if inputs is not None else time.monotonic() < end:
            data = mutated(good, chance)
            try:
                read += refused_or_read(work, data)
            except BaseException:
                Path(f"fuzz-{name}-{seed}-{tried}.bin").write_bytes(data)
                print(f"{name}: input {tried} of seed {seed}", file=sys.stderr)
                raise
            tried += 1
        return tried, read


def by_coverage(name: str, seconds: float, seed: int) -> None:
    """The same with atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["secateur.checkpoint", "secateur.recipe", "gguf"]):
        import secateur.checkpoint.gguf_file
        import secateur.checkpoint.safetensors_folder
        import secateur.recipe  # noqa: F401
    root = Path(tempfile.mkdtemp(prefix="secateur-fuzz-"))
    good, work = targets(root)[name]
    (root / "corpus").mkdir()
    (root / "corpus" / "good").write_bytes(good)
    arguments = [
        sys.argv[0], f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}", "-timeout=20",
        "-rss_limit_mb=4096", "-max_len=100000", "-print_final_stats=1", str(root / "corpus"),
    ]  # fmt: skip
    atheris.Setup(arguments, lambda data: refused_or_read(work, data) and None)
    atheris.Fuzz()


NAMES = ("recipe", "secateur.json", "safetensors", "index", "config", "tokenizer", "gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--random", action="store_true", help="mutations even with atheris")
    args = parser.parse_args()
    if args.atheris:
        by_coverage(args.targets[0], args.seconds, args.seed)
        return
    guided = False
    if not args.random:
        with suppress(ImportError):
            import atheris  # noqa: F401

            guided = True
    print("| target | way | inputs | read |\n|---|---|---|---|")
    for name in args.targets:
        if guided:
            command = [
                sys.executable, __file__, name, "--atheris", "--seconds", str(args.seconds),
                "--seed", str(args.seed),
            ]  # fmt: skip
            ended: Any = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ}
            )
            counts = [line for line in ended.stderr.splitlines() if "number_of_executed" in line]
            if ended.returncode or not counts:
                raise SystemExit(ended.stderr)
            print(f"| {name} | atheris | {int(counts[0].split()[-1]):,} | |", flush=True)
        else:
            tried, read = hammer(name, args.seconds, args.seed)
            print(f"| {name} | mutation | {tried:,} | {read:,} |", flush=True)


if __name__ == "__main__":
    main()
