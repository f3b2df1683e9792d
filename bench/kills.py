"""kill -9 of running ``secateur prune`` commands in every stage, and whether the bytes come out.

    python bench/kills.py MODEL [--kills 60] [--seed 0] [--cold] [--gguf] [--log FILE] \\
        [-- PRUNE OPTIONS]

One unbroken run says which stages there are and how long each takes. Then outputs are made under
kills: most stages in turn, in each at a moment drawn from one of its next occurrences, and each
time the same command goes on. The last one must end in the same bytes as the unbroken run, with
nothing left beside them. Prints a line for each kill and a Markdown table of where they really fell
at the end; exit code 1 if any bytes differ.

With ``--log`` each line is appended to a JSONL file too, and the same command goes on behind the
last output in it, so that a campaign may be cut off at any time. ``--workers 2`` among the options
of prune has the blocks cut by processes of their own; ``--gguf`` makes a GGUF file.

Each run is a fork of a process that has imported everything, or with ``--cold`` a process of its
own from the interpreter on. The command line, its stages and the signal are the real ones; only
names of stages are written to a pipe when they begin and end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Before the first of the stages below, and between them.
OPENING = "opening, between stages"
#: Share of the stages in which an output's run is killed, one after the other.
HIT = 0.85
#: Small enough for hundreds of runs; whole blocks are chosen too.
OPTIONS = [
    "--remove", "25%", "--samples", "4", "--length", "16", "--set", "written=0",
    "--set", "copies=0",
]  # fmt: skip


# ---- in the process that is killed ---------------------------------------------------------------


class Teller:
    """Says through a pipe which stage begins (``>``) or ends (``<``), and when."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def say(self, sign: str, stage: str) -> None:
        os.write(self._pipe, f"{sign} {time.monotonic():.6f} {stage}\n".encode())

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Tell of every call of ``owner.name``."""
        real = getattr(owner, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            self.say(">", stage)
            try:
                return real(*args, **kwargs)
            finally:
                self.say("<", stage)

        setattr(owner, name, told)


def work(pipe: int, arguments: list[str]) -> int:
    """The command line as it is, with its stages told; returns its exit code."""
    from secateur import cli, pruning
    from secateur.checkpoint.writer import Journal
    from secateur.engine import Engine
    from secateur.fit_text import FitText
    from secateur.inside import Inside
    from secateur.outputs import hf

    teller = Teller(pipe)
    for owner, name, stage in (
        (Engine, "choose_layers", "layer stage"),
        (FitText, "windows", "windows of text"),
        (Inside, "look", "statistics"),
        (Inside, "cut", "solve"),
        (pruning.Blocks, "cut", "blocks at workers"),
        (hf, "write_block", "shard write"),
        (pruning, "write_cut", "shard write"),
        (Journal, "add", "journal write"),
        (pruning, "_write_rest", "output"),
        (pruning, "write_pruning_page", "output"),
        (pruning, "verify_folder", "verify"),
        (pruning, "_export", "GGUF"),
        (Journal, "finish", "naming and tidying"),
        (Journal, "finish_file", "naming and tidying"),
    ):
        teller.watch(owner, name, stage)
    sys.argv = ["secateur", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


# ---- in the process that kills -------------------------------------------------------------------


@dataclass
class Event:
    """A stage begins or ends, at a time in seconds."""

    begins: bool
    time: float
    stage: str


@dataclass
class Ended:
    """Exit status (negative: the signal), what was told, and all that it printed."""

    status: int
    events: list[Event]
    log: str

    @property
    def stage(self) -> str:
        """The innermost stage at the end."""
        stack = [OPENING]
        for event in self.events:
            if event.begins:
                stack.append(event.stage)
            else:
                stack.pop()
        return stack[-1]


@dataclass(frozen=True)
class Moment:
    """So many seconds into the n-th occurrence of a stage; n = 0 is the start of the process."""

    stage: str
    occurrence: int
    after: float


@contextmanager
def process(arguments: list[str], log: Path, cold: bool) -> Iterator[tuple[int, int]]:
    """Start a run: its process id and the pipe in which it tells of its stages."""
    read, write = os.pipe()
    with log.open("wb") as printed:
        if cold:
            os.set_inheritable(write, True)
            command = [sys.executable, __file__, "--tell", str(write), "--", *arguments]
            child = subprocess.Popen(
                command, stdout=printed, stderr=printed, pass_fds=[write]
            ).pid  # fmt: skip
        else:
            child = os.fork()
            if child == 0:
                os.close(read)
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                code = 70
                try:
                    code = work(write, arguments)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
    os.close(write)
    try:
        yield child, read
    finally:
        os.close(read)


def run(arguments: list[str], log: Path, *, cold: bool, kill: Moment | None = None) -> Ended:
    """A run to its end, or to its death."""
    events: list[Event] = []
    rest = b""
    seen = 0
    due = time.monotonic() + kill.after if kill and not kill.occurrence else None
    with process(arguments, log, cold) as (child, pipe):
        while True:
            wait = None if due is None else max(0.0, due - time.monotonic())
            if select.select([pipe], [], [], wait)[0]:
                got = os.read(pipe, 1 << 16)
                if not got:
                    break
                *lines, rest = (rest + got).split(b"\n")
                for line in lines:
                    sign, when, stage = line.decode().split(" ", 2)
                    events.append(Event(sign == ">", float(when), stage))
                    seen += bool(kill and events[-1].begins and stage == kill.stage)
                if kill and due is None and 0 < kill.occurrence <= seen:
                    due = events[-1].time + kill.after
            if due is not None and time.monotonic() >= due:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                due = None
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, events, log.read_text(errors="replace"))


def durations(events: list[Event]) -> dict[str, list[float]]:
    """Seconds of every occurrence of every stage, in order."""
    found: dict[str, list[float]] = {}
    open_: list[tuple[str, int]] = []
    for event in events:
        if event.begins:
            each = found.setdefault(event.stage, [])
            each.append(-event.time)
            open_.append((event.stage, len(each) - 1))
        else:
            stage, number = open_.pop()
            found[stage][number] += event.time
    return found


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a result but the page, which says how long its run took."""
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    return {path.name: path.read_bytes() for path in files if path.name != "report.html"}


def draw(stage: str, known: dict[str, list[float]], chance: random.Random) -> Moment:
    """A moment of one of the next occurrences of this stage, alike over its length."""
    if stage == OPENING:
        return Moment(stage, 0, chance.random() * known[OPENING][0])
    number = chance.randrange(1 + len(known[stage]) // 4)
    return Moment(stage, number + 1, chance.random() * known[stage][number])


class Log:
    """What a campaign has seen, on the terminal and in a JSONL file, with which it goes on.

    Args:
        path: the file; None for none.
        settings: of the campaign; a file of another one is refused.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self.outputs: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            whole, _, cut = path.read_text().rpartition("\n")
            lines = [json.loads(line) for line in whole.splitlines()]
            if cut:  # by the end of the one before
                path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if lines and lines[0] != settings:
            raise SystemExit(f"{path} is of another campaign: {lines[0]}")
        if not lines:
            self._add(settings)
        self.outputs = [line for line in lines if "same" in line]

    def _add(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def kills(self) -> int:
        return sum(len(output["killed in"]) for output in self.outputs)

    def killed(self, number: int, kill: Moment, stage: str, before: int) -> None:
        """A kill fell; whether it did harm, its output will show."""
        self._add({"output": number, "kill": stage, "aimed": vars(kill)})
        where = f"{kill.stage} {kill.occurrence} after {kill.after:.3f} s"
        print(f"kill {self.kills + before}: output {number}, {stage} ({where})", flush=True)

    def done(self, number: int, places: list[str], same: bool) -> None:
        """An output stands."""
        output = {"output": number, "killed in": places, "same": same}
        self.outputs.append(output)
        self._add(output)
        word = "the same bytes" if same else "NOT THE SAME"
        print(f"output {number}: {word} after {len(places)} kills", flush=True)

    def table(self) -> str:
        """Kills, and results that differ, by stage."""
        places = [(place, out["same"]) for out in self.outputs for place in out["killed in"]]
        lines = ["| stage | kills | results that differ |", "|---|---|---|"]
        for stage in dict.fromkeys(place for place, _ in places):
            same = [good for place, good in places if place == stage]
            lines.append(f"| {stage} | {len(same)} | {same.count(False)} |")
        bad = sum(not out["same"] for out in self.outputs)
        lines.append(f"| all ({len(self.outputs)} outputs) | {len(places)} | {bad} |")
        return "\n".join(lines)


def campaign(command: list[str], kills: int, seed: int, cold: bool, name: str, log: Log) -> bool:
    """Kill until there were so many kills; print the table. Whether all bytes came out.

    Args:
        command: ``prune MODEL`` and its options, without ``--out``.
        name: of the result.
    """
    with tempfile.TemporaryDirectory(prefix="secateur-kills-") as scratch:
        root = Path(scratch)

        def prune(of: str, kill: Moment | None = None) -> Ended:
            (root / of).mkdir(exist_ok=True)
            whole = [*command, "--out", str(root / of / name)]
            return run(whole, root / f"{of}.log", cold=cold, kill=kill)

        began = time.monotonic()
        whole = prune("whole")
        if whole.status:
            raise SystemExit(whole.log)
        wanted = contents(root / "whole" / name)
        known = durations(whole.events)
        known[OPENING] = [whole.events[0].time - began]
        stages = [OPENING, *(stage for stage in known if stage != OPENING)]
        print(f"stages: {', '.join(stages)}", flush=True)
        number = len(log.outputs)
        while log.kills < kills:
            number += 1
            chance = random.Random(f"{seed} {number}")
            of, places = f"run{number}", list[str]()
            for stage in [each for each in stages if chance.random() < HIT]:
                kill = draw(stage, known, chance)
                ended = prune(of, kill)
                if ended.status != -signal.SIGKILL:
                    break  # it was over before
                places.append(ended.stage)
                log.killed(number, kill, ended.stage, len(places))
            if [path.name for path in (root / of).iterdir()] != [name]:
                ended = prune(of)
            same = [path.name for path in (root / of).iterdir()] == [name] and (
                contents(root / of / name) == wanted
            )
            if not same and not places:
                raise SystemExit(ended.log)  # no kill is at fault
            log.done(number, places, same)
            if not same:
                print(ended.log, flush=True)
            shutil.rmtree(root / of)
    print(log.table())
    return all(output["same"] for output in log.outputs)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--tell"]:
        raise SystemExit(work(int(arguments[1]), arguments[3:]))
    options = OPTIONS
    if "--" in arguments:
        place = arguments.index("--")
        arguments, options = arguments[:place], arguments[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads that a fork would lose
    if not args.cold:
        import torch
        import transformers.models.llama.modeling_llama  # noqa: F401
        from transformers import AutoTokenizer  # noqa: F401

        import secateur.pruning  # noqa: F401

        torch.set_num_threads(1)
    settings = {"model": args.model, "options": options, "seed": args.seed, "gguf": args.gguf}
    command = ["prune", args.model, *options]
    name = "out.gguf" if args.gguf else "out"
    same = campaign(command, args.kills, args.seed, args.cold, name, Log(args.log, settings))
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
