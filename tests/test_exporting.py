"""A file for llama.cpp, a second look at what was written, its speed: as a user asks for them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import secateur
from safetensors.torch import load_file, save_file
from test_kill import KILLED, SERVER
from test_llama_cpp import needs_llama_cpp, write_gguf

import secateur as library
from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.writer import work_folder
from secateur.errors import VerifyError
from secateur.evaluation import bench
from secateur.evaluation.bench import HEADER, Measured
from secateur.modules import MODELING_FILE
from secateur.outputs import llama_cpp, reopen
from secateur.outputs.hf import INDEX, PLAN_TENSORS, RECORD
from secateur.outputs.verify_gguf import weight_type
from secateur.pruning import prune
from secateur.recipe import make_recipe

SHORT = {"samples": 4, "length": 24}
OPTIONS: dict[str, Any] = {"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8}
WISHES = ("--method", "comp", "--remove", "30%", "--of", "decoder", "--layers", "0",
          "--samples", "4", "--length", "24",
          "--set", "exempt_first=0", "--set", "exempt_last=0", "--set", "grid=8")  # fmt: skip
TYPES = (
    "f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, and through llama.cpp's quantiser q6_k, q5_k_m, "
    "q5_k_s, q4_k_m, q4_k_s, iq4_nl, iq4_xs, q3_k_l, q3_k_m, q3_k_s, q2_k"
)
OPT = (
    "llama.cpp has no architecture for OPT (learned positions, ReLU, LayerNorm): GGUF can be "
    "written of llama, mistral, qwen2, qwen3, smollm3, granite; for this model give --out a folder "
    "name, which transformers opens"
)


def tokenizer() -> Any:
    """The byte-level one of tiny models with one merge, without which llama.cpp opens none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = tiny.make_tokenizer().backend_tokenizer
    made = Tokenizer(models.BPE({**plain.get_vocab(), "th": 259}, [("t", "h")]))
    made.pre_tokenizer, made.decoder = plain.pre_tokenizer, plain.decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write_source(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A llama whose rows are whole blocks of 32, so that every type can hold them."""
    entry = ("llama", {"num_key_value_heads": 2, "intermediate_size": 256,
                       "max_position_embeddings": 256, **settings})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "exported", entry)
        tiny.make_model("exported", layers=3, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def recipe(**fields: Any) -> Any:
    options = {**OPTIONS, **fields.pop("options", {})}
    return make_recipe(
        **{
            "remove": "30%",
            "of": "decoder",
            "method": "comp",
            "options": options,
            "calibration": SHORT,
            **fields,
        }
    )


@dataclass(frozen=True)
class Models:
    """One model in every form that a user may have it in. They are shared: do not change them."""

    dense: Path
    other: Path
    per_layer: Path
    uniform: Path
    columns: Path
    file: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    dense = write_source(root / "dense")
    for name, fields in (
        ("per-layer", {}),
        ("uniform", {"layout": "uniform"}),
        ("columns", {"structure": "inputs"}),
    ):
        prune(dense, root / name, recipe(**fields), verify=False)
    file = root / "dense.gguf"
    library.export(dense, file, weights="f32", verify=False)
    return Models(
        dense, write_source(root / "other", seed=1), root / "per-layer", root / "uniform",
        root / "columns", file,
    )  # fmt: skip


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)


@pytest.fixture
def no_new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders are reopened in this process; a fresh one takes seconds to start."""
    from transformers import dynamic_module_utils

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                reopen.main(*command[3:])
            except Exception as error:  # as the interpreter tells it
                print(f"{type(error).__name__}: {error}", file=err)
                code = 1
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr("secateur.outputs.verify.subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that prune writes are not reopened."""
    monkeypatch.setattr("secateur.pruning.verify_folder", lambda *_, **__: None)


def beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# ---- prune to a file -------------------------------------------------------------------------


@needs_llama_cpp
def test_prune_to_a_file(models: Models, tmp_path: Path) -> None:
    """As a user does it, with both checks, each in a process of its own."""
    out = tmp_path / "m.gguf"
    ended = secateur("prune", models.dense, "--out", out, *WISHES, "--type", "q8_0")
    said = ended.fine().splitlines()
    assert said[-3].startswith("reopened in a fresh process as SecateurLlamaForCausalLM: ")
    assert said[-2].startswith("run by llama.cpp (q8_0): ")
    assert said[-2].endswith("of the pruned model; built-in passages, 4 windows of 256 tokens")
    assert said[-1] == f"written to {out}"
    assert beside(out) == ["m.gguf"]
    assert weight_type(out) == "Q8_0"

    said = secateur("verify", out).fine().splitlines()
    assert len(said) == 1
    assert said[0].startswith("run by llama.cpp (q8_0): ")
    assert said[0].endswith(
        "of the same file read by torch; built-in passages, 10 windows of 256 tokens"
    )
    before = out.read_bytes()
    ended = secateur("prune", models.dense, "--out", out, *WISHES, "--type", "q8_0")
    ended.refused_at_once(f"output {out} exists: choose another --out, or remove it first")
    assert out.read_bytes() == before
    assert beside(out) == ["m.gguf"]


@needs_llama_cpp
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_the_file_is_that_of_the_folder(
    layout: str, models: Models, tmp_path: Path, unverified: None
) -> None:
    """In a folder that does not exist; verified by llama.cpp against the folder's numbers."""
    out = tmp_path / "not" / "there" / "m.gguf"
    said = secateur("prune", models.dense, "--out", out, *WISHES, "--layout", layout).fine()
    assert "run by llama.cpp (f16): 320 of 320 greedy tokens are torch's own choice" in said
    assert beside(out) == ["m.gguf"]
    folder = models.uniform if layout == "uniform" else models.per_layer
    again = tmp_path / "again.gguf"
    library.export(folder, again, verify=False)
    one, two = (open_checkpoint(path) for path in (out, again))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)


def test_a_file_without_llama_cpp(
    models: Models, tmp_path: Path, unverified: None, no_llama_cpp: None
) -> None:
    out = tmp_path / "m.gguf"
    said = secateur("prune", models.dense, "--out", out, *WISHES).fine().splitlines()
    assert said[-2:] == [llama_cpp.NOT_RUN, f"written to {out}"]
    assert beside(out) == ["m.gguf"]
    said = secateur("export", models.dense, "--out", tmp_path / "e.gguf").fine().splitlines()
    assert said[-1] == llama_cpp.NOT_RUN
    missing = "the package cyllama, which is not installed: pip install 'secateur[llama-cpp]'"
    secateur("verify", out).refused(f"verifying a GGUF file runs llama.cpp through {missing}")
    for command in ("prune", "export"):
        wishes = WISHES if command == "prune" else ()
        secateur(
            command, models.dense, "--out", tmp_path / "k.gguf", *wishes, "--type", "q4_k_m"
        ).refused_at_once(f"the type q4_k_m runs llama.cpp through {missing}")
    assert beside(out) == ["e.gguf", "m.gguf"]


@pytest.mark.parametrize(
    ("model", "out", "wishes", "text"),
    [
        ("dense", "m.gguf", ("--type", "q9"), f"type is 'q9': allowed are {TYPES}"),
        ("dense", "m.gguf", ("--type", "gguf"), f"type is 'gguf': allowed are {TYPES}"),
        ("dense", "m", ("--type", "q8_0"),
         "--type q8_0 is for a GGUF file, but output {out} is a folder: let --out end in .gguf, or "
         "use --dtype for the weights of a folder"),
        ("opt", "m.gguf", (), OPT),
        ("opt", "m.gguf", ("--type", "q8_0", "--layout", "uniform"), OPT),
        ("per_layer", "m.gguf", (),
         "source {source} has been pruned to different sizes in each block already: prune the "
         "original with a larger --remove instead"),
    ],
)  # fmt: skip
def test_what_no_file_can_be_pruned_to(
    model: str, out: str, wishes: tuple[str, ...], text: str, models: Models,
    model_folder: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    source = model_folder("opt") if model == "opt" else getattr(models, model)
    place = tmp_path / out
    ended = secateur("prune", source, "--out", place, *WISHES, *wishes)
    ended.refused_at_once(text.format(out=place, source=source))
    assert not list(tmp_path.iterdir())


def test_a_folder_or_a_foreign_file_is_in_the_way(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.mkdir()
    text = f"output {out} exists: choose another --out, or remove it first"
    secateur("prune", models.dense, "--out", out, *WISHES).refused_at_once(text)
    out.rmdir()
    out.write_text("precious")
    secateur("prune", models.dense, "--out", out, *WISHES).refused_at_once(text)
    assert out.read_text() == "precious"
    inside = models.dense / "m.gguf"
    secateur("prune", models.dense, "--out", inside, *WISHES).refused_at_once(
        f"output {inside} lies inside the source {models.dense}: choose a folder elsewhere"
    )


def test_a_file_that_fails_its_check_gets_no_name(
    models: Models, tmp_path: Path, unverified: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays in the work folder; the same command looks again, and goes on when all is well."""
    out = tmp_path / "m.gguf"
    seen: list[Path] = []

    def refuse(file: Path, *_: object, **__: object) -> None:
        seen.append(file)
        raise VerifyError(f"{file} computes something else")

    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    monkeypatch.setattr("secateur.pruning.verify_gguf", refuse)
    made = work_folder(out) / "m.gguf"
    for _ in range(2):
        ended = secateur("prune", models.dense, "--out", out, *WISHES)
        ended.refused(f"{made} computes something else", code=1)
    assert seen == [made] * 2
    assert beside(out) == ["m.gguf.partial"]
    monkeypatch.setattr("secateur.pruning.verify_gguf", lambda *_, **__: None)
    ended = secateur("prune", models.dense, "--out", out, *WISHES)
    ended.fine()
    assert "continuing: 3 of 3 blocks are finished" in ended.err
    assert beside(out) == ["m.gguf"]


# ---- killed on the way to a file -------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    error: str | None
    moments: list[str]


@pytest.fixture(scope="module")
def run(models: Models) -> Any:
    """Prune in a fork, to its end or to the moment at which it is killed; see test_kill."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(out: Path, at: int | None = None) -> Answer:
        request = {"source": str(models.dense), "out": str(out), "at": at,
                   "recipe": recipe().model_dump()}  # fmt: skip
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        said = answer["said"] or {"error": None, "moments": []}
        return Answer(answer["status"], said["error"], said["moments"])

    yield ask
    server.stdin.close()
    assert server.wait(timeout=60) == 0


Run = Callable[..., Answer]


@pytest.fixture(scope="module")
def unbroken(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[str]]:
    """The bytes of an unbroken run, and the moments that it passes."""
    out = tmp_path_factory.mktemp("unbroken") / "m.gguf"
    answer = run(out)
    assert (answer.status, answer.error) == (0, None)
    assert beside(out) == ["m.gguf"]
    return out.read_bytes(), answer.moments


def test_the_moments_on_the_way_to_a_file(unbroken: tuple[bytes, list[str]]) -> None:
    lines = [n.removeprefix("after line ") for n in unbroken[1] if n.startswith("after line")]
    assert lines == ["identity", "layers", *["block"] * 3, "files", "export"]
    assert unbroken[1][-12:] == [
        "before m.gguf", "after m.gguf",  # in the work folder
        "before line export", "within line export", "after line export",
        "before m.gguf", "after m.gguf",
        "before m.gguf.partial.done", "after m.gguf.partial.done",
        "before removing", "while removing", "after removing",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "nth"),
    [
        ("after line layers", 0),
        ("after line block", 1),
        ("within line files", 0),
        ("after line files", 0),
        ("before m.gguf", 0),
        ("after m.gguf", 0),
        ("within line export", 0),
        ("after line export", 0),
        ("after m.gguf", 1),
        ("before m.gguf.partial.done", 0),
        ("after m.gguf.partial.done", 0),
        ("while removing", 0),
    ],
)
def test_killed_on_the_way_to_a_file(
    moment: str, nth: int, run: Run, unbroken: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    wanted, moments = unbroken
    places = [i for i, name in enumerate(moments) if name == moment]
    named = [i for i, name in enumerate(moments) if name == "after m.gguf"][1]
    out = tmp_path / "m.gguf"
    assert run(out, at=places[nth]).status == KILLED
    assert out.exists() == (places[nth] >= named)  # the name is absent, or stands for everything
    answer = run(out)
    assert answer.status == 0
    assert out.read_bytes() == wanted
    assert beside(out) == ["m.gguf"]
    if answer.error is not None:  # the work folder was gone: a finished output like any other
        assert places[nth] >= moments.index("after m.gguf.partial.done")
        assert answer.error == f"output {out} exists: choose another --out, or remove it first"


def test_killed_and_another_file_has_come(
    run: Run, unbroken: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    """The work folder alone says nothing about a file of that name."""
    out = tmp_path / "m.gguf"
    assert run(out, at=unbroken[1].index("after line files")).status == KILLED
    out.write_text("precious")
    answer = run(out)
    assert answer.error == f"output {out} exists: choose another --out, or remove it first"
    assert out.read_text() == "precious"
    out.unlink()
    assert run(out).error is None
    assert out.read_bytes() == unbroken[0]


# ---- export ----------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize(
    ("model", "architecture", "kind"),
    [
        ("dense", "llama", "f32"),
        ("per_layer", "deci", "f16"),
        ("uniform", "llama", "q8_0"),
        ("file", "llama", "bf16"),
        ("per_layer", "deci", "q4_k_m"),
    ],
)
def test_export(model: str, architecture: str, kind: str, models: Models, tmp_path: Path) -> None:
    source, out = getattr(models, model), tmp_path / "e.gguf"
    said = secateur("export", source, "--out", out, "--type", kind).fine().splitlines()
    size = f"{out.stat().st_size / 1e6:.1f}"
    assert said[-2] == f"written to {out}: architecture {architecture}, {size} MB"
    assert said[-1].startswith("run by llama.cpp (")
    assert f" of {source}; built-in passages, 4 windows of 256 tokens" in said[-1]
    if kind in ("f32", "f16"):
        assert "320 of 320 greedy tokens are torch's own choice" in said[-1]
    if kind == "q4_k_m":
        assert any("rows of 32 do not divide by 256" in note for note in said[:-2])
    assert beside(out) == ["e.gguf"]


@needs_llama_cpp
def test_export_of_a_foreign_file(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "foreign.gguf", tiny.make_model("llama-mha-untied"))
    out = tmp_path / "e.gguf"
    said = secateur("export", source, "--out", out, "--type", "f32").fine()
    assert "run by llama.cpp (f32): 320 of 320 greedy tokens are torch's own choice" in said
    weights = tiny.make_model("llama-mha-untied").state_dict()
    found = open_checkpoint(out)
    assert all(torch.equal(found.read(name), weights[name]) for name in found.tensors)


def test_export_without_verification(models: Models, tmp_path: Path) -> None:
    """Nothing is asked of llama.cpp, nor is it said that it was not."""
    out = tmp_path / "not" / "there" / "e.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.exporting.verify_gguf", None)
        said = secateur("export", models.dense, "--out", out, "--no-verify").fine()
    assert said == f"written to {out}: architecture llama, {out.stat().st_size / 1e6:.1f} MB\n"
    assert beside(out) == ["e.gguf"]


@pytest.mark.parametrize(
    ("model", "out", "wishes", "text"),
    [
        ("dense", "e.gguf", ("--to", "onnx"), "--to is 'onnx': allowed is gguf, packed, plain"),
        ("dense", "e.gguf", ("--type", "q9"), f"type is 'q9': allowed are {TYPES}"),
        ("dense", "e.bin", (),
         "output {out} must end in .gguf, which other programs know it by"),
        ("dense", "here.gguf", (),
         "output {out} exists: choose another --out, or remove it first"),
        ("nowhere", "e.gguf", (),
         "source {source} does not exist: give a folder with config.json and *.safetensors, a "
         ".gguf file, or a hub id such as org/name"),
    ],
)  # fmt: skip
def test_what_is_not_exported(
    model: str, out: str, wishes: tuple[str, ...], text: str, models: Models, tmp_path: Path
) -> None:
    source = getattr(models, model, tmp_path / model)
    (tmp_path / "here.gguf").write_text("precious")
    place = tmp_path / out
    ended = secateur("export", source, "--out", place, *wishes)
    ended.refused_at_once(text.format(out=place, source=source))
    assert beside(place) == ["here.gguf"]
    assert (tmp_path / "here.gguf").read_text() == "precious"


def test_what_llama_cpp_cannot_hold(
    models: Models, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Found out before a byte is written."""
    out = tmp_path / "e.gguf"
    secateur("export", model_folder("opt"), "--out", out).refused(OPT)
    ended = secateur("export", models.columns, "--out", out)
    assert ended.code == 2
    assert ended.err[-1].startswith("error: block 0 cannot be held by llama.cpp: its ")
    assert ended.err[-1].endswith(
        "prune the original with --structure coupled, which removes whole neurons and KV groups"
    )
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_written(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "e.gguf"
    ended = secateur("export", models.dense, "--out", out, "--no-verify")
    assert ended.code == 2
    assert ended.err == [f"error: output {out} cannot be written: no permission to write in "
                         f"{tmp_path / 'file'}"]  # fmt: skip
    locked = tmp_path / "a" / "e.gguf"  # simulated, since nothing is forbidden to root

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    secateur("export", models.dense, "--out", locked, "--no-verify").refused(
        f"output {locked} cannot be written: Permission denied"
    )


# ---- verify ----------------------------------------------------------------------------------


def damaged(folder: Path, place: Path, layer: str) -> Path:
    """A copy in which the rows of one matrix stand the other way round."""
    shutil.copytree(folder, place)
    index = json.loads((place / INDEX).read_text())["weight_map"]
    (name,) = [n for n in index if n.endswith(layer)]
    tensors = load_file(place / index[name])
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, place / index[name], {"format": "pt"})
    return place


def damaged_file(file: Path, place: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy in which one tensor is another."""
    from gguf import GGUFReader

    shutil.copy(file, place)
    (tensor,) = [t for t in GGUFReader(place, "r+").tensors if t.name == name]
    tensor.data[:] = change(np.array(tensor.data))
    tensor.data.flush()
    return place


@pytest.mark.usefixtures("no_new_process")
class TestFolders:
    @pytest.mark.parametrize(
        ("model", "kind"),
        [
            ("dense", "LlamaForCausalLM"),
            ("uniform", "LlamaForCausalLM"),
            ("per_layer", "SecateurLlamaForCausalLM"),
            ("columns", "SecateurLlamaForCausalLM"),
        ],
    )
    def test_good_ones(self, model: str, kind: str, models: Models) -> None:
        folder = getattr(models, model)
        line = f"reopened in a fresh process as {kind}: largest logit difference "
        said = secateur("verify", folder).fine()
        assert said.startswith(line)
        assert said.count("\n") == 1
        if model != "dense":
            assert secateur("verify", folder, "--against", models.dense).fine().startswith(line)

    @pytest.mark.parametrize("model", ["uniform", "per_layer", "columns"])
    def test_other_weights(self, model: str, models: Models, tmp_path: Path) -> None:
        """The files alone cannot tell; with the source it is told."""
        folder = damaged(getattr(models, model), tmp_path / "bad", ".1.mlp.down_proj.weight")
        ended = secateur("verify", folder, "--against", models.dense)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err[-1].startswith(
            f"error: the written model {folder} computes something else than its plan: logits "
            "differ by "
        )
        secateur("verify", folder).fine()

    def test_of_another_model(self, models: Models, model_folder: Callable[[str], Path]) -> None:
        """Another shape is seen at once, other values in the same shapes by what they compute."""
        name = f"{models.uniform} was not made from "
        stranger = model_folder("llama-gqa-tied")
        secateur("verify", models.uniform, "--against", stranger).refused_at_once(
            f"{name}{stranger}: give --against the model dense that it was pruned from"
        )
        ended = secateur("verify", models.uniform, "--against", models.other)
        assert ended.code == 1
        assert "computes something else than its plan" in ended.err[-1]

    @pytest.mark.parametrize("gone", [RECORD, PLAN_TENSORS])
    def test_without_a_plan(self, gone: str, models: Models, tmp_path: Path) -> None:
        folder = shutil.copytree(models.uniform, tmp_path / "copy")
        (folder / gone).unlink()
        text = (
            f"{folder} has no plan (secateur.json, secateur_plan.safetensors) to compare with "
            "--against: leave that out, or name a folder that secateur prune wrote"
        )
        secateur("verify", folder, "--against", models.dense).refused_at_once(text)
        secateur("verify", folder).fine()
        (folder / gone).write_text("{")
        secateur("verify", folder, "--against", models.dense).refused_at_once(text)

    def test_a_plan_that_is_not_that_of_the_weights(self, models: Models, tmp_path: Path) -> None:
        folder = shutil.copytree(models.per_layer, tmp_path / "copy")
        for name in (RECORD, PLAN_TENSORS):
            shutil.copy(models.uniform / name, folder / name)
        ended = secateur("verify", folder, "--against", models.dense)
        assert ended.code == 1
        assert "computes something else than its plan" in ended.err[-1]

    def test_weights_that_are_missing(self, models: Models, tmp_path: Path) -> None:
        folder = shutil.copytree(models.uniform, tmp_path / "copy")
        shard = sorted(folder.glob("model-*.safetensors"))[0]
        shard.unlink()
        secateur("verify", folder).refused_at_once(
            f"shard {shard.name} is named in {INDEX} but is not in {folder}: the download is not "
            "complete; fetch the folder again"
        )

    def test_code_of_a_stock_model_is_not_run(self, models: Models, tmp_path: Path) -> None:
        """A folder from somewhere may name any code; the class of transformers is enough."""
        folder = with_code(shutil.copytree(models.dense, tmp_path / "copy"), "code.py")
        assert "as LlamaForCausalLM: " in secateur("verify", folder).fine()
        assert not (folder / "it-ran").exists()
        assert "as Bad: " in secateur("verify", folder, "--trust-remote-code").fine()
        assert (folder / "it-ran").exists()

    @pytest.mark.parametrize("how", ["modeling", "map", "generation"])
    def test_code_that_is_not_ours_is_not_run(
        self, how: str, models: Models, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(models.per_layer, tmp_path / "copy")
        if how == "modeling":
            with (folder / MODELING_FILE).open("a") as file:
                file.write(f"\n\nopen({str(folder / 'it-ran')!r}, 'w')\n")
        elif how == "map":
            with_code(folder, "code.py")
        else:
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(
                f"open({str(folder / 'it-ran')!r}, 'w')\n\n\ndef generate(*_, **__):\n    pass\n"
            )
        for more in ((), ("--against", models.dense)):
            secateur("verify", folder, *more).refused_at_once(
                f"{folder} brings Python code that is not what this version of Secateur writes "
                "(modeling_secateur.py): read it, and if you trust it repeat the command with "
                "--trust-remote-code"
            )
        assert not (folder / "it-ran").exists()
        if how == "modeling":
            secateur("verify", folder, "--trust-remote-code").fine()
            assert (folder / "it-ran").exists()


def with_code(folder: Path, name: str) -> Path:
    """Let the config name classes of a file that leaves a trace when it runs."""
    config = json.loads((folder / "config.json").read_text())
    stem = name.removesuffix(".py")
    config["auto_map"] = {"AutoConfig": f"{stem}.C", "AutoModelForCausalLM": f"{stem}.Bad"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / name).write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        f"open({str(folder / 'it-ran')!r}, 'w')\n\n\n"
        "class C(LlamaConfig):\n    pass\n\n\n"
        "class Bad(LlamaForCausalLM):\n    config_class = C\n"
    )
    return folder


@needs_llama_cpp
class TestFiles:
    def test_good_ones(self, models: Models, tmp_path: Path) -> None:
        line = "run by llama.cpp (f32): 320 of 320 greedy tokens are torch's own choice, perplexity"
        said = secateur("verify", models.file, "--against", models.dense).fine()
        assert said.startswith(line)
        assert f" of {models.dense}; built-in passages, 10 windows of 256 tokens\n" in said
        assert said.count("\n") == 1

    def test_other_weights(self, models: Models, tmp_path: Path) -> None:
        """The file alone cannot tell; with its folder it is told."""
        bad = damaged_file(
            models.file, tmp_path / "bad.gguf", "blk.1.ffn_down.weight", lambda x: x[::-1]
        )
        ended = secateur("verify", bad, "--against", models.dense)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err[-1].startswith(f"error: {bad} writes another text than {models.dense}: ")
        secateur("verify", bad).fine()

        half = tmp_path / "half.gguf"
        library.export(models.per_layer, half, verify=False)
        bad = damaged_file(half, tmp_path / "b.gguf", "blk.1.ffn_down.weight", lambda x: x[::-1])
        ended = secateur("verify", bad, "--against", models.per_layer)
        assert ended.code == 1
        assert ended.err[-1].startswith(f"error: {bad} has perplexity ")
        assert ended.err[-1].endswith("%, allowed are 0.5%")

    def test_of_another_model(self, models: Models, tiny_opt: Path, tmp_path: Path) -> None:
        ended = secateur("verify", models.file, "--against", models.other)
        assert ended.code == 1
        assert ended.err[-1].startswith(f"error: {models.file} writes another text than ")
        secateur("verify", models.file, "--against", tiny_opt).refused(
            f"{models.file} splits text into other tokens than the tokenizer of {tiny_opt}: it is "
            "of another model, or its tokenizer keys are wrong for this one; then please report",
            code=1,
        )

    def test_of_a_model_with_fewer_tokens(self, models: Models, tmp_path: Path) -> None:
        """The same tokenizer over a larger embedding: what is written may be in no row of it."""
        large = write_source(tmp_path / "large", vocab_size=600, seed=3)
        weights = load_file(large / "model.safetensors")
        rows = weights["model.embed_tokens.weight"]
        rows[:300] *= 0.01
        save_file(weights, large / "model.safetensors", {"format": "pt"})
        file = tmp_path / "large.gguf"
        library.export(large, file, verify=False)
        secateur("verify", file, "--against", models.dense).refused(
            f"{file} writes tokens that {models.dense} has not: it is of another model", code=1
        )

    def test_weights_beyond_all_numbers(self, models: Models, tmp_path: Path) -> None:
        bad = damaged_file(
            models.file, tmp_path / "bad.gguf", "output_norm.weight", lambda x: x * 1e5
        )
        secateur("verify", bad).refused(
            f"{bad} has perplexity inf in llama.cpp, the same file read by torch inf in torch: its "
            "weights are damaged",
            code=1,
        )
        none = damaged_file(
            models.file, tmp_path / "nan.gguf", "blk.0.ffn_up.weight", lambda x: x * np.nan
        )
        ended = secateur("verify", none)
        assert ended.code == 2
        assert "NaN or infinite values: the checkpoint is damaged" in ended.err[-1]

    def test_a_file_that_is_cut_short(self, models: Models, tmp_path: Path) -> None:
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(models.file.read_bytes()[:-1000])
        ended = secateur("verify", bad)
        assert ended.code == 2
        assert len(ended.err) == 1
        assert ended.err[0].startswith(f"error: {bad} is truncated")


def test_no_windows_beyond_the_models_positions(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write_source(tmp_path / "small", max_position_embeddings=128)
    out = tmp_path / "small.gguf"
    library.export(small, out, verify=False)
    asked: list[int] = []

    class Enough(Exception):
        pass

    def losses(_: Path, windows: list[list[int]]) -> None:
        asked.extend(map(len, windows))
        raise Enough

    prompts: list[list[list[int]]] = []
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    monkeypatch.setattr(
        llama_cpp, "tokenize",
        lambda _, texts: [tokenizer()(text, add_special_tokens=False)["input_ids"]
                          for text in texts],
    )  # fmt: skip
    monkeypatch.setattr(
        llama_cpp, "greedy", lambda _, made, new: prompts.append(made) or [[5] * new for _ in made]
    )
    monkeypatch.setattr(llama_cpp, "losses", losses)
    with pytest.raises(Enough):
        library.verify(out)
    assert asked == [128] * 10
    assert len(prompts[0]) == 5


@pytest.mark.parametrize("wishes", [(), ("--against", "nowhere")])
def test_what_does_not_exist_is_not_verified(
    wishes: tuple[str, ...], models: Models, tmp_path: Path
) -> None:
    missing = "nowhere" if wishes else tmp_path / "nowhere"
    secateur("verify", models.file if wishes else missing, *wishes).refused_at_once(
        f"source {missing} does not exist: give a folder with config.json and *.safetensors, a "
        ".gguf file, or a hub id such as org/name"
    )


# ---- bench -----------------------------------------------------------------------------------

QUICK = ("--repeats", "1", "--prompt-tokens", "8", "--new-tokens", "4")


class Here:
    """What measures in a process of its own, in this one: importing torch again takes seconds."""

    def __init__(self, *_: object) -> None:
        self.meter = bench._Meter()

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, task: str, **arguments: Any) -> Any:
        return getattr(self.meter, task)(**arguments)


@needs_llama_cpp
def test_bench(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Worker", Here)
    said = secateur("bench", models.per_layer, "--against", models.dense, *QUICK).fine()
    torch_part, llama_part, rest = said.split("\n\n")
    assert rest == ""
    what = "prompt of 8 tokens, 4 generated, median of 1 turns"
    for part, title, names in (
        (torch_part, f"torch, float32: {what}", ["dense", "per-layer", "ratio"]),
        (llama_part, f"llama.cpp: {what}",
         ["0-dense-f16.gguf", "1-per-layer-f16.gguf", "ratio"]),
    ):  # fmt: skip
        lines = part.splitlines()
        assert lines[0] == title
        assert [name in lines[1] for name in HEADER] == [True] * len(HEADER)
        assert [line.split()[0] for line in lines[2:]] == names
        one, other = (line.split()[2].replace(",", "") for line in lines[2:4])
        assert lines[4].split()[2] == f"{int(other) / int(one):.2f}"


def measured(sources: Any, **_: Any) -> list[Measured]:
    return [Measured(Path(s).name, 10**6, 1000, 2**20, (1.0,), (1.0,)) for s in sources]


def test_bench_without_llama_cpp(
    models: Models, no_llama_cpp: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "bench_torch", measured)
    said = secateur("bench", models.dense, *QUICK, "--type", "q4_k_m").fine().splitlines()
    assert said[0].startswith("torch, float32: ")
    assert said[2].split()[0] == "dense"
    assert said[3:] == [
        "",
        "llama.cpp: measuring in llama.cpp runs llama.cpp through the package cyllama, which is "
        "not installed: pip install 'secateur[llama-cpp]'",
        "",
    ]


def test_bench_of_what_llama_cpp_cannot_hold(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "bench_torch", measured)
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    said = secateur("bench", model_folder("opt"), *QUICK).fine().splitlines()
    assert said[2].split()[0] == "opt"
    assert said[4] == f"llama.cpp: {OPT}"


def test_bench_refuses_a_type_at_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    secateur("bench", models.dense, *QUICK, "--type", "q9").refused_at_once(
        f"type is 'q9': allowed are {TYPES}"
    )


# ---- the library -----------------------------------------------------------------------------


@needs_llama_cpp
def test_the_same_through_the_library(models: Models, tmp_path: Path) -> None:
    assert {"export", "verify"} <= set(library.__all__)
    done = library.export(models.uniform, tmp_path / "e.gguf", weights="f32")
    assert (done.path, done.architecture) == (tmp_path / "e.gguf", "llama")
    assert done.bytes == done.path.stat().st_size
    assert done.verification is not None
    assert done.verification.chosen == done.verification.asked == 320
    found = library.verify(done.path, against=models.uniform)
    assert abs(found.loss) < 1e-4  # type: ignore[union-attr]
