"""Healing as a user asks for it: the loss falls, the folder keeps its form, a kill is no loss."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from commands import secateur
from folders import bytes_of
from test_exporting import write_source

import secateur as library
from secateur.anatomy import describe
from secateur.calibration import Text
from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.writer import work_folder
from secateur.errors import (
    CalibrationError,
    MemoryLimitError,
    OutputError,
    RecipeError,
    SecateurError,
    SourceError,
)
from secateur.evaluation import load_whole
from secateur.modules import MODELING_FILE
from secateur.outputs.hf import INDEX, PLAN_TENSORS, RECORD
from secateur.pruning import prune
from secateur.recipe import make_recipe
from secateur.recovery import HealResult, heal, lora, make_settings
from secateur.recovery.groupwise import Groupwise
from secateur.recovery.linears import open_linears, stored_name
from secateur.recovery.source import check_fits, open_pruned
from secateur.recovery.text import healing_windows, windows_of_step
from secateur.recovery.training import Training, next_token_loss, share_of_lr
from secateur.recovery.writing import write_weights

QUICK: dict[str, Any] = {"data": "builtin", "steps": 12, "length": 16, "batch": 2, "lr": 1e-2}
WISHES = ("--data", "builtin", "--steps", "2", "--length", "16", "--batch", "2")
COMP = {"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8}


def pruned(source: Path, out: Path, **fields: Any) -> Path:
    """A pruned folder. Widths are multiples of 32 unless asked otherwise."""
    wishes = {
        "remove": "20%", "of": "decoder", "method": "magnitude-sp", "round_to": 32,
        "calibration": {"samples": 2, "length": 16}, "options": {"groups": "keep"}, **fields,
    }  # fmt: skip
    prune(source, out, make_recipe(**{k: v for k, v in wishes.items() if v is not None}),
          verify=False)  # fmt: skip
    return out


@dataclass(frozen=True)
class Models:
    """One model in every form that can be healed, and two healed ones. Do not change them."""

    dense: Path
    per_layer: Path
    lora: HealResult
    groups: HealResult


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("healing")
    dense = write_source(root / "dense")
    folder = pruned(dense, root / "per-layer", method="comp", options=COMP)
    return Models(
        dense,
        folder,
        heal(folder, root / "lora", make_settings(**QUICK)),
        heal(folder, root / "groups", make_settings(method="groupwise", rank=4, **QUICK)),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


TOKENS = torch.arange(48).remainder(251).view(2, 24) + 3


# ---- what comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "groups"])
def test_the_loss_falls_and_a_fresh_process_agrees(models: Models, method: str) -> None:
    healed: HealResult = getattr(models, method)
    assert healed.after < healed.before
    assert len(healed.losses) == QUICK["steps"]
    assert healed.losses[-1] < healed.losses[0]
    assert healed.verification is not None
    assert healed.verification.max_difference < 1e-4
    assert healed.verification.model_class == "SecateurLlamaForCausalLM"


@pytest.mark.parametrize("method", ["lora", "groups"])
def test_layout_plan_and_code_are_those_of_the_pruned_folder(models: Models, method: str) -> None:
    old, new = models.per_layer, getattr(models, method).out
    names = {path.name for path in old.iterdir()} - {"report.html"}
    assert {path.name for path in new.iterdir()} == names
    changed = {RECORD, "README.md", *(path.name for path in old.glob("model-*"))}
    for name in names - changed:
        assert (new / name).read_bytes() == (old / name).read_bytes(), name
    assert {PLAN_TENSORS, MODELING_FILE, INDEX, "config.json"} <= names - changed
    before, after = weights(old), weights(new)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    anatomy = open_pruned(old).stream.anatomy
    denses = {f"model.layers.{i}.{path}.weight" for i in range(3) for path in anatomy.denses}
    assert moved == denses  # norms, embedding and head stay


@pytest.mark.parametrize("method", ["lora", "groups"])
def test_record_and_card_say_that_it_was_trained(models: Models, method: str) -> None:
    healed: HealResult = getattr(models, method)
    record = json.loads((healed.out / RECORD).read_text())
    assert record == healed.record
    entry = record["healed"]
    assert entry["steps"] == 12
    assert entry["text"]["origin"] == "built-in passages"
    assert entry["held_out_loss"] == {"before": healed.before, "after": healed.after}
    assert ("peft" in entry["versions"]) == (method == "lora")
    old = json.loads((models.per_layer / RECORD).read_text())
    assert {k: v for k, v in record.items() if k not in ("healed", "plan")} == {
        k: v for k, v in old.items() if k != "plan"
    }
    card = (healed.out / "README.md").read_text()
    assert "then **healed, which is training**" in card
    assert "without" not in card.split("| | before")[0]
    assert "| steps | 12 of 2 windows, Adam, learning rate up to 0.01, seed 0 |" in card
    assert f"SHA-256 `{entry['text']['sha256']}`" in card
    assert ("--type q4_1" in card) == (method == "groups")
    header = yaml.safe_load(card.split("---")[1])
    assert {"healed", "pruned", entry["settings"]["method"]} <= set(header["tags"])


def test_verify_takes_healed_weights_for_the_plans_new_ones(models: Models) -> None:
    """Cut again by the plan, the original is the pruned model; the healed weights go in place."""
    said = secateur("verify", models.lora.out, "--against", models.dense).fine()
    assert "largest logit difference" in said


def test_what_a_link_leads_to_is_not_copied(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.per_layer, tmp_path / "model")
    secret, link = tmp_path / "secret", folder / "LICENSE"
    secret.write_text("precious")
    link.symlink_to(secret)
    with pytest.raises(OutputError) as caught:
        heal(folder, tmp_path / "out", make_settings(**{**QUICK, "steps": 1}), verify=False)
    assert str(caught.value) == (
        f"{link} is a link to {secret}, which would be copied into the output: put a copy of the "
        "file in its place if it belongs to the model, or remove the link"
    )
    assert not (tmp_path / "out").exists()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != secret]
    assert not any(b"precious" in path.read_bytes() for path in written if path != link)


def test_a_healed_model_is_no_source_of_training_free_ones(models: Models, tmp_path: Path) -> None:
    uniform = pruned(models.dense, tmp_path / "uniform", layout="uniform")
    settings = make_settings(**{**QUICK, "steps": 2})
    healed = heal(uniform, tmp_path / "healed", settings, verify=False).out
    assert "secateur" not in json.loads((healed / "config.json").read_text())  # the stock class
    how = "lora, 2 steps, 64 tokens of built-in passages"
    out = tmp_path / "out"
    secateur("prune", healed, "--remove", "20%", "--out", out).refused_at_once(
        f"source {healed} was healed, which is training ({how}): prune the original, and heal the "
        "result"
    )
    assert how in secateur("inspect", healed).fine()
    said = secateur("eval", healed, "--length", "16", "--windows", "1", "--tokens", "0").fine()
    assert f"healed, so not a training-free model: {how}\n" in said


def test_the_same_command_gives_the_same_bytes(models: Models, tmp_path: Path) -> None:
    settings = make_settings(method="groupwise", rank=4, **QUICK)
    again = heal(models.per_layer, tmp_path / "again", settings, verify=False)
    files, first = bytes_of(again.out), bytes_of(models.groups.out)
    assert files == first
    other = make_settings(method="groupwise", rank=4, seed=1, **QUICK)
    assert bytes_of(heal(models.per_layer, tmp_path / "1", other, verify=False).out) != first


# ---- adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-biases", "opt", "mamba", "mamba2"])
@pytest.mark.parametrize("kind", [lora.Lora, Groupwise])
def test_merged_weights_compute_what_the_adapters_do(kind: Any, name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_model(tmp_path / "model", name, layers=2))
    model = load_whole(checkpoint)
    anatomy = describe(model)
    method = "lora" if kind is lora.Lora else "groupwise"
    adapters = kind(model, anatomy, make_settings(data="builtin", method=method, rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    wanted = logits(model, TOKENS)
    fresh = load_whole(checkpoint)
    assert not torch.allclose(logits(fresh, TOKENS), wanted, atol=1e-2)
    for layer in adapters.names:
        stored = stored_name(anatomy, layer)
        with torch.no_grad():
            weight = fresh.get_parameter(stored)
            weight.copy_(adapters.merged(layer, checkpoint.read(stored)))
    # Groups round their zero points to float16 when they are written.
    assert torch.allclose(logits(fresh, TOKENS), wanted, atol=1e-4 if method == "lora" else 2e-2)


def test_layers_that_read_through_an_index_are_trained_too(models: Models, tmp_path: Path) -> None:
    folder = pruned(
        models.dense, tmp_path / "columns", method="comp", options=COMP, structure="inputs",
        round_to=None,
    )  # fmt: skip
    found = open_linears(load_whole(open_checkpoint(folder)), open_pruned(folder).stream.anatomy)
    assert any(name.endswith(".linear") for name in found)
    assert len(found) == 3 * 7
    healed = heal(folder, tmp_path / "healed", make_settings(**QUICK))
    assert healed.after < healed.before


def test_layers_that_are_not_called_keep_their_weights(tmp_path: Path) -> None:
    """dt_proj of Mamba is read past its module."""
    model = load_whole(open_checkpoint(tiny.write_model(tmp_path / "model", "mamba", layers=2)))
    found = open_linears(model, describe(model))
    assert sorted(found) == [
        f"{i}.mixer.{path}" for i in range(2) for path in ("in_proj", "out_proj", "x_proj")
    ]


def test_bfloat16_leaves_adapters_in_float32(models: Models, tmp_path: Path) -> None:
    for method in ("lora", "groupwise"):
        settings = make_settings(method=method, compute="bfloat16", **QUICK)
        healed = heal(models.per_layer, tmp_path / method, settings, verify=False)
        assert healed.after < healed.before
        # What is written does not come from the rounded weights that the model ran with.
        assert {t.dtype for t in weights(healed.out).values()} == {torch.float32}


def test_the_written_type_can_be_chosen(models: Models, tmp_path: Path) -> None:
    settings = make_settings(**{**QUICK, "dtype": "bfloat16", "steps": 1})
    healed = heal(models.per_layer, tmp_path / "out", settings).out
    assert {t.dtype for t in weights(healed).values()} == {torch.bfloat16}
    assert json.loads((healed / "config.json").read_text())["dtype"] == "bfloat16"
    groups = make_settings(**{**QUICK, "method": "groupwise", "steps": 1})
    shutil.rmtree(tmp_path / "bf16", ignore_errors=True)
    source = pruned(models.dense, tmp_path / "bf16", dtype="bfloat16")
    quantised = heal(source, tmp_path / "quantised", groups, verify=False).out
    assert {t.dtype for t in weights(quantised).values()} == {torch.float32}


def test_weights_that_the_type_cannot_hold(models: Models, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as refusal:
        write_weights(
            tmp_path,
            open_checkpoint(models.per_layer),
            lambda _, stored: stored * 1e6,
            torch.float16,
            lambda _: None,
        )
    assert re.fullmatch(
        r"[\w.]+ of the healed model has weights too large for float16: repeat the command with "
        r"--dtype bfloat16 or float32, or a lower --lr",
        str(refusal.value),
    )
    assert not list(tmp_path.iterdir())


# ---- other programs --------------------------------------------------------------------------


def test_a_q4_1_file_holds_the_healed_weights_themselves(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    library.export(models.groups.out, file, weights="q4_1", verify=False)
    stored, wanted = open_checkpoint(file), weights(models.groups.out)
    back = {name: stored.read(name) for name in stored.tensors}
    names = [name for name in wanted if ".layers." in name and wanted[name].ndim == 2]
    assert len(names) == 3 * 7
    for name in names:
        assert torch.equal(back[name].float(), wanted[name].float()), name
    # The pruned model itself loses what four bits cost.
    library.export(models.per_layer, tmp_path / "plain.gguf", weights="q4_1", verify=False)
    plain, original = open_checkpoint(tmp_path / "plain.gguf"), weights(models.per_layer)
    assert not any(torch.equal(plain.read(n).float(), original[n].float()) for n in names)


def test_a_file_says_that_its_model_was_healed(models: Models, tmp_path: Path) -> None:
    file, plain = tmp_path / "model.gguf", tmp_path / "plain.gguf"
    library.export(models.lora.out, file, weights="f32", verify=False)
    library.export(models.per_layer, plain, weights="f32", verify=False)
    how = "lora, 12 steps, 384 tokens of built-in passages"
    assert open_checkpoint(file).healed == how
    assert open_checkpoint(plain).healed is None
    assert f"healed             {how}" in secateur("inspect", file).out
    secateur("prune", file, "--out", tmp_path / "out", "--remove", "10%").refused_at_once(
        f"source {file} was healed, which is training ({how}): prune the original, and heal the "
        "result"
    )


def test_a_merged_model_exports_like_any_other(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    library.export(models.lora.out, file, weights="f32")  # run by llama.cpp where it is installed
    stored, wanted = open_checkpoint(file), weights(models.lora.out)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(stored.read(name), wanted[name])


# ---- text and steps --------------------------------------------------------------------------


def test_windows_are_examples_end_to_end() -> None:
    tokenizer = tiny.make_tokenizer()
    text = Text(["aaa", "bbbb", "cc", "never"], "here")
    found = healing_windows(text, tokenizer, examples=3, length=4, seed=0)
    rows = torch.cat([found.train.tokens, found.held_out.tokens]).flatten().tolist()
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    whole = [
        token
        for n in order
        for token in (*tokenizer(text.documents[n], add_special_tokens=False)["input_ids"], 1)
    ]
    assert rows == whole[: len(whole) // 4 * 4]
    assert (found.examples, len(found.held_out.tokens), len(found.train.tokens)) == (3, 1, 2)
    with pytest.raises(CalibrationError) as refused:
        healing_windows(text, tokenizer, examples=1, length=4, seed=0)
    assert str(refused.value) == (
        "the text to heal on (here) has 4 tokens, enough for 1 windows of 4; needed are 2, one of "
        "them to measure on: give more text, or lower --length"
    )


def test_each_pass_sees_every_window_once_in_another_order() -> None:
    steps = [windows_of_step(k, windows=6, batch=4, seed=3) for k in range(3)]
    seen = [number for step in steps for number in step]
    first, second = seen[:6], seen[6:]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert windows_of_step(1, windows=6, batch=4, seed=3) == steps[1]
    assert windows_of_step(0, windows=6, batch=6, seed=4) != first


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [share_of_lr(step, 40) for step in range(40)]
    assert shares[:3] == [0.5, 1.0, 38 / 39]
    assert shares[-1] == pytest.approx(1 / 39)
    assert share_of_lr(0, 1) == 1.0


class Bigram(torch.nn.Module):
    """Logits that follow from the last token alone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(count, count))
        self.idle = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return type("Output", (), {"logits": self.table[input_ids]})


def test_a_step_is_adams_on_the_mean_loss_of_its_windows() -> None:
    """Against plain Adam on all windows of the step at once; here they go one after the other."""
    tokens = torch.randint(5, (6, 400), generator=torch.Generator().manual_seed(0))
    model, dense = Bigram(5), Bigram(5)
    training = Training(model, {"table": model.table}, tokens, steps=4, batch=3, lr=0.1, seed=0)
    training.run(every=100, save=lambda: None, shown=lambda _: None)
    adam = torch.optim.Adam([dense.table], lr=0.1)
    for step in range(4):
        adam.zero_grad()
        batch = tokens[windows_of_step(step, windows=6, batch=3, seed=0)]
        loss = next_token_loss(dense, batch)
        loss.backward()
        assert training.losses[step] == pytest.approx(float(loss.detach()), abs=1e-6)
        adam.param_groups[0]["lr"] = 0.1 * share_of_lr(step, 4)
        adam.step()
    assert torch.allclose(model.table, dense.table, atol=1e-5)


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    tokens = torch.randint(5, (6, 40), generator=torch.Generator().manual_seed(0))

    def training(model: Bigram) -> Training:
        return Training(model, {"t": model.table}, tokens, steps=9, batch=2, lr=0.1, seed=0)

    whole, states = Bigram(5), []
    first = training(whole)
    first.run(
        every=4,
        save=lambda: states.append({k: v.clone() for k, v in first.state().items()}),
        shown=lambda _: None,
    )
    assert [len(state["losses"]) for state in states] == [4, 8]
    for state in states:
        model = Bigram(5)
        second = training(model)
        second.load(state)
        second.run(every=4, save=lambda: None, shown=lambda _: None)
        assert torch.equal(model.table, whole.table)
        assert second.losses == first.losses


def test_training_that_cannot_go_on_says_so() -> None:
    tokens = torch.randint(5, (2, 40), generator=torch.Generator().manual_seed(0))
    model = Bigram(5)
    quiet = {"every": 9, "save": lambda: None, "shown": lambda _: None}
    wrong = Training(model, {"1.mlp.a": model.idle, "0.t": model.table}, tokens, steps=3, batch=1,
                     lr=0.1, seed=0)  # fmt: skip
    with pytest.raises(RecipeError) as refused:
        wrong.run(**quiet)
    assert str(refused.value) == (
        "the adapter of layer 1.mlp has no gradient: this model's code reads its weights past the "
        "layer; please report"
    )
    with torch.no_grad():
        model.table.fill_(torch.nan)
    broken = Training(model, {"t": model.table}, tokens, steps=3, batch=1, lr=0.1, seed=0)
    with pytest.raises(RecipeError) as refused:
        broken.run(**quiet)
    assert str(refused.value) == "the loss is nan at step 1 of 3 with --lr 0.1: lower --lr"


# ---- kills -----------------------------------------------------------------------------------

#: Runs of ``heal`` in forks, each to its end or to the SIGKILL at a moment: around every rename and
#: every line of the journal. Reads a list of [out, moment or null], prints one of moments passed.
KILLED_RUNS = """
import json, os, signal, sys

import torch

torch.set_num_threads(1)  # no pool of threads that a fork would lose
import transformers.models.llama.modeling_llama
from transformers import AutoTokenizer

import secateur.outputs.verify
from secateur.checkpoint import writer
from secateur.recovery import heal, make_settings


def run(out, at):
    moments = []

    def moment(name):
        moments.append(name)
        if len(moments) - 1 == at:
            os.kill(os.getpid(), signal.SIGKILL)

    real_replace, real_add = os.replace, writer.Journal.add

    def replace(old, new):
        moment("before " + os.path.basename(new))
        real_replace(old, new)
        moment("after " + os.path.basename(new))

    def add(self, kind, value):
        moment("before line " + kind)
        real_add(self, kind, value)
        moment("after line " + kind)

    writer.os.replace, writer.Journal.add = replace, add
    settings = make_settings(method="groupwise", data="builtin", steps=6, length=16, batch=2)
    heal(sys.argv[1], out, settings, every=2, verify=False)
    return moments


for out, at in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(run(out, at)).encode())
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, json.loads(said) if said else None]))
"""


def forked(source: Path, runs: list[tuple[Path, int | None]]) -> list[tuple[int, list[str] | None]]:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, str(source)],
        input=json.dumps([[str(out), at] for out, at in runs]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_a_killed_run_continues_and_ends_in_the_same_bytes(models: Models, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    status, moments = forked(models.per_layer, [(whole, None)])[0]
    assert status == 0
    assert moments is not None
    lines = [n.removeprefix("after line ") for n in moments if n.startswith("after line")]
    assert lines == ["identity", "state", "state", "state", "files"]
    # Some of them, and all between the first saved state and its line in the journal.
    saved = moments.index("after training.safetensors")
    places = sorted({*range(0, len(moments), 15), saved, saved + 1, saved + 2})
    runs: list[tuple[Path, int | None]] = []
    for at in places:
        runs += [(tmp_path / str(at) / "out", at), (tmp_path / str(at) / "out", None)]
    # And one that is killed again and again.
    runs += [(tmp_path / "often" / "out", at) for at in (saved + 3, 4, 9)]
    runs += [(tmp_path / "often" / "out", None)]
    answers = forked(models.per_layer, runs)
    wanted = bytes_of(whole)
    for (out, at), (status, _) in zip(runs, answers, strict=True):
        assert status == (0 if at is None else -9), (out, at)
        if at is None:
            assert bytes_of(out) == wanted, out
            assert [path.name for path in out.parent.iterdir()] == ["out"]
    # What was saved is not done again: two more states were to be written, not three.
    after_first = answers[runs.index((tmp_path / str(saved + 2) / "out", None))][1]
    assert after_first is not None
    assert after_first.count("after training.safetensors") == 2


def test_other_settings_do_not_mix_with_a_broken_run(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Two moments of the line identity, two of the state's file, and behind its line.
    assert forked(models.per_layer, [(out, 5)])[0][0] == -9
    kinds = [
        json.loads(line)["kind"]
        for line in (work_folder(out) / "journal.jsonl").read_text().splitlines()
    ]
    assert kinds == ["identity", "state"]
    with pytest.raises(SecateurError, match="holds unfinished work of another run") as refused:
        heal(models.per_layer, out, make_settings(**QUICK))
    assert "settings" in str(refused.value)


# ---- mistakes --------------------------------------------------------------------------------


def test_folders_that_cannot_be_healed(models: Models, tmp_path: Path) -> None:
    def refused(source: Path | str, text: str) -> None:
        secateur("heal", source, *WISHES, "--out", tmp_path / "out").refused_at_once(text)
        assert not list(tmp_path.glob("out*"))

    refused(
        models.dense,
        f"source {models.dense} was not written by secateur prune (it has no secateur.json): prune "
        "the model into a folder first, then heal that",
    )
    file = tmp_path / "model.gguf"
    library.export(models.per_layer, file, weights="f32", verify=False)
    refused(
        file,
        f"source {file} is a file: heal the folder that secateur prune wrote, then make the file "
        "from it with secateur export",
    )
    refused(
        models.groups.out,
        f"source {models.groups.out} has been healed already (groupwise, 12 steps, 384 tokens of "
        "built-in passages): heal the pruned folder that it was made from, with more --steps",
    )
    zeros = pruned(
        models.dense, tmp_path / "zeros", remove=None, of=None, sparsity="2:4", method="magnitude",
        round_to=None, options={},
    )  # fmt: skip
    count = json.loads((zeros / RECORD).read_text())["reached"]["zeros"]
    refused(
        zeros,
        f"source {zeros} has {count:,} zeros, which merged adapters would fill: heal a model that "
        "--remove alone made smaller",
    )
    packed = tmp_path / "packed"
    library.export(models.per_layer, packed, to="packed")
    refused(
        packed,
        f"source {packed} is packed: write it plain with secateur export --to plain, and heal that",
    )
    narrow = pruned(
        models.dense, tmp_path / "narrow", method="slicegpt", options={}, round_to=None,
        remove="10%",
    )  # fmt: skip
    refused(
        narrow,
        f"source {narrow} has a sliced hidden width (--method slicegpt), whose shortcut matrices "
        "no healing knows: heal a model of another method",
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--method", "full"),
            "--method is 'full': input should be 'lora' or 'groupwise'",
        ),
        (
            ("--bits", "4"),
            "--bits is for --method groupwise: lora quantises nothing; leave out --bits",
        ),
        (
            ("--method", "groupwise", "--bits", "3"),
            "--bits is 3: input should be 4, 5 or 8",
        ),
        (("--lr", "0"), "--lr is 0.0: input should be greater than 0"),
        (
            ("--rank", "0"),
            "--rank is 0: input should be greater than or equal to 1",
        ),
        (
            ("--compute", "float16"),
            "--compute is 'float16': input should be 'float32' or 'bfloat16'",
        ),
        (
            ("--length", "4096"),
            "length is 4096, the model's positions end at 256: lower --length",
        ),
    ],
    ids=" ".join,
)
def test_settings_that_cannot_be(
    options: tuple[str, ...], text: str, models: Models, tmp_path: Path
) -> None:
    command = ("heal", models.per_layer, *WISHES, "--out", tmp_path / "out", *options)
    secateur(*command).refused_at_once(text)
    assert not list(tmp_path.glob("out*"))


def test_lora_without_peft(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    command = ("heal", models.per_layer, *WISHES, "--out", tmp_path / "out")
    secateur(*command).refused_at_once(
        "--method lora needs the package peft, which is not installed: pip install "
        "'secateur[heal]', or use --method groupwise"
    )
    secateur(*command, "--method", "groupwise").fine()


def test_code_that_is_not_ours_is_not_run(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(models.per_layer, folder)
    with (folder / MODELING_FILE).open("a") as file:
        file.write("# more\n")
    with pytest.raises(SourceError, match="brings Python code"):
        heal(folder, tmp_path / "out", make_settings(**QUICK))


def test_a_model_that_does_not_fit(models: Models) -> None:
    stream = open_pruned(models.per_layer).stream
    check_fits(stream)
    with pytest.raises(MemoryLimitError) as refused:
        check_fits(stream, free=2**20)
    assert str(refused.value) == (
        "healing holds the whole model: 320 MiB in float32, before activations, and 1 MiB are "
        "free; it is for small models, or for a machine with more memory"
    )


def test_a_run_that_makes_it_worse_says_so(models: Models, tmp_path: Path) -> None:
    """At four bits and hardly any step, what quantisation costs is not won back."""
    settings = make_settings(**{**QUICK, "method": "groupwise", "steps": 1, "lr": 1e-9})
    found = heal(models.per_layer, tmp_path / "out", settings, verify=False)
    assert found.after > found.before
    assert found.notes == [
        f"the loss on windows kept out rose from {found.before:.3f} to {found.after:.3f}: try more "
        "--steps, more text, or another --lr"
    ]


def test_the_command_says_what_it_did(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = secateur("heal", models.per_layer, *WISHES, "--out", out).fine().splitlines()
    assert said[0].startswith("healed by lora: 2 steps on built-in passages; loss on 8 windows")
    assert any("trained, so not a training-free model" in line for line in said)
    assert said[-1] == f"written to {out}"
