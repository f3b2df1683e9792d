"""Signs of life: what the lines say, and that memory is seen."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
import torch

from secateur import progress
from secateur.progress import LiveProgress, PeakMemory, PlainProgress, Progress, process_memory


def work(shown: Progress) -> None:
    shown.note("estimate: little")
    shown.stage("cutting blocks", 3)
    for block in range(3):
        shown.step(f"block {block}")
    shown.stage("writing", 1)
    shown.step()
    shown.finish()


def test_plain_lines_say_stage_time_and_memory() -> None:
    file = io.StringIO()
    work(PlainProgress(file, interval=0))
    lines = file.getvalue().splitlines()
    memory = r"  \d+ MiB"
    expected = [
        r"estimate: little",
        rf"cutting blocks 0/3  0 s{memory}",
        rf"cutting blocks 1/3  0 s  0 s left{memory}  block 0",
        rf"cutting blocks 2/3  0 s  0 s left{memory}  block 1",
        rf"cutting blocks 3/3  0 s{memory}",  # the last step and the end are one line
        rf"writing 0/1  0 s{memory}",
        rf"writing 1/1  0 s{memory}",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_plain_lines_are_few() -> None:
    """Within the interval there is one line when something begins and one when it is done."""
    file = io.StringIO()
    shown = PlainProgress(file, interval=60)
    shown.stage("layer stage", 1000)
    for _ in range(1000):
        shown.step()
    shown.finish()
    lines = file.getvalue().splitlines()
    assert len(lines) <= 2
    assert lines[-1].startswith("layer stage 1000/1000")


def test_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    shown = PlainProgress(file, interval=0)
    shown.stage("cutting blocks", 10)
    now[0] += 30
    for _ in range(2):
        shown.step()
    assert "cutting blocks 2/10  30 s  120 s left" in file.getvalue().splitlines()[-1]
    shown.finish()
    assert shown.seconds == {"cutting blocks": 30.0}
    shown.stage("cutting blocks", 1)  # the same stage again adds up
    now[0] += 5
    shown.finish()
    assert shown.seconds == {"cutting blocks": 35.0}


def test_silence_keeps_the_times() -> None:
    shown = Progress()
    work(shown)
    assert list(shown.seconds) == ["cutting blocks", "writing"]
    shown.finish()  # once more does no harm
    assert list(shown.seconds) == ["cutting blocks", "writing"]


def test_a_live_line_ends_as_a_line_that_stays(capsys: pytest.CaptureFixture[str]) -> None:
    shown = LiveProgress()
    work(shown)
    said = capsys.readouterr()
    assert said.out == ""  # the result goes there
    assert "estimate: little" in said.err
    assert re.search(r"cutting blocks 3/3  0 s  \d+ MiB", said.err)
    assert re.search(r"writing 1/1  0 s  \d+ MiB", said.err)


@pytest.mark.parametrize("tty", [True, False])
def test_a_terminal_gets_the_live_line(tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    assert isinstance(progress.for_terminal(), LiveProgress if tty else PlainProgress)


def test_peak_memory_sees_what_is_gone_again() -> None:
    size = 200 * 2**20
    before = process_memory()
    with PeakMemory(interval=0.005) as memory:
        block = torch.ones(size, dtype=torch.uint8)
        for _ in range(200):
            time.sleep(0.005)
            if memory.peak > before + 0.9 * size:
                break
        del block
    assert before + 0.9 * size < memory.peak < before + 2 * size
    assert process_memory() < before + 0.5 * size
    assert not memory._thread.is_alive()
