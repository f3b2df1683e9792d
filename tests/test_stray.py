"""What else may happen around a command: pipes that close, files in the way, folders left over."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import secateur

from secateur.comparison.folder import Folder as Comparison
from secateur.errors import OutputError
from secateur.scratch import PREFIX, scratch

Folder = Callable[[str], Path]


@pytest.mark.parametrize("command", ["--help", "inspect"])
def test_a_reader_that_has_gone(command: str, model_folder: Folder) -> None:
    """As behind ``secateur --help | true``."""
    arguments = [command] if command == "--help" else [command, str(model_folder("mistral"))]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "secateur", *arguments],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert (ended.stderr, ended.returncode) == ("", 1)


def test_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("dead", "alive", "young")
    dead, alive, young = (tmp_path / f"{PREFIX}{name}" for name in names)
    another = tmp_path / "of-somebody-else"
    for folder in (dead, alive, young, another):
        folder.mkdir()
        (folder / "file").write_text("x")
        if folder != young:
            os.utime(folder, (0, 0))
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with scratch() as mine:
        assert mine.parent == tmp_path
        assert {*tmp_path.iterdir()} == {mine, alive, young, another}
        os.utime(mine, (0, 0))
        with scratch():  # of a process beside it
            assert mine.is_dir()
    assert {*tmp_path.iterdir()} == {alive, young, another}
    os.close(handle)


def test_a_comparison_names_the_fault_of_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with Comparison(out, tmp_path / "model") as held:
        held.agree({})
        with pytest.raises(OutputError) as caught:
            Comparison(out, tmp_path / "model")
    assert str(caught.value) == (
        f"output {out} is being written by another process: wait for it, or choose another --out"
    )

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OutputError) as caught:
        Comparison(out, tmp_path / "model")
    assert str(caught.value) == (
        f"output {out} cannot be locked (No locks available): choose an --out on a file system "
        "that has locks"
    )


def test_a_file_with_the_name_of_a_set(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text("Some words of a file that is called like a set. " * 40)
    note = (
        f"c4 is the file {tmp_path / 'c4'} here, not the set of that name: to get the set, rename "
        "the file or start in another folder"
    )
    ended = secateur(
        "plan", model_folder("mistral"), "--remove", "20%", "--calibration", "c4", "--samples", 4,
        "--length", 16, "--method", "magnitude-sp",
    )  # fmt: skip
    ended.fine()
    assert note in ended.err
    ended = secateur("eval", model_folder("mistral"), "--text", "c4", "--length", 16, "--tokens", 0)
    ended.fine()
    assert note in ended.err
    (tmp_path / "c4").rename(tmp_path / "mine.txt")
    ended = secateur(
        "plan", model_folder("mistral"), "--remove", "20%", "--calibration", "mine.txt",
        "--samples", 4, "--length", 16, "--method", "magnitude-sp",
    )  # fmt: skip
    assert not any("the set of that name" in line for line in ended.err)
