"""A run that is killed anywhere continues with the same call and ends in the same bytes.

The kills are real (SIGKILL) and fall where state changes: around every rename, around every line
of the journal, in the middle of a line, and while the finished work folder is removed. One process
imports everything and runs nothing itself; each run, broken or not, is a fork of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from folders import bytes_of

#: Forks runs of ``prune``. Reads one JSON request a line, answers with one JSON line.
SERVER = """
import json, os, signal, sys

import torch

torch.set_num_threads(1)  # no pool of threads that a fork would lose
import transformers.models.llama.modeling_llama
from transformers import AutoTokenizer

import secateur.outputs.verify
from secateur.checkpoint import writer
from secateur.errors import SecateurError
from secateur.pruning import prune
from secateur.recipe import make_recipe


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Moments:
    # Counts the moments at which state changes, and dies at the one that is asked for.
    def __init__(self, at):
        self.at, self.names = at, []

    def __call__(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            die()


def watch(moment):
    real_replace, real_add, real_rmtree = os.replace, writer.Journal.add, writer.shutil.rmtree

    def replace(old, new):
        name = os.path.basename(new)
        moment("before " + name)
        real_replace(old, new)
        moment("after " + name)

    def add(self, kind, value):
        moment("before line " + kind)
        if len(moment.names) == moment.at:  # the next moment is in the middle of this line
            with (self.folder / writer.JOURNAL).open("ab") as file:
                file.write(json.dumps({"kind": kind, "value": value}).encode()[:20])
        moment("within line " + kind)
        real_add(self, kind, value)
        moment("after line " + kind)

    def rmtree(path, ignore_errors=False):
        if not os.path.isdir(path):
            return
        moment("before removing")
        for name in sorted(os.listdir(path))[:2]:
            os.remove(os.path.join(path, name))
        moment("while removing")
        real_rmtree(path, ignore_errors=ignore_errors)
        moment("after removing")

    writer.os.replace, writer.Journal.add = replace, add
    writer.shutil.rmtree = rmtree


def run(request):
    moment = Moments(request.get("at"))
    watch(moment)
    try:
        prune(request["source"], request["out"], make_recipe(**request["recipe"]), verify=False)
    except SecateurError as error:
        return {"error": str(error), "moments": moment.names}
    return {"error": None, "moments": moment.names}


for line in sys.stdin:
    request = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            with os.fdopen(write, "w") as pipe:
                json.dump(run(request), pipe)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"status": status, "said": json.loads(said) if said else None}), flush=True)
"""

#: Every input cut, one whole block removed, statistics from the cut prefix: all there is to lose.
RECIPE: dict[str, Any] = {
    "remove": "40%",
    "of": "decoder",
    "options": {
        "layers": 1, "denses": "all", "exempt_first": 0, "exempt_last": 0, "inputs": "sequential",
        "grid": 8,
    },
    "calibration": {"samples": 2, "length": 16},
}  # fmt: skip
KILLED = -9


@dataclass(frozen=True)
class Answer:
    """How a forked run ended: exit status, error text, moments that it passed."""

    status: int
    error: str | None
    moments: list[str]


Run = Callable[..., Answer]


@pytest.fixture(scope="module")
def source(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama-gqa-tied")


@pytest.fixture(scope="module")
def run(source: Path) -> Any:
    """Run prune in a fork, to its end or to the moment ``at``."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(out: Path, at: int | None = None, **recipe: Any) -> Answer:
        request = {"source": str(source), "out": str(out), "recipe": {**RECIPE, **recipe}, "at": at}
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        said = answer["said"] or {"error": None, "moments": []}
        return Answer(answer["status"], said["error"], said["moments"])

    yield ask
    server.stdin.close()
    assert server.wait(timeout=60) == 0


@dataclass(frozen=True)
class Reference:
    """An unbroken run."""

    files: dict[str, bytes]
    moments: list[str]


@pytest.fixture(scope="module")
def unbroken(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    answer = run(out)
    assert answer.status == 0
    assert answer.error is None
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    return Reference(bytes_of(out), answer.moments)


def finish(run: Run, out: Path, unbroken: Reference) -> Answer:
    """Run to the end and compare every byte; nothing else is left beside the output."""
    answer = run(out)
    assert answer.status == 0
    assert bytes_of(out) == unbroken.files
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    return answer


def test_the_moments_cover_the_run(unbroken: Reference) -> None:
    """What the numbers below stand for; a new kind of write must show up here."""
    names = unbroken.moments
    lines = [n.removeprefix("after line ") for n in names if n.startswith("after line")]
    assert lines == ["identity", "layers", "block", "block", "block", "files"]
    written = [n.removeprefix("after ") for n in names if n.startswith("after ")]
    assert set(unbroken.files) <= set(written)  # each file of the output arrives by a rename
    assert written[-3:] == ["out", "out.partial.done", "removing"]
    assert len(names) > 50


#: A spread over the whole run; the slow test below takes every moment.
SPREAD = tuple(round(i * 0.99 / 11, 3) for i in range(12))


@pytest.mark.parametrize("place", SPREAD)
def test_killed_once(place: float, run: Run, unbroken: Reference, tmp_path: Path) -> None:
    check_kill(int(place * len(unbroken.moments)), run, unbroken, tmp_path / "out")


@pytest.mark.slow
def test_killed_at_every_moment(run: Run, unbroken: Reference, tmp_path: Path) -> None:
    for at in range(len(unbroken.moments)):
        check_kill(at, run, unbroken, tmp_path / str(at) / "out")


def check_kill(at: int, run: Run, unbroken: Reference, out: Path) -> None:
    name = unbroken.moments[at]
    assert run(out, at=at).status == KILLED, name
    named = unbroken.moments.index("after out")
    # The output's name is either absent, or stands for everything.
    assert out.exists() == (at >= named), name
    if at >= named:
        assert bytes_of(out) == unbroken.files, name
    answer = finish(run, out, unbroken)
    if answer.error is not None:
        # The work folder was gone already: for the next call this is a finished output.
        assert at >= unbroken.moments.index("after out.partial.done"), name
        assert "exists and is not empty" in answer.error


@pytest.mark.parametrize(
    "name", ["after out", "before out.partial.done", "after out.partial.done", "while removing"]
)
def test_killed_between_the_name_and_the_tidying(
    name: str, run: Run, unbroken: Reference, tmp_path: Path
) -> None:
    check_kill(unbroken.moments.index(name), run, unbroken, tmp_path / "out")


def test_killed_while_recovering_from_the_last_kill(
    run: Run, unbroken: Reference, tmp_path: Path
) -> None:
    """The model has its name, the next call is killed too, and so is the one after it."""
    out = tmp_path / "out"
    assert run(out, at=unbroken.moments.index("after out")).status == KILLED
    assert run(out, at=0).status == KILLED
    (tmp_path / "out.partial" / "model").mkdir(exist_ok=True)  # as opening the journal leaves it
    answer = finish(run, out, unbroken)
    assert answer.error is None


def test_killed_again_and_again(run: Run, unbroken: Reference, tmp_path: Path) -> None:
    """A run of many pieces, each killed a little later after its start than the one before."""
    out = tmp_path / "out"
    kills = 0
    while run(out, at=7 + 2 * kills).status == KILLED:
        kills += 1
    assert kills >= 5
    assert bytes_of(out) == unbroken.files


def test_what_is_finished_is_not_done_again(run: Run, unbroken: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    second = [i for i, name in enumerate(unbroken.moments) if name == "after line block"][1]
    assert run(out, at=second).status == KILLED
    again = finish(run, out, unbroken).moments
    assert again.count("after line block") == 1
    assert "after line layers" not in again
    assert "after model-00002-of-00004.safetensors" not in again
    assert "after model-00003-of-00004.safetensors" in again


def test_a_torn_line_does_not_spoil_the_next(run: Run, unbroken: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, at=unbroken.moments.index("within line block")).status == KILLED
    journal = tmp_path / "out.partial" / "journal.jsonl"
    assert not journal.read_bytes().endswith(b"\n")
    seen = finish(run, tmp_path / "other" / "out", unbroken).moments
    # On from there: the first block again, and a kill behind its line.
    rest = seen[: seen.index("after line block") + 1]
    start = rest.index("after line layers") + 1
    assert run(out, at=len(rest) - start - 1).status == KILLED
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["identity", "layers", "block"]
    shutil.rmtree(tmp_path / "other")
    assert finish(run, out, unbroken).moments.count("after line block") == 2


def test_another_recipe_is_not_mixed_in(run: Run, unbroken: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    second = [i for i, name in enumerate(unbroken.moments) if name == "after line block"][1]
    assert run(out, at=second).status == KILLED
    answer = run(out, seed=1)
    assert answer.error is not None
    assert "unfinished work of another run" in answer.error
    assert "recipe" in answer.error
    finish(run, out, unbroken)  # and the work was not harmed by the attempt
