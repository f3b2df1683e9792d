"""``secateur compare`` for real: processes, a kill, written models, measured independently."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ended, secateur
from folders import bytes_of
from pages import check_alone

from secateur.calibration import encode, load_text
from secateur.pruning import prune
from secateur.recipe import load_recipe

WINDOWS, LENGTH = 3, 48


@dataclass(frozen=True)
class Done:
    """A comparison that was killed in its second cell and continued."""

    source: Path
    out: Path
    text: Path
    written: dict[str, int]
    ended: Ended
    orphan: bool

    @property
    def json(self) -> Any:
        return json.loads((self.out / "compare.json").read_text())

    def cell(self, name: str) -> Any:
        return next(cell for cell in self.json["cells"] if cell["name"] == name)


@pytest.fixture(scope="module")
def done(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two methods at a share that they reach, and a recipe that cannot reach it."""
    root = tmp_path_factory.mktemp("compare")
    source, out, text = model_folder("llama-gqa-tied"), root / "out", root / "text.txt"
    text.write_text("Of shears and stones, and of the wet garden behind them. " * 8)
    (root / "tight.yaml").write_text("method: obs\noptions: {cap: 0.01}\n")
    words = [
        "compare", source, "--methods", "comp,obs", "--recipes", root / "tight.yaml",
        "--remove", "20%", "--of", "decoder", "--layers", "0", "--set", "exempt_first=0",
        "--samples", "4", "--length", "24", "--texts", text, "--windows", WINDOWS,
        "--window-length", LENGTH, "--keep", "--out", out,
    ]  # fmt: skip
    first = out / "cells" / "comp-20-of-decoder-seed0.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur", *map(str, words)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for(first.is_file, process)
    child = wait_for(lambda: children_of(process.pid), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    orphan = not gone(child[0])
    ended = secateur(*words)
    return Done(source, out, text, written, ended, orphan)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    until = time.monotonic() + 500  # on a busy machine
    while not (found := what()):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def children_of(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]


def gone(pid: int) -> bool:
    """Whether a process whose parent was killed ends too, before it could have done much."""
    import psutil

    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # nobody has asked for it yet
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_comparison_takes_its_process_along(done: Done) -> None:
    assert not done.orphan


def test_only_what_was_not_finished_is_run_again(done: Done) -> None:
    assert set(done.written) == {"dense.json", "comp-20-of-decoder-seed0.json"}
    for name, when in done.written.items():
        assert (done.out / "cells" / name).stat().st_mtime_ns == when
    notes = [line for line in done.ended.err if line.startswith(("continuing", "dense", "["))]
    assert notes[0] == "continuing: 1 of 3 cells are finished"
    ran = {line.split("  ")[0].split(":")[0] for line in notes[1:]}
    assert ran == {"[2/3] obs, 20% of the decoder", "[3/3] tight, 20% of the decoder"}


def test_perplexities_are_those_of_transformers(done: Done) -> None:
    """The dense model and the kept ones, opened as a user would, whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.source)
    names = {"dense": done.source} | {
        name: done.out / "models" / name
        for name in ("comp-20-of-decoder-seed0", "obs-20-of-decoder-seed0")
    }
    for name, folder in names.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        )
        for text in ("builtin", str(done.text)):
            loaded = load_text(text, use="evaluation")
            ids = encode(tokenizer, ("" if loaded.whole else "\n\n").join(loaded.documents))
            windows = ids[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
            with torch.no_grad():
                losses = [float(model(w[None], labels=w[None]).loss) for w in windows]
            value = math.exp(sum(losses) / len(losses))
            key = f"perplexity {text}"
            assert done.cell(name)["measures"][key] == pytest.approx(value, rel=1e-4), (name, text)


def test_shares_are_those_of_the_files(done: Done) -> None:
    from safetensors import safe_open

    def parameters(folder: Path, where: str) -> int:
        count = 0
        for path in folder.glob("model*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is not a dict
                    if where in name and file.get_tensor(name).is_floating_point():
                        count += file.get_tensor(name).numel()
        return count

    for name in ("comp-20-of-decoder-seed0", "obs-20-of-decoder-seed0"):
        folder = done.out / "models" / name
        measures = done.cell(name)["measures"]
        for key, where in (("share_removed", ""), ("decoder_share_removed", ".layers.")):
            share = 1 - parameters(folder, where) / parameters(done.source, where)
            assert measures[key] == pytest.approx(share, abs=1e-6), (name, key)
    asked = done.cell("comp-20-of-decoder-seed0")["measures"]["decoder_share_removed"]
    assert asked == pytest.approx(0.2, abs=0.02)


def test_a_kept_model_is_what_prune_writes(done: Done, tmp_path: Path) -> None:
    name = "comp-20-of-decoder-seed0"
    recipe = load_recipe(done.out / "recipes" / f"{name}.yaml")
    prune(done.source, tmp_path / "again", recipe, verify=False)
    assert bytes_of(tmp_path / "again") == bytes_of(done.out / "models" / name)


def test_the_page_of_a_kept_model_has_its_perplexities(done: Done) -> None:
    name = "obs-20-of-decoder-seed0"
    page = check_alone((done.out / "models" / name / "report.html").read_text())
    dense, pruned = (done.cell(n)["measures"] for n in ("dense", name))
    before, after = dense["perplexity builtin"], pruned["perplexity builtin"]
    assert page.tables["perplexity"][1] == [
        "builtin", f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}",
    ]  # fmt: skip
    assert "Reopened in a fresh process as SecateurLlamaForCausalLM" in page.source


def test_memory_and_time_are_those_of_a_process_of_its_own(done: Done) -> None:
    for name in ("comp-20-of-decoder-seed0", "obs-20-of-decoder-seed0"):
        measures = done.cell(name)["measures"]
        # Python, torch and a tiny model; this process holds more by now.
        assert 100 * 2**20 < measures["peak_memory"] < 900 * 2**20
        assert 0 < measures["seconds"] < 120


def test_every_form_says_the_same(done: Done) -> None:
    """The page, Markdown and what is printed show the numbers of the JSON."""
    found = done.json
    shown = {column["key"]: column for column in found["columns"]}
    page = check_alone((done.out / "report.html").read_text())
    head, *rows = page.tables["rows"]
    assert head == ["setting", "asked", *(column["title"] for column in found["columns"])]
    lines = (done.out / "compare.md").read_text().splitlines()
    for row, wanted in zip(rows, found["rows"], strict=True):
        numbers = [
            f"{wanted['values'][key]['median'] * c['scale']:,.{c['digits']}f}"
            if key in wanted["values"]
            else ""
            for key, c in shown.items()
        ]
        if wanted["failed"]:
            continue  # the last test below
        assert row == [wanted["label"], wanted["asked"], *numbers]
        assert "| " + " | ".join(row) + " |" in lines
        assert any(line.split() == " ".join(row).split() for line in done.ended.out.splitlines())


def test_the_page_shows_every_block_and_both_texts(done: Done) -> None:
    source = (done.out / "report.html").read_text()
    for name in ("comp-20-of-decoder-seed0", "obs-20-of-decoder-seed0"):
        cell = done.cell(name)
        for block in cell["blocks"]:
            note = f"{cell['label']}, {cell['asked']}: block {block['block']} loses"
            assert f"{note} {block['share_removed']:.1%}</title>" in source
    assert "perplexity on builtin" in source
    assert "perplexity on text.txt" in source


def test_a_share_that_cannot_be_reached_is_a_row(done: Done) -> None:
    assert done.ended.code == 1
    why = (
        "failed: 6,195 parameters should leave 4 blocks, which can lose at most 240: ask for less, "
        "remove whole blocks with --layers, or set exempt_first, exempt_last and cap in a recipe"
    )
    assert f"tight, 20% of the decoder: {why}" in done.ended.out.splitlines()
    page = check_alone((done.out / "report.html").read_text())
    assert page.tables["rows"][4] == ["tight", "20% of the decoder", why]
    assert f"\n- tight, 20% of the decoder: {why}\n" in (done.out / "compare.md").read_text()


def test_two_at_a_time_measure_the_same(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for seconds and memory, and with as many threads in each process."""
    words = [
        "compare", model_folder("llama-gqa-tied"), "--methods", "comp,magnitude-sp", "--remove",
        "20%", "--of", "decoder", "--set", "comp.layers=0", "--set", "comp.exempt_first=0",
        "--samples", "4", "--length", "24", "--windows", WINDOWS, "--window-length", LENGTH,
    ]  # fmt: skip
    secateur(*words, "--workers", "2", "--out", tmp_path / "beside").fine()
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // 2)))
        secateur(*words, "--out", tmp_path / "serial").fine()
    names = ["comp-20-of-decoder-seed0", "dense", "magnitude-sp-20-of-decoder-seed0"]
    for name in names:
        both = [
            json.loads((tmp_path / out / "cells" / f"{name}.json").read_text())
            for out in ("beside", "serial")
        ]
        for found in both:
            assert found.pop("wall") > 0
            for key in ("seconds", "peak_memory", "stages"):
                assert found.pop(key, True)
        assert both[0] == both[1]
    assert [p.stem for p in sorted((tmp_path / "beside" / "cells").iterdir())] == names
