"""Measuring models in turn: the order, the ratios, what is told; never how fast anything was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_llama_cpp import needs_llama_cpp, write_gguf

from secateur.errors import OutputError, RecipeError, SourceError
from secateur.evaluation import bench
from secateur.evaluation.bench import Measured, Spread

SMALL: Any = {"prompt_tokens": 24, "new_tokens": 4, "repeats": 2, "threads": 1}


def check(measured: Measured, nbytes: int, model: Any) -> None:
    assert measured.nbytes == nbytes
    assert measured.parameters == sum(p.numel() for p in model.parameters())
    assert measured.memory > 2**20
    for rates in (measured.prompt_rates, measured.generation_rates):
        assert len(rates) == SMALL["repeats"]
        assert all(math.isfinite(rate) and rate > 0 for rate in rates)


def test_torch_runs_folders_and_files(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Tied parameters count once."""
    folder = model_folder("llama-gqa-tied")
    whole = tiny.make_model("llama-mha-untied", layers=2)
    file = write_gguf(tmp_path / "tiny.gguf", whole)
    found = bench.bench_torch([folder, file], **SMALL)
    assert [one.name for one in found] == ["llama-gqa-tied", "tiny.gguf"]
    weights = (folder / "model.safetensors").stat().st_size
    check(found[0], weights, tiny.make_model("llama-gqa-tied"))
    check(found[1], file.stat().st_size, whole)


def open_here(source: Path, **settings: Any) -> bench._Meter:
    meter = bench._Meter()
    usual = {"threads": None, "dtype": "float32", "trust_remote_code": False}
    meter.open(**{"source": str(source), "prompt_tokens": 9, "new_tokens": 3, **usual, **settings})
    return meter


def test_generation_goes_on_behind_the_prompt(model_folder: Callable[[str], Path]) -> None:
    """The timed steps compute what one pass over all tokens computes."""
    meter = open_here(model_folder("llama-gqa-tied"))
    steps: list[torch.Tensor] = []
    hook = meter._model.register_forward_hook(lambda *args: steps.append(args[-1].logits[0]))
    assert set(meter.measure()) == {"prompt", "generation"}
    hook.remove()
    # Of the prompt the last logits alone.
    assert [len(step) for step in steps] == [1, 1, 1, 1]
    tokens = torch.cat([meter._prompt, meter._new[:, 0].T], dim=1)
    with torch.no_grad():
        wanted = meter._model(input_ids=tokens).logits[0, 8:]
    torch.testing.assert_close(torch.cat(steps), wanted, atol=1e-5, rtol=0)


def test_torch_runs_other_types(tiny_opt: Path) -> None:
    """Another family, whose positions are learned, in half the bytes."""
    meter = open_here(tiny_opt, dtype="bfloat16")
    assert {p.dtype for p in meter._model.parameters()} == {torch.bfloat16}


def test_too_many_tokens(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match=r"100 prompt tokens and 50 new ones .*128 positions"):
        open_here(model_folder("llama-gqa-tied"), prompt_tokens=100, new_tokens=50)


@needs_llama_cpp
def test_llama_cpp_runs_files(tmp_path: Path) -> None:
    models = [tiny.make_model("llama-mha-untied", layers=layers) for layers in (2, 1)]
    files = [write_gguf(tmp_path / f"{i}.gguf", model) for i, model in enumerate(models)]
    found = bench.bench_llama_cpp(files, **SMALL)
    assert [one.name for one in found] == ["0.gguf", "1.gguf"]
    for one, file, model in zip(found, files, models, strict=True):
        check(one, file.stat().st_size, model)


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is opened once, then all are measured again and again; at the end all are let go."""
    said: list[tuple[str, ...]] = []

    class Scripted:
        def __init__(self, file: str) -> None:
            self.file = file
            self.turns = 0

        def __enter__(self) -> Scripted:
            return self

        def __exit__(self, *_: object) -> None:
            said.append(("end", self.file))

        def ask(self, task: str, **arguments: Any) -> dict[str, float]:
            said.append((task, self.file))
            if task == "open":
                assert arguments["source"] == self.file
                return {"nbytes": 1, "parameters": 2, "memory": 3}
            self.turns += 1
            return {"prompt": 10.0 * self.turns, "generation": 1.0 * self.turns}

    monkeypatch.setattr(bench, "open_worker", Scripted)
    found = bench.bench_llama_cpp(["a/x.gguf", "b/x.gguf"], repeats=3)
    a, b = "a/x.gguf", "b/x.gguf"
    turns = [("measure", a), ("measure", b)] * 3
    assert said == [("open", a), ("open", b), *turns, ("end", b), ("end", a)]
    # Two of one name are told apart by where they lie.
    assert found[0] == Measured(a, 1, 2, 3, (10.0, 20.0, 30.0), (1.0, 2.0, 3.0))
    assert found[1].name == b


DENSE = Measured("dense", 100_000_000, 2000, 200 * 2**20, (10.0, 5.0, 11.0), (4.0, 1.0, 4.0))
PRUNED = Measured("pruned", 80_000_000, 1500, 150 * 2**20, (20.0, 11.0, 22.0), (5.0, 1.5, 6.0))


def test_ratios_are_taken_within_a_turn() -> None:
    """The second turn was slow for both; the ratio does not feel it."""
    assert bench.ratio(PRUNED.prompt_rates, DENSE.prompt_rates) == Spread(2.0, 2.0, 2.2)
    assert DENSE.prompt == Spread(10.0, 5.0, 11.0)
    with pytest.raises(ValueError, match="longer"):
        bench.ratio([1.0], [1.0, 2.0])


def test_table() -> None:
    rows = bench.table([DENSE, PRUNED])
    assert rows == [
        ("dense", "100.0", "2,000", "200", "10.0 (5.0–11.0)", "4.0 (1.0–4.0)"),
        ("pruned", "80.0", "1,500", "150", "20.0 (11.0–22.0)", "5.0 (1.5–6.0)"),
        ("ratio", "0.80", "0.75", "0.75", "2.00 (2.00–2.20)", "1.50 (1.25–1.50)"),
    ]
    assert all(len(row) == len(bench.HEADER) for row in rows)
    assert len(bench.table([DENSE])) == 1
    three = bench.table([DENSE, PRUNED, DENSE])
    assert [row[0] for row in three[3:]] == ["ratio of pruned", "ratio of dense"]


def test_sources_that_do_not_open(tmp_path: Path) -> None:
    """Told by the process, and raised here as what it was."""
    with pytest.raises(SourceError, match="does not exist: give a folder"):
        bench.bench_torch([tmp_path / "nothing"], **SMALL)
    with pytest.raises(RecipeError, match="dtype is 'int8': allowed are float32"):
        bench.bench_torch([tmp_path], dtype="int8")


@needs_llama_cpp
def test_a_file_that_does_not_open(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "good.gguf", tiny.make_model("llama-mha-untied", layers=1))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(OutputError, match=r"refuses .*bad\.gguf: .*not within the file bounds"):
        bench.bench_llama_cpp([file, bad], **SMALL)
    with pytest.raises(OutputError, match="is no file"):
        bench.bench_llama_cpp([file, tmp_path / "none.gguf"], **SMALL)
