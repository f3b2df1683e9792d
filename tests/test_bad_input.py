"""What a user can do wrong: one line that says what to do, exit code 2, and nothing is left behind.

Expected texts are given word for word; ``<*>`` stands for what another library or Python says.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import bytes_of
from safetensors.torch import load_file, save_file
from test_checkpoint import resave, safetensors_bytes, split_safetensors, write_gguf

from secateur import cli
from secateur.checkpoint.writer import work_folder
from secateur.outputs.verify import Verification

#: A target that the tiny model of four blocks can reach, and calibration that takes no time.
SMALL = ("--remove", "5%", "--samples", "4", "--length", "16")
PROGRESS = re.compile(
    r"(estimate|layer stage|cutting blocks|continuing|perplexity|"
    r"drawing (copy \d|\d copies) of the calibration text|"
    r"writing \d+ windows of calibration text)[ ,:]"
)
DAMAGED = "; fetch it again"


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: list[str]

    def refused(self, text: str, *, before_start: bool = True) -> None:
        """One line of error; before it, where work had begun, lines of progress."""
        assert self.code == 2
        assert self.err
        *before, last = self.err
        pattern = ".*".join(re.escape(part) for part in f"error: {text}".split("<*>"))
        assert re.fullmatch(pattern, last), last
        assert not before_start or not before
        assert all(PROGRESS.match(line) for line in before), before


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line in this process, without the network, in a folder of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        code = end.value.code or 0
        assert isinstance(code, int)
        return Ended(code, shown.out, shown.err.strip().splitlines())

    return call


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def llama(model_folder: Callable[[str], Path]) -> Path:
    """A good model. It is shared: do not change it."""
    return model_folder("llama-gqa-tied")


@pytest.fixture
def folder(tmp_path: Path, llama: Path) -> Path:
    """A copy of it that a test may spoil."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def no_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reopening in a fresh process takes seconds, and is tested elsewhere."""
    done = Verification(0.0, 1.0, "NotOpened", 0)
    monkeypatch.setattr("secateur.pruning.verify_folder", lambda *_, **__: done)


def nothing_written(out: Path) -> bool:
    return not out.exists() and not work_folder(out).exists()


# ---- sources ---------------------------------------------------------------------------------


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        entries, data = split_safetensors(path)
        path.write_bytes(safetensors_bytes(change(entries), data))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: (resave(folder, change), None)[1]


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Two shards and an index, to be spoiled."""

    def edit(folder: Path) -> None:
        single = folder / "model.safetensors"
        all_tensors = load_file(single)
        single.unlink()
        names = sorted(all_tensors)
        places = {n: f"model-{1 + (i > 20)}.safetensors" for i, n in enumerate(names)}
        for shard in set(places.values()):
            save_file({n: all_tensors[n] for n in names if places[n] == shard}, folder / shard)
        change(folder, places)
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            index.write_text(json.dumps({"weight_map": places}))

    return edit


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def overlap(entries: dict[str, Any]) -> dict[str, Any]:
    begin, end = entries["model.norm.weight"]["data_offsets"]
    entries["model.norm.weight"]["data_offsets"] = [begin - 4, end - 4]
    return entries


def other_shape(entries: dict[str, Any]) -> dict[str, Any]:
    entries["model.norm.weight"]["shape"] = [31]
    return entries


def negative_shape(entries: dict[str, Any]) -> dict[str, Any]:
    entries["model.norm.weight"]["shape"] = [-32]
    return entries


UP = "model.layers.1.mlp.up_proj.weight"
SAFETENSORS = "config.json and *.safetensors"

BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (emptied, f"source {{src}} is an empty folder: it should hold {SAFETENSORS}"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        f"source {{src}} has no config.json: it should hold {SAFETENSORS}, as save_pretrained "
        "writes them",
    ),
    "GGUF in a folder": (
        lambda f: (emptied(f), (f / "m.gguf").touch()),
        "source {src} has no config.json but a GGUF file: name the file, {src}/m.gguf",
    ),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{'a': 1}"),
        "{src}/config.json is not valid JSON: <*>",
    ),
    "config is too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "{src}/config.json is not valid JSON: <*>",
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "{src}/config.json does not say model_type: it is not a model's config",
    ),
    "config without type": (
        edit_config(model_type=None),
        "{src}/config.json does not say model_type: it is not a model's config",
    ),
    "config with a text for a number": (
        edit_config(hidden_size="many"),
        "{src}/config.json cannot be used: <*>'hidden_size'<*>",
    ),
    "config with an unknown activation": (
        edit_config(hidden_act="magic"),
        "source {src} (model_type llama) cannot be built as a causal language model: "
        "KeyError('magic')",
    ),
    "config without blocks": (
        edit_config(num_hidden_layers=0),
        "model type llama has no blocks here: its config asks for none",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "source {src} has a config.json but no *.safetensors file",
    ),
    "pickled": (
        pickled,
        "source {src} holds only pickled weights (pytorch_model.bin), which can run code when "
        'they are opened: convert them once, where you trust them, with python -c "from '
        "transformers import AutoModelForCausalLM as M; M.from_pretrained('{src}')"
        ".save_pretrained('model-safetensors')\" and give the new folder",
    ),
    "cut in the data": (
        weights(lambda b: b[: len(b) // 2]),
        f"{{src}}/model.safetensors is cut short: tensor <*> ends at byte <*>, the file has "
        f"<*>{DAMAGED}",
    ),
    "cut by a byte": (
        weights(lambda b: b[:-1]),
        f"{{src}}/model.safetensors is cut short: tensor model.norm.weight ends at byte <*>, the "
        f"file has <*>{DAMAGED}",
    ),
    "cut in the header": (
        weights(lambda b: b[:100]),
        f"{{src}}/model.safetensors is damaged: its header claims <*> bytes, the file has 100"
        f"{DAMAGED}",
    ),
    "cut below the length": (
        weights(lambda b: b[:7]),
        "{src}/model.safetensors is cut short: 7 bytes, not even a header",
    ),
    "no bytes": (
        weights(lambda b: b""),
        "{src}/model.safetensors is cut short: 0 bytes, not even a header",
    ),
    "longer than tensors": (
        weights(lambda b: b + b"xx"),
        "{src}/model.safetensors is damaged: its tensors end at byte <*>, the file has <*>"
        + DAMAGED,
    ),
    "header longer than the file": (
        weights(lambda b: struct.pack("<Q", 2**63) + b[8:]),
        f"{{src}}/model.safetensors is damaged: its header claims 9223372036854775808 bytes, the "
        f"file has <*>{DAMAGED}",
    ),
    "header shorter than it is": (
        weights(lambda b: struct.pack("<Q", 40) + b[8:]),
        f"{{src}}/model.safetensors is damaged: its header is not valid (<*>){DAMAGED}",
    ),
    "header is no JSON": (
        header(lambda _: b"not JSON"),
        f"{{src}}/model.safetensors is damaged: its header is not valid (<*>){DAMAGED}",
    ),
    "header is a list": (
        header(lambda _: [1]),
        f"{{src}}/model.safetensors is damaged: its header is not valid (<*>){DAMAGED}",
    ),
    "endless offset": (
        header(lambda _: b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'),
        f"{{src}}/model.safetensors is damaged: its header is not valid (<*>){DAMAGED}",
    ),
    "overlap": (
        header(overlap),
        f"{{src}}/model.safetensors is damaged: tensor model.norm.weight overlaps the one before "
        f"it (starts at <*>, the other ends at <*>){DAMAGED}",
    ),
    "shape and bytes": (
        header(other_shape),
        f"{{src}}/model.safetensors is damaged: tensor model.norm.weight of shape [31] and type "
        f"F32 cannot have 128 bytes{DAMAGED}",
    ),
    "negative shape": (
        header(negative_shape),
        f"{{src}}/model.safetensors is damaged: tensor model.norm.weight has shape [-32]{DAMAGED}",
    ),
    "weights are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "{src}/model.safetensors cannot be read: Is a directory",
    ),
    "shard is absent": (
        sharded(lambda f, places: (f / "model-2.safetensors").unlink()),
        "shard model-2.safetensors is named in model.safetensors.index.json but is not in {src}: "
        "the download is not complete; fetch the folder again",
    ),
    "shard lies elsewhere": (
        sharded(lambda f, places: places.update({UP: "../x.safetensors"})),
        "{src}/model.safetensors.index.json names shard '../x.safetensors': a shard must lie in "
        "the folder itself",
    ),
    "shard lacks a tensor": (
        sharded(lambda f, places: places.update({UP: "model-2.safetensors"})),
        f"the index names tensor {UP} in model-2.safetensors, which does not hold it: index and "
        "shards are of different versions; fetch them again together",
    ),
    "index is no JSON": (
        sharded(lambda f, places: (f / "model.safetensors.index.json").write_text("{")),
        "{src}/model.safetensors.index.json is no safetensors index: <*>",
    ),
    "index names nothing": (
        sharded(lambda f, places: places.clear()),
        "{src}/model.safetensors.index.json names no tensor",
    ),
    "index is absent": (
        lambda f: (
            sharded(lambda *_: None)(f),
            (f / "model.safetensors.index.json").unlink(),
        ),
        "{src} holds 2 safetensors files but neither model.safetensors nor "
        "model.safetensors.index.json: fetch the index file too",
    ),
    "shape against config": (
        edit_config(intermediate_size=40),
        "config and weights of {src} disagree: tensor model.layers.0.mlp.gate_proj.weight has "
        "shape [48, 32], the config asks for [40, 32]",
    ),
    "tensor is missing": (
        tensors(lambda t: {k: v for k, v in t.items() if k != UP}),
        f"config and weights of {{src}} disagree: the config asks for a tensor {UP} of shape "
        "[48, 32], which no file holds",
    ),
    "more blocks than weights": (
        edit_config(num_hidden_layers=5),
        "config and weights of {src} disagree: the config asks for a tensor "
        "model.layers.4.self_attn.q_proj.weight of shape [32, 32], which no file holds",
    ),
    "NaN": (
        tensors(lambda t: t[UP][3].fill_(float("nan")) is None),
        f"tensor {UP} in model.safetensors holds 32 NaN or infinite values: the checkpoint is "
        "damaged; fetch or export it again",
    ),
    "infinity": (
        tensors(lambda t: t["model.embed_tokens.weight"][0, :2].fill_(float("inf")) is None),
        "tensor model.embed_tokens.weight in model.safetensors holds 2 NaN or infinite values: "
        "the checkpoint is damaged; fetch or export it again",
    ),
    "float8": (
        tensors(lambda t: {k: v.to(torch.float8_e4m3fn) if k == UP else v for k, v in t.items()}),
        "source {src} holds no plain floating weights (types: F8_E4M3): quantised safetensors "
        "cannot be pruned; give the unquantised model, or a GGUF file",
    ),
    "GPTQ": (
        lambda f: (
            edit_config(quantization_config={"quant_method": "gptq"})(f),
            resave(f, lambda t: {k: v.int() if "proj" in k else v for k, v in t.items()}),
        ),
        "source {src} holds no plain floating weights (types: F32, I32): quantised safetensors "
        "cannot be pruned; give the unquantised model, or a GGUF file",
    ),
    "unknown to transformers": (
        edit_config(model_type="llama9"),
        "source {src} has model_type llama9, which the installed transformers does not know: try "
        "pip install -U transformers",
    ),
    "not described": (
        edit_config(model_type="gpt2"),
        "model type gpt2 is not described: its blocks look like transformer.h (4 x GPT2Block with "
        "ln_1, attn.c_attn, attn.c_proj, ln_2, mlp.c_fc, mlp.c_proj); described are <*>llama<*>; "
        "to add one, fill an entry in secateur/anatomy/families.py (blocks, denses, couplings)",
    ),
    "damaged output of ours": (
        edit_config(model_type="secateur_llama"),
        "config.json says model_type secateur_llama but its entry 'secateur' is damaged "
        "('secateur'): write the model again with secateur prune",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("token*")],
        "source {src} has no tokenizer that opens (<*>): put its tokenizer.json and "
        "tokenizer_config.json beside config.json",
    ),
    "tokenizer is no JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        "source {src} has no tokenizer that opens (<*>): put its tokenizer.json and "
        "tokenizer_config.json beside config.json",
    ),
    "tokenizer of another kind": (
        lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "X"}}'),
        "source {src} has no tokenizer that opens (<*>): put its tokenizer.json and "
        "tokenizer_config.json beside config.json",
    ),
}
#: Noticed only when weights or tokenizer are read, after the estimate was shown.
LATE = {
    "NaN", "infinity", "no tokenizer", "tokenizer is no JSON", "tokenizer of another kind",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folder(run: Run, folder: Path, out: Path, name: str) -> None:
    spoil, text = BAD_FOLDERS[name]
    spoil(folder)
    ended = run("prune", folder, "--out", out, *SMALL)
    ended.refused(text.replace("{src}", str(folder)), before_start=name not in LATE)
    assert nothing_written(out)


@pytest.mark.parametrize("command", ["inspect", "eval"])
@pytest.mark.parametrize("name", ["empty", "cut in the data", "GPTQ", "pickled", "not described"])
def test_bad_folder_in_other_commands(run: Run, folder: Path, command: str, name: str) -> None:
    spoil, text = BAD_FOLDERS[name]
    spoil(folder)
    run(command, folder).refused(text.replace("{src}", str(folder)))


@pytest.mark.parametrize("source", ["missing", "/no/such/model", "a/b/c", "~nobody-here/x"])
def test_missing_source(run: Run, out: Path, source: str) -> None:
    run("prune", source, "--out", out, *SMALL).refused(
        f"source {source} does not exist: give a folder with config.json and *.safetensors, a "
        ".gguf file, or a hub id such as org/name"
    )
    assert nothing_written(out)


def test_source_is_a_single_weight_file(run: Run, folder: Path, out: Path) -> None:
    source = folder / "model.safetensors"
    run("prune", source, "--out", out, *SMALL).refused(
        f"source {source} is a single weight file: name the folder that also holds its "
        f"config.json, for example {folder}"
    )


def test_source_is_another_file(run: Run, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "model.bin"
    source.touch()
    run("prune", source, "--out", out, *SMALL).refused(
        f"source {source} is a file of type .bin: allowed are a folder with config.json and "
        "*.safetensors, a .gguf file, or a hub id such as org/name"
    )


def test_hub_out_of_reach(run: Run, out: Path) -> None:
    run("prune", "org/model", "--out", out, *SMALL).refused(
        "source org/model is no folder here and the hub cannot be reached<*>: check the network, "
        "or give a local folder or GGUF file"
    )


def test_vocabulary_larger_than_the_embedding(run: Run, folder: Path, out: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(60)])
    tokenizer.save_pretrained(folder)
    ended = run("prune", folder, "--out", out, *SMALL)
    text = (
        "the tokenizer knows ids up to 318, the embedding has 300 rows: tokenizer and weights are "
        "of different models; put the right tokenizer files beside config.json"
    )
    ended.refused(text, before_start=False)
    assert nothing_written(out)
    run("eval", folder, "--length", "8", "--windows", "1").refused(text)


def test_model_that_was_pruned_already(
    run: Run, llama: Path, out: Path, tmp_path: Path, no_verification: None
) -> None:
    assert run("prune", llama, "--out", out, *SMALL).code == 0
    again = tmp_path / "again"
    run("prune", out, "--out", again, *SMALL).refused(
        f"source {out} has been pruned to different sizes in each block already: prune the "
        "original with a larger --remove instead"
    )
    assert nothing_written(again)


# ---- code in checkpoints ---------------------------------------------------------------------


@pytest.fixture
def trap(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the checkpoint that leaves a mark when it is run; the path of the mark."""
    mark = tmp_path / "mark"
    code = f"""
        from pathlib import Path
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        Path({str(mark)!r}).touch()
        class OwnConfig(LlamaConfig):
            model_type = "own"
        class OwnModel(LlamaForCausalLM):
            config_class = OwnConfig
        class OwnTokenizer(PreTrainedTokenizerFast):
            pass
    """
    for name in ("own", "modeling_secateur"):
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    return mark


AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.mark.parametrize("command", ["prune", "plan", "inspect", "eval"])
def test_code_of_the_checkpoint_is_not_run(
    run: Run, folder: Path, out: Path, trap: Path, command: str
) -> None:
    edit_config(model_type="own", auto_map=AUTO_MAP)(folder)
    arguments = {"prune": ["--out", out, *SMALL], "plan": SMALL}.get(command, [])
    run(command, folder, *arguments).refused(
        f"source {folder} (model_type own) needs Python code of its own: read that code, and if "
        "you trust it repeat the command with --trust-remote-code"
    )
    assert not trap.exists()


def test_code_is_run_when_it_is_trusted(run: Run, folder: Path, trap: Path) -> None:
    edit_config(model_type="own", auto_map=AUTO_MAP)(folder)
    run("inspect", folder, "--trust-remote-code").refused(
        "model type own is not described: its blocks look like model.layers (4 x "
        "LlamaDecoderLayer with <*>"
    )
    assert trap.exists()


def test_code_beside_a_known_type_is_not_run(run: Run, folder: Path, trap: Path) -> None:
    edit_config(auto_map=AUTO_MAP)(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    path.write_text(json.dumps(settings))
    ended = run("eval", folder, "--length", "8", "--windows", "1", "--tokens", "0")
    assert ended.code == 0
    assert not trap.exists()


def test_tokenizer_that_needs_code(run: Run, folder: Path, trap: Path) -> None:
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = ["eval", folder, "--length", "8", "--windows", "1", "--tokens", "0"]
    run(*arguments).refused(
        f"source {folder} has a tokenizer that needs Python code of its own: read that code, and "
        "if you trust it repeat the command with --trust-remote-code"
    )
    assert not trap.exists()
    assert run(*arguments, "--trust-remote-code").code == 0
    assert trap.exists()


def test_modelling_file_that_is_not_ours(
    run: Run, llama: Path, out: Path, trap: Path, no_verification: None
) -> None:
    assert run("prune", llama, "--out", out, *SMALL).code == 0
    shutil.copyfile(trap.parent / "model" / "own.py", out / "modeling_secateur.py")
    ended = run("eval", out, "--length", "8", "--windows", "1", "--tokens", "2")
    assert ended.code == 0
    assert run("inspect", out).code == 0
    assert not trap.exists()


# ---- GGUF ------------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", tiny.make_model("llama-gqa-tied", layers=2))


def test_file_that_does_not_begin_with_gguf(run: Run, gguf: Path, out: Path) -> None:
    gguf.write_bytes(b"JUNK" + gguf.read_bytes()[4:])
    run("prune", gguf, "--out", out, *SMALL).refused(
        f"{gguf} is no GGUF file: it does not begin with the letters GGUF"
    )


@pytest.mark.parametrize("left", [0.999, 0.5, 0.01, 6e-5])
def test_truncated_gguf(run: Run, gguf: Path, out: Path, left: float) -> None:
    content = gguf.read_bytes()
    gguf.write_bytes(content[: int(left * len(content))])
    run("prune", gguf, "--out", out, *SMALL).refused(f"{gguf} is truncated <*>: fetch it again")
    assert nothing_written(out)


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        ("hovercraft", "{src} is a GGUF file of a type that transformers cannot open "
         "(<*>hovercraft<*>): give the Hugging Face folder of the model instead"),
        ("gpt2", "model type gpt2 is not described: its blocks look like <*>"),
    ],
)  # fmt: skip
def test_gguf_of_another_kind(
    run: Run, tmp_path: Path, out: Path, architecture: str, text: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny.make_model("llama-gqa-tied", layers=1), architecture)
    run("prune", path, "--out", out, *SMALL).refused(text.replace("{src}", str(path)))
    assert nothing_written(out)


def test_infinity_in_gguf(run: Run, tmp_path: Path, out: Path) -> None:
    model = tiny.make_model("llama-gqa-tied")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
    path = write_gguf(tmp_path / "m.gguf", model)
    run("prune", path, "--out", out, *SMALL).refused(
        "tensor blk.2.ffn_up.weight in m.gguf holds 1 NaN or infinite values: the checkpoint is "
        "damaged; fetch or export it again",
        before_start=False,
    )
    assert nothing_written(out)


# ---- targets and options ---------------------------------------------------------------------

TARGETS: dict[str, tuple[tuple[str, ...], str]] = {
    "zero": (("--remove", "0%"), "remove is '0%': the share must be above 0% and below 100%"),
    "negative": (("--remove", "-5%"), "remove is '-5%': the share must be above 0% and below 100%"),
    "all": (("--remove", "100%"), "remove is '100%': the share must be above 0% and below 100%"),
    "more than can go": (
        ("--remove", "95%"),
        "--remove 95% would remove 38,578 parameters, but the decoder blocks hold only 30,976 of "
        "40,608: ask for clearly less than 76%",
    ),
    "no sign": (
        ("--remove", "20"),
        "remove is '20': is it 20% or 20 parameters? Write --remove 20% for a share, or --params "
        "100M for what is to be left",
    ),
    "word": (
        ("--remove", "twenty"),
        "remove is 'twenty': write a share with a percent sign, such as 20%",
    ),
    "two": (
        ("--remove", "20%", "--params", "1K"),
        "give exactly one of --remove, --params, --size and --sparsity, not --remove and --params",
    ),
    "none": ((), "give exactly one of --remove, --params, --size and --sparsity, not none of them"),
    "decoder without share": (
        ("--params", "30K", "--of", "decoder"),
        "--of decoder goes with --remove",
    ),
    "share of what": (
        ("--remove", "5%", "--of", "head"),
        "recipe field of is 'head': Input should be 'model' or 'decoder'",
    ),
    "more parameters": (
        ("--params", "7B"),
        "--params 7B removes nothing: the model has 40,608 parameters (162,432 bytes at 4 bytes "
        "each)",
    ),
    "parameters without unit": (
        ("--params", "7Q"),
        "params is '7Q': write a number with one of the units K, M, B, T, such as 5.4B",
    ),
    "no parameters": (("--params", "0M"), "params is '0M': it must be above 0"),
    "larger": (
        ("--size", "1GB"),
        "--size 1GB removes nothing: the model has 40,608 parameters (162,432 bytes at 4 bytes "
        "each)",
    ),
    "size without unit": (
        ("--size", "100"),
        "size is '100': write a number with one of the units B, KB, MB, GB, TB, KIB, MIB, GIB, "
        "TIB, such as 300MB",
    ),
    "below embeddings": (
        ("--size", "1KB", "--dtype", "float16"),
        "--size 1KB would remove 40,108 parameters, but the decoder blocks hold only 30,976 of "
        "40,608: ask for clearly less than 76%",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_bad_target(run: Run, llama: Path, out: Path, name: str) -> None:
    arguments, text = TARGETS[name]
    run("prune", llama, "--out", out, *arguments).refused(text)
    run("plan", llama, *arguments).refused(text)
    assert nothing_written(out)


def test_share_that_blocks_cannot_lose(run: Run, llama: Path, out: Path) -> None:
    spared = ("--set", "exempt_first=2", "--set", "exempt_last=1")
    ended = run("prune", llama, "--out", out, "--remove", "60%", *SMALL[2:], *spared)
    ended.refused(
        "<*> parameters should leave <*> blocks, which can lose at most <*>: ask for less, <*>",
        before_start=False,
    )
    assert nothing_written(out)  # else the next command, with less, would be refused


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "method": (
        ("--method", "magic"),
        "method magic is not known: choose one of <*>comp, <*>obs<*>",
    ),
    "setting": (
        ("--set", "speed=3"),
        "option of method obs speed is not known: allowed are cap, choice_damping, <*>",
    ),
    "value of a setting": (
        ("--set", "order=size"),
        "option of method comp order is 'size': Input should be 'condition', <*>",
    ),
    "setting without value": (
        ("--set", "order"),
        "--set order is not name=value, such as --set order=energy",
    ),
    "setting that is no YAML": (
        ("--set", "cap=["),
        "--set cap=[: '[' cannot be read as YAML",
    ),
    "setting that is no date": (
        ("--set", "cap=2020-13-45"),
        "--set cap=2020-13-45: '2020-13-45' cannot be read as YAML",
    ),
    "layers": (
        ("--layers", "some"),
        "option of method obs layers is 'some': <*>, or Input should be 'auto'",
    ),
    "negative layers": (
        ("--layers", "-1"),
        "option of method obs layers is '-1': Input should be greater than or equal to 0, or "
        "Input should be 'auto'",
    ),
    "strange digit": (
        ("--layers", "²"),
        "option of method obs layers is '²': <*>, or Input should be 'auto'",
    ),
    "too many layers": (
        ("--layers", "3"),
        "layers is 3, but the share that was asked for is worth at most 0 blocks: lower --layers "
        "or raise --remove",
    ),
    "seed": (("--seed", "-1"), "recipe field seed is -1: Input should be greater than or equal "
             "to 0"),
    "large seed": (("--seed", "4294967296"), "recipe field seed is 4294967296: Input should be "
                   "less than 4294967296"),
    "type": (("--dtype", "int4"), "recipe field dtype is 'int4': Input should be 'auto', "
             "'float32', 'float16' or 'bfloat16'"),
    "device": (("--device", "abacus"), "device is 'abacus': choose cpu, cuda, cuda:1 or mps"),
    "device without memory": (("--device", "meta"), "device is 'meta': choose cpu, cuda, cuda:1 "
                              "or mps"),
    "second CPU": (("--device", "cpu:1"), "device is 'cpu:1', but the last one here is cpu"),
    "memory without unit": (
        ("--max-memory", "4"),
        "max-memory is '4': write a unit too, such as 4GB or 900MiB",
    ),
    "memory in what": (
        ("--max-memory", "4XB"),
        "max-memory is '4XB': write a number with one of the units B, KB, MB, GB, TB, KIB, MIB, "
        "GIB, TIB, such as 4GB",
    ),
    "few samples": (("--samples", "1"), "recipe field calibration.samples is 1: Input should be "
                    "greater than or equal to 2"),
    "short": (("--length", "7"), "recipe field calibration.length is 7: Input should be greater "
              "than or equal to 8"),
    "unknown option": (("--magic",), "No such option: --magic<*>; see secateur --help"),
    "no number": (("--seed", "x"), "Invalid value for '--seed': <*>; see secateur --help"),
}  # fmt: skip
AFTER_ESTIMATE = {"memory without unit", "memory in what"}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(run: Run, llama: Path, out: Path, name: str) -> None:
    arguments, text = OPTIONS[name]
    ended = run("prune", llama, "--out", out, "--remove", "5%", *arguments)
    ended.refused(text, before_start=name not in AFTER_ESTIMATE)
    assert nothing_written(out)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_device_that_is_not_here(
    run: Run, llama: Path, out: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    text = f"device is {device!r}, but torch sees no GPU here: use --device cpu"
    run("prune", llama, "--out", out, *SMALL, "--device", device).refused(text)
    run("eval", llama, "--device", device).refused(text)
    assert nothing_written(out)


def test_gpu_with_a_number_too_high(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    run("plan", llama, *SMALL, "--device", "cuda:2").refused(
        "device is 'cuda:2', but the last one here is cuda:1"
    )


def test_more_memory_than_allowed(run: Run, llama: Path, out: Path) -> None:
    ended = run("prune", llama, "--out", out, *SMALL, "--max-memory", "10MiB")
    ended.refused(
        "the run is estimated at <*> MiB, --max-memory allows 10 MiB; the largest part is program "
        "(<*> MiB): lower --samples or --length, or raise --max-memory",
        before_start=False,
    )
    assert nothing_written(out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--length", "1"), "Invalid value for '--length': <*>2<*>"),
        (("--windows", "-1"), "Invalid value for '--windows': <*>0<*>"),
        (("--tokens", "-1"), "Invalid value for '--tokens': <*>0<*>"),
        (("--text", "nothing"), "calibration nothing is neither a file nor a known name: give a "
         "text or JSONL file, or one of builtin, c4, wikitext2, ptb, alpaca"),
    ],
)  # fmt: skip
def test_bad_evaluation(run: Run, llama: Path, arguments: tuple[str, ...], text: str) -> None:
    run("eval", llama, *arguments).refused(text)


def test_no_output_named(run: Run, llama: Path) -> None:
    run("prune", llama, "--remove", "5%").refused("<*>--out<*>; see secateur --help")


def test_no_arguments_show_help(run: Run) -> None:
    ended = run()
    assert ended.code == 0
    assert "prune" in ended.out


# ---- recipes ---------------------------------------------------------------------------------

RECIPES: dict[str, tuple[str, str]] = {
    "unknown field": ("remove: 5%\nspeed: 2", "recipe field speed is not known: allowed are "
                      "remove, params, size, sparsity, of, method, options, then, then_options, "
                      "calibration, structure, layout, round_to, seed, dtype"),
    "unknown calibration": (
        "remove: 5%\ncalibration: {windows: 2}",
        "recipe field calibration.windows is not known: allowed are source, samples, length, "
        "text_field, data_dir",
    ),
    "wrong option": ("remove: 5%\noptions: {cap: 2}", "option of method obs cap is 2: Input "
                     "should be less than 1"),
    "no YAML": ("remove: [", "recipe {file} cannot be read as YAML: <*>"),
    "list": ("- remove: 5%", "recipe {file} does not consist of fields: write one a line, such as "
             "'remove: 20%'"),
    "empty": ("", "recipe {file} does not consist of fields: write one a line, such as "
              "'remove: 20%'"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipe(run: Run, llama: Path, out: Path, tmp_path: Path, name: str) -> None:
    content, text = RECIPES[name]
    file = tmp_path / "r.yaml"
    file.write_text(content)
    ended = run("prune", llama, "--out", out, "--recipe", file)
    ended.refused(text.replace("{file}", str(file)))
    assert nothing_written(out)


def test_missing_recipe(run: Run, llama: Path, out: Path) -> None:
    run("prune", llama, "--out", out, "--recipe", "no.yaml").refused(
        "recipe no.yaml does not exist"
    )


# ---- calibration -----------------------------------------------------------------------------

TEXTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "calibration file {file} is empty"),
    "blank": ("a.jsonl", b"\n \n", "calibration file {file} is empty"),
    "short": (
        "a.txt",
        b"Only a few words, which make up 40 bytes",
        "calibration text (a.txt) has 40 tokens, enough for 2 windows of 16; asked were 4: give "
        "more text, or lower --samples or --length",
    ),
    "latin-1": (
        "a.txt",
        b"Gr\xfc\xdfe",
        "calibration file {file} is not UTF-8 (byte 2): convert it, for example with iconv -f "
        "latin1 -t utf-8 a.txt",
    ),
    "no such field": (
        "a.jsonl",
        b'{"text": "x"}\n{"body": "x", "id": 1}',
        "calibration file {file} line 2 has no text field 'text' (it has: body, id): name the "
        "right one with --text-field",
    ),
    "field is a number": (
        "a.jsonl",
        b'{"text": 1}',
        "calibration file {file} line 1 has no text field 'text' (it has: text): name the right "
        "one with --text-field",
    ),
    "row is a list": (
        "a.jsonl",
        b'["text"]',
        "calibration file {file} line 1 has no text field 'text' (it has: list): name the right "
        "one with --text-field",
    ),
    "bad line": (
        "a.jsonl",
        b'{"text": "x"}\n\n{"text": ',
        "calibration file {file} line 3 is not JSON (<*>): a .jsonl file has one object a line",
    ),
    "deep line": (
        "a.jsonl",
        b"[" * 100_000,
        "calibration file {file} line 1 is not JSON (<*>): a .jsonl file has one object a line",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_bad_calibration_file(run: Run, llama: Path, out: Path, tmp_path: Path, name: str) -> None:
    file_name, content, text = TEXTS[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    ended = run("prune", llama, "--out", out, *SMALL, "--calibration", file)
    ended.refused(text.replace("{file}", str(file)), before_start=False)
    assert nothing_written(out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--calibration", "wikipedia"), "calibration wikipedia is neither a file nor a known "
         "name: give a text or JSONL file, or one of builtin, c4, wikitext2, ptb, alpaca"),
        (("--calibration", "c4", "--data-dir", "here"), "calibration c4 is not in here: expected "
         "c4/*.jsonl there; leave out --data-dir to fetch it from the hub"),
        (("--length", "129"), "length is 129, the model's positions end at 128: lower --length"),
        (("--samples", "100000"), "calibration text (built-in passages) has <*> tokens, enough for "
         "<*> windows of 16; asked were 100000: give more text, or lower --samples or --length"),
    ],
)  # fmt: skip
def test_bad_calibration(
    run: Run, llama: Path, out: Path, arguments: tuple[str, ...], text: str
) -> None:
    ended = run("prune", llama, "--out", out, *SMALL, *arguments)
    ended.refused(text, before_start=False)
    assert nothing_written(out)


# ---- outputs ---------------------------------------------------------------------------------


def test_output_is_not_empty(run: Run, llama: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine").write_text("precious")
    run("prune", llama, "--out", out, *SMALL).refused(
        f"output {out} exists and is not empty: choose another --out, or remove it first"
    )
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert not work_folder(out).exists()


def test_output_is_a_file(run: Run, llama: Path, out: Path) -> None:
    out.write_text("precious")
    run("prune", llama, "--out", out, *SMALL).refused(
        f"output {out} is a file: give a folder that does not exist yet"
    )
    assert out.read_text() == "precious"


@pytest.mark.parametrize("inside", ["", "pruned", "a/b", "../model"])
def test_output_is_inside_the_source(run: Run, folder: Path, inside: str) -> None:
    before = sorted(folder.iterdir())
    target = (folder / inside).resolve()
    run("prune", folder, "--out", folder / inside, *SMALL).refused(
        f"output {target} lies inside the source {folder}: choose a folder elsewhere"
    )
    assert sorted(folder.iterdir()) == before


def test_output_may_lie_beside_a_gguf_file(run: Run, tmp_path: Path, no_verification: None) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny.make_model("llama-gqa-tied"))
    assert run("prune", path, "--out", tmp_path / "pruned", *SMALL).code == 0
    run("prune", path, "--out", path, *SMALL).refused(
        f"output {path} exists: choose another --out, or remove it first"
    )


@pytest.mark.parametrize("source", ["out.partial", "out.partial/model"])
def test_source_is_where_the_work_would_be(run: Run, llama: Path, out: Path, source: str) -> None:
    work = work_folder(out)
    folder = shutil.copytree(llama, out.parent / source)
    run("prune", folder, "--out", out, *SMALL).refused(
        f"output {out} would be prepared in {work}, which holds the source: choose another --out"
    )
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["mine", "model/mine"])
def test_a_folder_of_the_user_is_in_the_way(run: Run, llama: Path, out: Path, name: str) -> None:
    precious = work_folder(out) / name
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    run("prune", llama, "--out", out, *SMALL).refused(
        f"{work_folder(out)} is in the way, and is no unfinished work of secateur: move it away, "
        "or choose another --out",
        before_start=False,
    )
    assert precious.read_text() == "precious"
    assert not out.exists()


def test_a_folder_named_like_our_waste_stays(
    run: Run, llama: Path, out: Path, no_verification: None
) -> None:
    precious = out.with_name("out.partial.done") / "mine"
    precious.parent.mkdir()
    precious.write_text("precious")
    assert run("prune", llama, "--out", out, *SMALL).code == 0
    assert precious.read_text() == "precious"
    assert not work_folder(out).exists()


def test_output_without_permission(
    run: Run, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulated, since nothing is forbidden to root.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != out.parent)
    for target in (out, out / "a" / "b"):
        run("prune", llama, "--out", target, *SMALL).refused(
            f"output {target} cannot be written: no permission to write in {out.parent}"
        )
    assert nothing_written(out)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_output_really_without_permission(run: Run, llama: Path, tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o500)
    run("prune", llama, "--out", parent / "out", *SMALL).refused(
        f"output {parent / 'out'} cannot be written: no permission to write in {parent}"
    )


def test_work_folder_that_cannot_be_made(run: Run, llama: Path, out: Path) -> None:
    work_folder(out).write_text("precious")
    run("prune", llama, "--out", out, *SMALL).refused(
        f"output {out} cannot be written: <*>", before_start=False
    )
    assert work_folder(out).read_text() == "precious"


# ---- interruptions, full disks, two at once --------------------------------------------------


@contextmanager
def at_second_block(happens: Callable[[], Any]) -> Iterator[None]:
    """Let something happen before the second block is written."""
    from secateur.outputs import hf

    original = hf.write_block

    def write_block(*args: Any, **kwargs: Any) -> str:
        if kwargs["number"] == 1:
            happens()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "write_block", write_block)
        yield


@pytest.mark.usefixtures("no_verification")
class TestInterrupted:
    """A run that ended in the middle, and what may follow it."""

    LINE = "error: interrupted; finished blocks are kept, the same command continues from there"

    @pytest.fixture
    def interrupted(self, run: Run, llama: Path, out: Path) -> Path:
        """Ctrl-C, as the kernel sends it, at the second block; where the work was left."""
        with at_second_block(lambda: os.kill(os.getpid(), signal.SIGINT)):
            ended = run("prune", llama, "--out", out, *SMALL)
        assert ended.code == 130
        assert ended.err[-1] == self.LINE
        assert not out.exists()
        return work_folder(out)

    def test_the_same_command_continues(
        self, run: Run, llama: Path, out: Path, tmp_path: Path, interrupted: Path
    ) -> None:
        ended = run("prune", llama, "--out", out, *SMALL)
        assert ended.code == 0
        assert "continuing: 1 of 4 blocks are finished" in ended.err
        assert not interrupted.exists()
        assert run("prune", llama, "--out", tmp_path / "at once", *SMALL).code == 0
        assert bytes_of(out) == bytes_of(tmp_path / "at once")

    @pytest.mark.parametrize(
        ("changed", "what"),
        [
            (("--seed", "1"), "calibration, recipe"),
            (("--remove", "4%"), "recipe"),
            (("--set", "tune=false"), "recipe"),
        ],
    )
    def test_another_recipe_is_refused(
        self, run: Run, llama: Path, out: Path, interrupted: Path,
        changed: tuple[str, ...], what: str,
    ) -> None:  # fmt: skip
        before = bytes_of(interrupted / "model")
        run("prune", llama, "--out", out, *SMALL, *changed).refused(
            f"{interrupted} holds unfinished work of another run (different: {what}): repeat that "
            f"command, choose another --out, or remove the folder with rm -r {interrupted}",
            before_start=False,
        )
        assert bytes_of(interrupted / "model") == before

    def test_another_model_is_refused(
        self, run: Run, folder: Path, out: Path, interrupted: Path
    ) -> None:
        os.utime(folder / "model.safetensors", ns=(1, 1))
        run("prune", folder, "--out", out, *SMALL).refused(
            f"{interrupted} holds unfinished work of another run (different: source_files): "
            f"repeat that command, choose another --out, or remove the folder with rm -r "
            f"{interrupted}",
            before_start=False,
        )

    def test_a_torn_line_of_the_journal_is_dropped(
        self, run: Run, llama: Path, out: Path, interrupted: Path
    ) -> None:
        with (interrupted / "journal.jsonl").open("ab") as journal:
            journal.write(b'{"kind": "block", "value": {"sou')
        ended = run("prune", llama, "--out", out, *SMALL)
        assert ended.code == 0
        assert "continuing: 1 of 4 blocks are finished" in ended.err

    def test_two_at_once(self, run: Run, llama: Path, out: Path, interrupted: Path) -> None:
        with (interrupted / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run("prune", llama, "--out", out, *SMALL).refused(
                f"output {out} is being written by another process: wait for it, or choose "
                "another --out",
                before_start=False,
            )
        assert run("prune", llama, "--out", out, *SMALL).code == 0


def test_a_run_that_finished_nothing_is_no_obstacle(
    run: Run, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch, no_verification: None
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.engine.Engine.choose_layers", stop)
        assert run("prune", llama, "--out", out, *SMALL).code == 130
    assert run("prune", llama, "--out", out, *SMALL, "--seed", "1").code == 0


def test_source_that_changes_under_the_run(run: Run, folder: Path, out: Path) -> None:
    with at_second_block(lambda: os.utime(folder / "model.safetensors", ns=(1, 1))):
        ended = run("prune", folder, "--out", out, *SMALL)
    ended.refused(
        f"source {folder} changed while it was read: the finished blocks are of no use; remove "
        f"{work_folder(out)} and start again",
        before_start=False,
    )


FULL = "the disk is full{where}; finished blocks are kept: free some space and repeat the same "


def test_full_disk(
    run: Run, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch, no_verification: None
) -> None:
    original, left = os.fsync, [12]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    monkeypatch.setattr("os.fsync", fsync)
    run("prune", llama, "--out", out, *SMALL).refused(
        FULL.format(where="") + "command", before_start=False
    )
    assert not out.exists()
    ended = run("prune", llama, "--out", out, *SMALL)
    assert ended.code == 0
    assert any(line.startswith("continuing: ") for line in ended.err)


def test_full_disk_as_safetensors_tells_it(run: Run, llama: Path, out: Path) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def fails(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fails)
        ended = run("prune", llama, "--out", out, *SMALL)
    shard = work_folder(out) / "model" / "model-00001-of-00005.safetensors"
    ended.refused(FULL.format(where=f" while writing {shard}") + "command", before_start=False)
    assert list(shard.parent.iterdir()) == []


REAL_DISK = """
import os, subprocess, sys
from secateur import cli, pruning
from secateur.outputs.verify import Verification

disk, source = sys.argv[1:]
pruning.verify_folder = lambda *_, **__: Verification(0.0, 1.0, "NotOpened", 0)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72k", "tmpfs", disk], check=True)
for _ in range(2):
    sys.argv = ["secateur", "prune", source, "--out", f"{disk}/out", *%r]
    try:
        cli.main()
    except SystemExit as end:
        print("code", end.code, sorted(os.listdir(disk)), flush=True)
    subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
"""


def test_disk_that_is_really_full(llama: Path, tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    own_mounts = [unshare or "", "--map-root-user", "--mount"]
    probe = [*own_mounts, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if unshare is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = subprocess.run(
        [*own_mounts, sys.executable, "-c", REAL_DISK % (SMALL,), str(disk), str(llama)],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    assert re.match(r"error: the disk is full( while writing \S+)?; finished blocks", errors[0])
    assert "Traceback" not in ended.stderr
    codes = [line for line in ended.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 2 ['out.partial']", "code None ['out']"], ended.stderr
    assert "continuing: " in ended.stderr


# ---- as the shell sees it --------------------------------------------------------------------


def test_real_process(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "secateur", "prune", "missing", "--out", "out", "--remove", "5%"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        "error: source missing does not exist: give a folder with config.json and *.safetensors, "
        "a .gguf file, or a hub id such as org/name\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_bug_of_ours_shows_its_traceback(
    run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("secateur.pipeline.estimate", broken)
    monkeypatch.setattr(sys, "argv", ["secateur", "plan", str(llama), *SMALL])
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()
