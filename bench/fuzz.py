"""Hostile bytes for everything that reads files of others: each is read, or refused in one line.

    python bench/fuzz.py [--target NAME ...] [--engine atheris|properties] [--seconds 60] [--seed 0]

A target takes any bytes as one file of a model, or a recipe, and opens it the way the program does.
With ``atheris`` (pip install secateur[fuzz]) the parsers of this package are instrumented and
inputs grow by coverage; half of them are mutations of JSON values rather than of bytes. With
``properties`` mutations are drawn at random. Prints a Markdown table of inputs tried; an input at
which something else happens than an answer or an error of ours is printed, and left in the folder
of the moment. What must hold is in ``tests/hostile.py``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hostile import NAMES, SLOW, Guard, judged, surroundings, targets
from mutations import mutated

#: Bytes of address space: what a forged length may ask for ends in an error that is seen.
ADDRESSES = 12 << 30
INSTRUMENTED = [
    "secateur.checkpoint", "secateur.recipe", "secateur.outputs.record", "secateur.exporting",
    "secateur.outputs.gguf_tokenizer", "secateur.outputs.tokenizer_parts", "secateur.modules",
    "secateur.anatomy", "secateur.skeleton", "secateur.recovery.source", "gguf.gguf_reader",
]  # fmt: skip


def too_slow(*_: object) -> None:
    raise AssertionError("an input took too long")


def at_random(name: str, seconds: float, seed: int) -> tuple[int, int]:
    """Try mutations of the good files; return how many, and how many of them were read."""
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory(prefix="secateur-fuzz-") as folder:
        root = Path(folder).resolve()
        os.environ.update(surroundings(root))
        target, guard = targets(root)[name], Guard(root)
        chance = random.Random(f"{name} {seed}")
        tried = read = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = chance.choice(target.seeds)
            if tried >= len(target.seeds):
                data = mutated(data, target.form, chance)
            signal.alarm(int(SLOW))
            try:
                read += judged(target, data, guard)
            except BaseException:
                Path(f"fuzz-{name}-{seed}-{tried}.bin").write_bytes(data)
                print(f"{name}: input {tried} of seed {seed}", file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
            tried += 1
    return tried, read


def by_coverage(name: str, seconds: float, seed: int) -> None:
    """The same with atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import secateur.checkpoint.gguf_file
        import secateur.checkpoint.safetensors_folder
        import secateur.exporting
        import secateur.outputs.gguf_tokenizer
        import secateur.recipe
        import secateur.recovery.source  # noqa: F401
    with tempfile.TemporaryDirectory(prefix="secateur-fuzz-") as folder:
        root = Path(folder).resolve()
        os.environ.update(surroundings(root))
        target, guard = targets(root)[name], Guard(root)
        (root / "corpus").mkdir()
        for number, seed_file in enumerate(target.seeds):
            (root / "corpus" / str(number)).write_bytes(seed_file)

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            chance = random.Random(seed)
            if chance.random() < 0.5:
                return bytes(atheris.Mutate(data, most))
            return mutated(data, target.form, chance)[:most]

        arguments = [
            sys.argv[0], f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}",
            f"-timeout={SLOW:.0f}", "-rss_limit_mb=6000", "-max_len=300000", "-len_control=0",
            "-print_final_stats=1", f"-artifact_prefix=fuzz-{name}-", str(root / "corpus"),
        ]  # fmt: skip
        atheris.Setup(
            arguments, lambda data: judged(target, data, guard) and None, custom_mutator=mutate
        )
        atheris.Fuzz()


def in_a_process(name: str, engine: str, seconds: float, seed: int) -> str:
    """A row of the table; each target has a process of its own, with a limit of its memory."""
    command = [
        sys.executable, __file__, "--target", name, "--engine", engine, "--seconds", str(seconds),
        "--seed", str(seed), "--inside",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    counts = re.findall(r"number_of_executed_units: *(\d+)", ended.stderr)
    if engine == "properties":
        counts = ended.stdout.split()
    if ended.returncode or not counts:
        raise SystemExit(ended.stderr[-6000:])
    return f"| {name} | {engine} | {' | '.join(f'{int(count):,}' for count in counts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--engine", choices=("atheris", "properties"), default="atheris")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        if args.engine == "atheris":
            by_coverage(args.target[0], args.seconds, args.seed)
        else:
            print(*at_random(args.target[0], args.seconds, args.seed))
        return
    read = " read |" if args.engine == "properties" else ""
    print(f"| target | engine | inputs |{read}\n|---|---|---|{'---|' * bool(read)}")
    for name in args.target:
        print(in_a_process(name, args.engine, args.seconds, args.seed), flush=True)


if __name__ == "__main__":
    main()
