"""FLAP against a dense reference written from the paper, and the biases that it adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import secateur
from test_outputs import logits_of, modules_cache, random_tokens, reopen
from test_scored import LLAMA, OPT, blocks_of, inputs_of, kept_units, neuron_of, whole, windows_of

import secateur as library
from secateur.anatomy import describe
from secateur.checkpoint import open_checkpoint
from secateur.errors import PlanError
from secateur.masking import masked_hidden
from secateur.outputs import llama_cpp
from secateur.pipeline import make_plan
from secateur.plans import BlockCut, Plan, block_removed
from secateur.pruning import RECORD, prune
from secateur.recipe import Recipe, make_recipe
from secateur.streaming import Stream

__all__ = ["modules_cache"]  # a fixture that runs by itself

Folder = Callable[[str], Path]
SHORT = {"samples": 4, "length": 24}
#: Models with more groups than those that all tests share.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "eight-heads": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "eight-biases": (
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True},
    ),
    "qwen3-tied": (
        "qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    ),
}  # fmt: skip
#: Model, paths of the two outputs, and inputs that a KV group makes.
SHAPES = [("eight-heads", LLAMA, 8), ("llama-gqa-tied", LLAMA, 16), ("opt", OPT, 8)]


@pytest.fixture(scope="module", autouse=True)
def more_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in MODELS.items():
            patch.setitem(tiny.MODELS, name, entry)
        yield


def recipe(remove: str = "40%", **fields: Any) -> Recipe:
    return make_recipe(
        **{"remove": remove, "of": "decoder", "method": "flap", "calibration": SHORT, **fields}
    )


# ---- the reference ---------------------------------------------------------------------------


def channel_scores(weight: np.ndarray, x: np.ndarray, metric: str) -> np.ndarray:
    mean = x.mean(0)
    variance = ((x - mean) ** 2).sum(0) / (len(x) - 1)
    if metric == "IFV":
        return variance
    if metric == "WIFV":
        return variance * (weight**2).sum(0)
    return np.abs(weight).mean(0) * np.sqrt((x**2).sum(0))


def reference(
    folder: Path, paths: tuple[str, str], group: int, metric: str, square: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Standardised scores of the groups and the neurons of each block of the uncut model."""
    model, tokens, found = whole(folder), windows_of(folder), []
    for number, block in enumerate(blocks_of(model)):
        pair = []
        for path, width in zip(paths, (group, 1), strict=True):
            weight = block.get_submodule(path).weight.detach().double().numpy()
            score = channel_scores(weight, inputs_of(model, number, path, tokens), metric)
            if width > 1 and square:
                score = score**2
            score = (score - score.mean()) / score.std(ddof=1)
            pair.append(score.reshape(-1, width).mean(1))
        found.append((pair[0], pair[1]))
    return found


def groups_lost(
    plan: Plan,
    paths: tuple[str, str],
    group: int,
    scores: list[tuple[np.ndarray, np.ndarray]],
    asked: int,
) -> list[int]:
    """By block, where the order of groups and neurons together is cut nearest to what was asked."""
    dense, attention = plan.anatomy.denses, plan.anatomy.coupling("values")
    each = [group * dense[paths[0]].rows, neuron_of(plan)]  # parameters of a group, of a neuron
    size = plan.anatomy.head_size
    for names, rows in ((attention.queries, group), (attention.keys + attention.producers, size)):
        each[0] += sum(rows * (dense[name].inputs + dense[name].bias) for name in names)
    added = [0 if dense[path].bias else dense[path].rows for path in paths]
    order = sorted(
        (score, kind, block)
        for block, pair in enumerate(scores)
        for kind in (0, 1)
        for score in pair[kind].tolist()
    )
    lost = [[0, 0] for _ in scores]
    nearest, found = asked, [0] * len(scores)
    for _, kind, block in order:
        lost[block][kind] = min(lost[block][kind] + 1, len(scores[block][kind]) - 1)
        removed = sum(n * each[k] - added[k] for own in lost for k, n in enumerate(own) if n)
        if abs(removed - asked) < nearest:
            nearest, found = abs(removed - asked), [groups for groups, _ in lost]
    return found


@pytest.mark.parametrize(
    ("metric", "square"), [("WIFV", True), ("WIFV", False), ("IFV", True), ("WIFN", True)]
)
@pytest.mark.parametrize(("name", "paths", "group"), SHAPES)
def test_one_order_over_all_blocks(
    name: str, paths: tuple[str, str], group: int, metric: str, square: bool, model_folder: Folder
) -> None:
    made = recipe(options={"metric": metric, "square_heads": square})
    result = make_plan(model_folder(name), made)
    plan, anatomy = result.plan, result.plan.anatomy
    scores = reference(model_folder(name), paths, group, metric, square)
    left = [
        (
            kept_units(cut, paths[0], group) if paths[0] in cut.inputs else range(len(groups)),
            kept_units(cut, paths[1], 1) if paths[1] in cut.inputs else range(len(neurons)),
        )
        for cut, (groups, neurons) in zip(plan.blocks, scores, strict=True)
    ]

    def lost(kind: int, *, barred: int = 0) -> tuple[list[float], list[float]]:
        """Scores of what went and of what stayed; a block's last unit has to stay."""
        gone, kept = [], []
        for units, pair in zip(left, scores, strict=True):
            gone += [float(pair[kind][u]) for u in range(len(pair[kind])) if u not in units[kind]]
            if len(units[kind]) > barred:
                kept += [float(pair[kind][u]) for u in units[kind]]
        return gone, kept

    groups_gone, groups_kept = lost(0, barred=1)
    neurons_gone, neurons_kept = lost(1)
    assert groups_gone
    assert max(neurons_gone) < min(neurons_kept)
    assert max(groups_gone) < min(groups_kept)
    wanted = groups_lost(plan, paths, group, scores, result.asked)
    assert [len(p[0]) - len(u[0]) for u, p in zip(left, scores, strict=True)] == wanted
    reached = sum(block_removed(anatomy, cut) for cut in plan.blocks)
    assert abs(reached - result.asked) <= neuron_of(plan) / 2


@pytest.mark.parametrize(("name", "paths", "group"), SHAPES)
def test_the_same_share_of_each_block(
    name: str, paths: tuple[str, str], group: int, model_folder: Folder
) -> None:
    plan = make_plan(model_folder(name), recipe("55%", options={"shares": "UL-UM"})).plan
    model, tokens = whole(model_folder(name)), windows_of(model_folder(name))
    for number, cut in enumerate(plan.blocks):
        for path, width in zip(paths, (group, 1), strict=True):
            weight = blocks_of(model)[number].get_submodule(path).weight.detach().double().numpy()
            score = channel_scores(weight, inputs_of(model, number, path, tokens), "WIFV")
            score = (score**2 if width > 1 else score).reshape(-1, width).sum(1)
            kept = kept_units(cut, path, width)
            assert 0 < len(kept) < len(score)
            assert kept == sorted(np.argsort(score, kind="stable")[len(score) - len(kept) :])


@pytest.mark.parametrize("name", ["eight-heads", "eight-biases", "opt"])
def test_on_average_the_layer_puts_out_what_it_did(name: str, model_folder: Folder) -> None:
    """b' = b + W_P E[x_P], so that E[W_S x_S + b'] = E[W x + b]."""
    paths = OPT if name == "opt" else LLAMA
    plan = make_plan(model_folder(name), recipe()).plan
    model, tokens = whole(model_folder(name)), windows_of(model_folder(name))
    for number, cut in enumerate(plan.blocks):
        assert cut.biases.keys() == cut.inputs.keys()
        for path in set(paths) & cut.biases.keys():
            layer = blocks_of(model)[number].get_submodule(path)
            x, weight = (
                inputs_of(model, number, path, tokens),
                layer.weight.detach().double().numpy(),
            )
            bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
            kept = cut.inputs[path].numpy()
            wanted = (x @ weight.T).mean(0) + bias
            got = (x[:, kept] @ weight[:, kept].T).mean(0) + cut.biases[path].double().numpy()
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
            assert np.abs(cut.biases[path].numpy() - bias).max() > 1e-3


def test_no_bias_where_none_is_wished(model_folder: Folder, tmp_path: Path) -> None:
    made = recipe(options={"bias": False})
    done = prune(model_folder("eight-heads"), tmp_path / "out", made, verify=False)
    assert not any(cut.biases for cut in done.plan.blocks)
    assert "biases" not in json.loads((done.out / "config.json").read_text())["secateur"]


def test_alike_scores_are_zeros_when_standardised() -> None:
    from secateur.solvers.pooling import standardised

    assert standardised(torch.full((4,), 3.0)).tolist() == [0.0] * 4
    assert standardised(torch.tensor([7.0])).tolist() == [0.0]
    assert standardised(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


# ---- where a new bias can stand --------------------------------------------------------------


def layer_biases(folder: Path) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name.split(".", 3)[3] for name in index if name.endswith(".bias")}


def test_a_folder_with_its_modelling_file(model_folder: Folder, tmp_path: Path) -> None:
    done = prune(model_folder("eight-heads"), tmp_path / "out", recipe(), verify=False)
    config = json.loads((done.out / "config.json").read_text())
    assert config["secateur"]["biases"] == [sorted(cut.biases) for cut in done.plan.blocks]
    assert layer_biases(done.out) == {"self_attn.o_proj.bias", "mlp.down_proj.bias"}
    record = json.loads((done.out / RECORD).read_text())["plan"]["blocks"]
    assert [block["new_biases"] for block in record] == config["secateur"]["biases"]
    # `verify` finds the plan, biases and all, in the folder.
    said = secateur("verify", done.out, "--against", model_folder("eight-heads")).fine()
    assert said.startswith("reopened in a fresh process as SecateurLlamaForCausalLM")


def test_the_stock_class_where_it_has_them(model_folder: Folder, tmp_path: Path) -> None:
    made = recipe(layout="uniform", options={"shares": "UL-UM"})
    done = prune(model_folder("opt"), tmp_path / "out", made, verify=False)
    assert json.loads((done.out / "config.json").read_text())["model_type"] == "opt"
    assert all("fc2" in cut.biases for cut in done.plan.blocks)
    model = reopen(done.out, trust_remote_code=False)
    tokens, stream = random_tokens(2, 12), Stream(open_checkpoint(model_folder("opt")))
    found: list[torch.Tensor] = []
    hidden = masked_hidden(stream, done.plan, tokens, torch.float32)
    stream.head(hidden, tokens, lambda _, window: found.append(window))
    torch.testing.assert_close(logits_of(model, tokens), torch.stack(found), rtol=1e-4, atol=1e-4)


UNIFORM = ("--layout", "uniform", "--set", "shares=UL-UM", "--method", "flap", "--remove", "40%",
           "--of", "decoder", "--samples", "4", "--length", "24")  # fmt: skip


def test_a_stock_class_without_them(model_folder: Folder) -> None:
    ended = secateur("plan", model_folder("eight-heads"), *UNIFORM)
    ended.fine()
    assert ended.err[0] == (
        "no new bias in self_attn.o_proj and mlp.down_proj: the stock class of llama has none "
        "there; --layout per-layer has"
    )
    ended = secateur("plan", model_folder("eight-biases"), *UNIFORM)  # of the attention alone
    ended.fine()
    assert ended.err[0] == (
        "no new bias in mlp.down_proj: the stock class of llama has none there; --layout per-layer "
        "has"
    )
    secateur("plan", model_folder("eight-heads"), *UNIFORM, "--set", "bias=true").refused_at_once(
        "bias is true, but self_attn.o_proj and mlp.down_proj can have no bias here: the stock "
        "class of llama has none there; --layout per-layer has; use --set bias=auto to do without"
    )


def test_some_layers_of_a_stock_class_have_them(model_folder: Folder) -> None:
    made = recipe("55%", layout="uniform", options={"shares": "UL-UM"})
    plan = make_plan(model_folder("eight-biases"), made).plan
    assert all(cut.biases.keys() == {"self_attn.o_proj"} for cut in plan.blocks)


def file_wishes(out: Path, *more: str) -> tuple[object, ...]:
    return ("--out", out, "--method", "flap", "--remove", "40%", "--of", "decoder",
            "--samples", "4", "--length", "24", *more)  # fmt: skip


def test_a_file_whose_architecture_has_no_place(model_folder: Folder, tmp_path: Path) -> None:
    source, out = model_folder("qwen3-tied"), tmp_path / "m.gguf"
    secateur("prune", source, *file_wishes(out, "--set", "bias=true")).refused_at_once(
        "bias is true, but self_attn.o_proj and mlp.down_proj can have no bias here: llama.cpp's "
        "architecture openelm has no place for it, a folder has; use --set bias=auto to do without"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "more", "arch"),
    [
        ("eight-heads", (), "deci"),
        ("eight-heads", ("--layout", "uniform", "--set", "shares=UL-UM"), "llama"),
        ("qwen2", ("--layout", "uniform", "--set", "shares=UL-UM"), "deci"),
        ("qwen3-tied", (), "openelm"),
    ],
)
def test_a_file(
    name: str, more: tuple[str, ...], arch: str, model_folder: Folder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Biases go where the architecture has them; torch reads the same model back."""
    monkeypatch.setattr("secateur.pruning.verify_folder", lambda *_, **__: None)
    out = tmp_path / "m.gguf"
    ended = secateur("prune", model_folder(name), *file_wishes(out, "--type", "f32", *more))
    said = ended.fine()
    if llama_cpp.available():
        assert "320 of 320 greedy tokens are torch's own choice" in said
    from gguf import GGUFReader

    reader = GGUFReader(out)
    assert reader.fields["general.architecture"].contents() == arch
    stored = {tensor.name for tensor in reader.tensors}
    has_place = arch != "openelm"
    assert any(n.endswith("ffn_down.bias") for n in stored) == has_place
    noted = "no new bias in self_attn.o_proj and mlp.down_proj: llama.cpp's architecture openelm"
    assert any(line.startswith(noted) for line in ended.err) != has_place

    back = Stream(open_checkpoint(out))
    layers = back.model.get_submodule(back.anatomy.family.blocks)
    assert any(block.mlp.down_proj.bias is not None for block in layers) == has_place
    folder = tmp_path / "folder"
    extra = {"layout": "uniform", "options": {"shares": "UL-UM"}} if more else {}
    if has_place and not more:
        library.prune(model_folder(name), folder, recipe(dtype="float32", **extra), verify=False)
        tokens = random_tokens(2, 12)
        got: list[torch.Tensor] = []
        back.head(back.forward(tokens), tokens, lambda _, window: got.append(window))
        wanted = logits_of(reopen(folder), tokens)
        torch.testing.assert_close(torch.stack(got), wanted, rtol=1e-4, atol=1e-4)


# ---- plans with biases -----------------------------------------------------------------------


def test_biases_travel_in_files() -> None:
    cut = BlockCut(3, {"fc2": torch.tensor([0, 2])}, biases={"fc2": torch.randn(32)})
    again = BlockCut.of(3, cut.tensors(), {})
    assert again.biases.keys() == {"fc2"}
    assert torch.equal(again.biases["fc2"], cut.biases["fc2"])


def test_biases_of_another_length() -> None:
    anatomy = describe(tiny.make_model("llama-gqa-tied"))
    cut = BlockCut(1, biases={"mlp.down_proj": torch.zeros(31)})
    with pytest.raises(PlanError) as refused:
        Plan(anatomy, [cut]).check()
    assert str(refused.value) == (
        "the plan of block 1: the new bias of mlp.down_proj is (31,), it should be (32,)"
    )


@pytest.mark.parametrize(("name", "more"), [("llama-gqa-tied", 32), ("llama-biases", 0)])
def test_new_biases_count(name: str, more: int) -> None:
    anatomy = describe(tiny.make_model(name))
    cut = BlockCut(1, biases={"mlp.down_proj": torch.zeros(32)})
    assert block_removed(anatomy, cut) == -more
    assert Plan(anatomy, [cut]).new_biases(cut) == (["mlp.down_proj"] if more else [])
