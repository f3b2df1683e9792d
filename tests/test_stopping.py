"""Ctrl-C and SIGTERM while several workers cut: all end, one line is said, the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from folders import bytes_of

from secateur.checkpoint.writer import JOURNAL, work_folder

#: Blocks enough that the signal comes before the last.
BLOCKS = 8


def command(source: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "secateur", "prune", str(source), "--out", str(out), "--remove",
        "20%", "--method", "comp", "--samples", "4", "--length", "16", "--set", "layers=0",
        "--set", "inputs=identical", "--workers", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    return tiny.write_model(folder, "llama-gqa-tied", layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run = subprocess.run(command(source, out), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return bytes_of(out)


def until(what: object, run: subprocess.Popen[str]) -> None:
    """Wait for something of the run."""
    end = time.monotonic() + 120
    while not what():  # type: ignore[operator]
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "says", "moment"),
    [
        ("SIGINT", 130, "interrupted", "cutting"),
        ("SIGINT", 130, "interrupted", "starting"),
        ("SIGTERM", 143, "ended by SIGTERM", "cutting"),
    ],
)
def test_workers_end_with_their_run(
    name: str, code: int, says: str, moment: str, source: Path, whole: dict[str, bytes],
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    journal = work_folder(out) / JOURNAL
    run = subprocess.Popen(
        command(source, out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    family = psutil.Process(run.pid)

    def cutting() -> bool:
        return journal.is_file() and b'"kind": "block"' in journal.read_bytes()

    until((lambda: len(family.children()) == 2) if moment == "starting" else cutting, run)
    workers = family.children(recursive=True)
    assert len(workers) == 2
    if name == "SIGINT":
        os.killpg(run.pid, signal.SIGINT)  # a terminal sends Ctrl-C to all of them
    else:
        run.send_signal(signal.SIGTERM)
    printed, said = run.communicate(timeout=60)
    _, left = psutil.wait_procs(workers, timeout=2)
    assert not left, "orphans"
    assert run.returncode == code, said
    assert "Traceback" not in said + printed
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert errors == [
        f"error: {says}; finished blocks are kept, the same command continues from there"
    ]
    assert said.splitlines()[-1] == errors[0]
    assert not out.exists()
    again = subprocess.run(command(source, out), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    if moment == "cutting":
        assert "continuing: " in again.stderr
    got = bytes_of(out)
    assert got == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
