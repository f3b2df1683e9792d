"""What goes wrong around a run: signals, locks, bytes that a disk did not keep, a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import bytes_of

from secateur.checkpoint import gguf_file, lock, safetensors_folder
from secateur.checkpoint.lock import Lock
from secateur.checkpoint.writer import work_folder
from secateur.errors import OutputError, SourceError
from secateur.pruning import prune
from secateur.recipe import Recipe, make_recipe


def recipe() -> Recipe:
    return make_recipe(
        remove="20%", method="comp", calibration={"samples": 2, "length": 16},
        options={"layers": 0, "exempt_first": 0, "exempt_last": 0},
    )  # fmt: skip


Folder = Callable[[str], Path]


class Stop(Exception):
    """Ends a run from inside, as a fault of the machine would."""


def stopped_after(blocks: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until so many blocks stand in the journal."""
    from secateur.checkpoint.writer import Journal

    add, done = Journal.add, [0]

    def counting(self: Journal, kind: str, value: Any) -> None:
        add(self, kind, value)
        done[0] += kind == "block"
        if done[0] == blocks:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", counting)
        with pytest.raises(Stop):
            prune(source, out, recipe(), verify=False)


@pytest.mark.parametrize("what", ["shard", "cut", "neither"])
def test_what_a_disk_did_not_keep_is_cut_again(
    what: str, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_folder("llama-gqa-tied")
    prune(source, tmp_path / "whole", recipe(), verify=False)
    out = tmp_path / "again" / "whole"
    stopped_after(2, source, out, monkeypatch)
    work = work_folder(out)
    pattern = {"shard": "model/model-00001-*.safetensors", "cut": "cut-00000.safetensors"}
    if what in pattern:
        (file,) = work.glob(pattern[what])
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    from secateur.outputs import hf

    written: list[int] = []
    write = hf.write_block
    monkeypatch.setattr(
        hf, "write_block", lambda *a, **k: (written.append(k["number"]), write(*a, **k))[1]
    )
    prune(source, out, recipe(), verify=False)
    assert written == ([2, 3] if what == "neither" else [0, 2, 3])
    wanted, got = bytes_of(tmp_path / "whole"), bytes_of(out)
    assert wanted.keys() == got.keys()
    assert all(got[name] == wanted[name] for name in wanted if name != "report.html")


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path, out = tmp_path / "lock", tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path; from secateur.checkpoint.lock import Lock\n"
        "held = Lock(Path(sys.argv[1]), Path(sys.argv[2])); print('held', flush=True)\n"
        "time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(OutputError) as caught:
        Lock(path, out)
    assert str(caught.value) == (
        f"output {out} is being written by another process ({other.pid}): wait for it, or choose "
        "another --out"
    )
    other.kill()
    other.wait()
    mine = Lock(path, out)  # nothing of a dead process is in the way
    assert path.read_text().split()[1] == str(os.getpid())
    mine.release(remove=True)
    assert not path.exists()


def test_a_lock_file_that_goes_away_meanwhile_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, take, times = tmp_path / "lock", lock.take, [0]

    def taken_away(handle: int, out: Path) -> None:
        take(handle, out)
        times[0] += 1
        if times[0] == 1:
            path.unlink()  # the one before has finished just now

    monkeypatch.setattr(lock, "take", taken_away)
    held = Lock(path, tmp_path / "out")
    assert times[0] == 2
    assert path.read_text().split()[1] == str(os.getpid())
    held.release()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_asked_to_end(name: str, model_folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "secateur", "prune", str(model_folder("llama-gqa-tied")), "--out",
        str(out), "--remove", "5%", "--samples", "4", "--length", "16",
    ]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stderr is not None
    began = run.stderr.readline()
    assert began
    run.send_signal(signal.Signals[name])
    _, said = run.communicate(timeout=120)
    assert not out.exists()
    assert "Traceback" not in said
    assert run.returncode == {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}[name]
    last = said.splitlines()[-1]
    assert last.startswith("error: ")
    assert "the same command continues" in last
    if name == "SIGTERM":
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        assert (out / "secateur.json").is_file()


def test_a_source_that_cannot_be_read(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = model_folder("llama-gqa-tied"), safetensors_folder.read_bytes
    left = [20]

    def fails(path: Path, begin: int, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        read(path, begin, target)

    assert safetensors_folder.read_bytes is gguf_file.read_bytes
    monkeypatch.setattr(safetensors_folder, "read_bytes", fails)
    with pytest.raises((SourceError, OSError)) as caught:
        prune(source, tmp_path / "out", recipe(), verify=False)
    assert "Input/output error" in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    prune(source, tmp_path / "out", recipe(), verify=False)


def test_a_clock_that_is_set_back(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_folder("llama-gqa-tied")
    prune(source, tmp_path / "one" / "out", recipe(), verify=False)
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    prune(source, tmp_path / "two" / "out", recipe(), verify=False)
    one, two = bytes_of(tmp_path / "one" / "out"), bytes_of(tmp_path / "two" / "out")
    assert all(one[name] == two[name] for name in one if name != "report.html")


@pytest.mark.slow
def test_a_disk_that_is_full_at_every_write(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, original, calls = model_folder("llama-gqa-tied"), os.fsync, [0]
    full_at = 0

    def fsync(handle: int) -> None:
        if threading.current_thread() is threading.main_thread():
            calls[0] += 1
            if calls[0] == full_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    monkeypatch.setattr("os.fsync", fsync)
    prune(source, tmp_path / "whole" / "out", recipe(), verify=False)
    wanted, writes = bytes_of(tmp_path / "whole" / "out"), calls[0]
    assert writes > 20
    for full_at in range(1, writes + 1):
        calls[0] = 0
        out = tmp_path / str(full_at) / "out"
        with pytest.raises((OSError, OutputError)) as caught:
            prune(source, out, recipe(), verify=False)
        assert "No space left" in str(caught.value)
        calls[0] = writes  # never again
        if not out.exists():  # the last sync is behind the rename
            prune(source, out, recipe(), verify=False)
        got = bytes_of(out)
        assert all(got[name] == wanted[name] for name in wanted if name != "report.html")
