"""Random, magnitude and Wanda-SP: scores and propagation on the whole model, and the budget."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import secateur
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.calibration import draw_windows, load_text
from secateur.checkpoint import open_checkpoint
from secateur.errors import RecipeError, SourceError
from secateur.forms import Form
from secateur.methods import get_method
from secateur.pipeline import make_plan
from secateur.plans import BlockCut, Plan, block_removed
from secateur.pruning import prune
from secateur.recipe import Recipe, make_recipe
from secateur.solvers.budget import nearest
from secateur.solvers.pooling import lowest
from secateur.statistics import Moments
from secateur.streaming import Stream

Folder = Callable[[str], Path]
SHORT = {"samples": 4, "length": 24}
#: Paths of a block's attention output and FFN's last layer, and what feeds them.
LLAMA = ("self_attn.o_proj", "mlp.down_proj")
OPT = ("self_attn.out_proj", "fc2")
#: Models with more groups than those that all tests share.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "eight-heads": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "wide": ("llama", {"num_key_value_heads": 2, "intermediate_size": 512}),
}


@pytest.fixture(scope="module", autouse=True)
def more_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in MODELS.items():
            patch.setitem(tiny.MODELS, name, entry)
        yield


def recipe(method: str, remove: str = "40%", **fields: Any) -> Recipe:
    return make_recipe(
        **{"remove": remove, "of": "decoder", "method": method, "calibration": SHORT, **fields}
    )


def windows_of(folder: Path, seed: int = 0) -> torch.Tensor:
    """The calibration windows of :data:`SHORT`."""
    tokenizer = open_checkpoint(folder).tokenizer
    text = load_text("builtin", use="calibration")
    return draw_windows(text, tokenizer, samples=4, length=24, seed=seed).tokens


def whole(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def blocks_of(model: Any) -> Any:
    body = model.base_model
    return (body.decoder if hasattr(body, "decoder") else body).layers


def inputs_of(model: Any, block: int, path: str, tokens: torch.Tensor) -> np.ndarray:
    """What a layer of the whole model reads, (tokens, q)."""
    seen: list[torch.Tensor] = []
    layer = blocks_of(model)[block].get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double().numpy()


def kept_units(cut: BlockCut, path: str, width: int) -> list[int]:
    """Units of ``width`` inputs that are left; they must be whole."""
    kept = cut.inputs[path].tolist()
    units = sorted({place // width for place in kept})
    assert kept == [unit * width + i for unit in units for i in range(width)]
    return units


def highest(scores: np.ndarray, count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))
    return sorted(order[len(scores) - count :])


# ---- which units -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "paths", "group"),
    [("eight-heads", LLAMA, 8), ("llama-gqa-tied", LLAMA, 16), ("opt", OPT, 8)],
)
def test_wanda_sp_on_the_whole_model(
    name: str, paths: tuple[str, str], group: int, model_folder: Folder
) -> None:
    """Block after block: score, zero the inputs that go, and look at the next on what is left."""
    plan = make_plan(model_folder(name), recipe("wanda-sp", "55%")).plan
    model, tokens = whole(model_folder(name)), windows_of(model_folder(name))
    for number, cut in enumerate(plan.blocks):
        read = {path: inputs_of(model, number, path, tokens) for path in paths}  # before the cut
        for path, width in zip(paths, (group, 1), strict=True):
            weight = blocks_of(model)[number].get_submodule(path).weight
            score = np.abs(weight.detach().double().numpy()).mean(0)
            score = score * np.linalg.norm(read[path], axis=0)
            score = score.reshape(-1, width).sum(1)
            units = kept_units(cut, path, width)
            assert 0 < len(units) < len(score)
            assert units == highest(score, len(units))
            gone = sorted(set(range(weight.shape[1])) - set(cut.inputs[path].tolist()))
            with torch.no_grad():
                weight[:, gone] = 0


def test_wanda_sp_on_the_uncut_model(model_folder: Folder) -> None:
    folder = model_folder("opt")
    cut = make_plan(folder, recipe("wanda-sp", options={"inputs": "identical"})).plan.blocks[3]
    model = whole(folder)
    read = inputs_of(model, 3, "fc2", windows_of(folder))
    weight = blocks_of(model)[3].fc2.weight.detach().double().numpy()
    score = np.abs(weight).mean(0) * np.linalg.norm(read, axis=0)
    units = kept_units(cut, "fc2", 1)
    assert units == highest(score, len(units))
    sequential = make_plan(folder, recipe("wanda-sp")).plan.blocks[3]
    assert kept_units(sequential, "fc2", 1) != units


@pytest.mark.parametrize(("name", "paths", "group"), [("eight-heads", LLAMA, 8), ("opt", OPT, 8)])
def test_magnitude_sp(name: str, paths: tuple[str, str], group: int, model_folder: Folder) -> None:
    plan = make_plan(model_folder(name), recipe("magnitude-sp", "55%")).plan
    model = whole(model_folder(name))
    for number, cut in enumerate(plan.blocks):
        for path, width in zip(paths, (group, 1), strict=True):
            weight = blocks_of(model)[number].get_submodule(path).weight.detach().double().numpy()
            score = np.sqrt((weight**2).sum(0)).reshape(-1, width).sum(1)
            units = kept_units(cut, path, width)
            assert 0 < len(units) < len(score)
            assert units == highest(score, len(units))


def test_random_is_drawn_from_the_seed(model_folder: Folder) -> None:
    def neurons(seed: int, shares: str) -> list[list[int]]:
        made = recipe("random", seed=seed, options={"shares": shares, "groups": "keep"})
        plan = make_plan(model_folder("wide"), made).plan
        return [cut.inputs["mlp.down_proj"].tolist() for cut in plan.blocks]

    for shares in ("uniform", "global"):
        assert neurons(3, shares) == neurons(3, shares)
        assert neurons(3, shares) != neurons(4, shares)
        kept = neurons(3, shares)
        assert kept[0] != kept[1]
        # Half of each half of the neurons: nothing of their order is in the draw.
        for units in kept:
            assert abs(sum(unit < 256 for unit in units) / len(units) - 0.5) < 0.12


def test_all_blocks_in_one_draw(model_folder: Folder) -> None:
    made = recipe("random", options={"shares": "global", "groups": "keep"}, round_to=1)
    plan = make_plan(model_folder("wide"), made).plan
    scores = []
    for cut in plan.blocks:
        generator = torch.Generator().manual_seed(cut.source)  # seed 0, block's number
        scores.append(torch.rand(512, generator=generator, dtype=torch.float64))
    kept = [set(cut.inputs["mlp.down_proj"].tolist()) for cut in plan.blocks]
    gone = [
        float(s[i]) for s, k in zip(scores, kept, strict=True) for i in range(512) if i not in k
    ]
    left = [float(s[i]) for s, k in zip(scores, kept, strict=True) for i in k]
    assert max(gone) < min(left)
    assert len({len(k) for k in kept}) > 1


@pytest.mark.parametrize("method", ["random", "magnitude-sp"])
def test_what_needs_no_text_runs_no_block(
    method: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "forward_block", lambda *_: pytest.fail("a block was run"))
    assert make_plan(model_folder("opt"), recipe(method)).plan.blocks


@pytest.mark.parametrize("method", ["wanda-sp", "flap"])
def test_no_second_moments_where_none_are_read(
    method: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moments, "empty", lambda *_: pytest.fail("a q x q matrix was made"))
    result = make_plan(model_folder("wide"), recipe(method))
    assert result.plan.blocks
    with_moments = make_recipe(
        remove="40%",
        of="decoder",
        method="comp",
        calibration=SHORT,
        options={"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8},
    )
    monkeypatch.undo()
    matrices = "a block and its matrices"
    other = make_plan(model_folder("wide"), with_moments, max_memory="4GB").estimate
    assert result.estimate.parts[matrices] < other.parts[matrices] - 8 * 512 * 512


# ---- how many --------------------------------------------------------------------------------

ONE_SHARE = [("random", {}), ("magnitude-sp", {}), ("wanda-sp", {})]


@pytest.mark.parametrize("share", ["11%", "30%", "58%"])
@pytest.mark.parametrize("name", ["eight-heads", "wide", "llama-biases", "opt", "qwen3"])
def test_every_block_loses_the_same_share(name: str, share: str, model_folder: Folder) -> None:
    result = make_plan(model_folder(name), recipe("magnitude-sp", share))
    plan, anatomy = result.plan, result.plan.anatomy
    part = float(share[:-1]) / 100
    neurons = anatomy.coupling("neurons").consumer
    of_units = part * anatomy.block_parameters / units_of(plan)
    lost = {anatomy.kv_heads - groups_of(plan, cut) for cut in plan.blocks}
    assert lost == {min(math.floor(of_units * anatomy.kv_heads), anatomy.kv_heads - 1)}
    widths = [len(cut.inputs[neurons]) for cut in plan.blocks]
    assert max(widths) - min(widths) <= result.form.multiple
    check_total(result.asked, plan, result.form.multiple)


def units_of(plan: Plan) -> int:
    """Parameters of all units of one block: its linear layers, less biases of the outputs."""
    anatomy = plan.anatomy
    outputs = [anatomy.coupling(kind).consumer for kind in ("values", "neurons")]
    dense = anatomy.denses
    biases = sum(dense[name].rows for name in outputs if dense[name].bias)
    return sum(d.parameters for d in dense.values()) - biases


def groups_of(plan: Plan, cut: BlockCut) -> int:
    return plan.anatomy.kv_heads if cut.groups is None else len(cut.groups)


def neuron_of(plan: Plan) -> int:
    anatomy = plan.anatomy
    coupling = anatomy.coupling("neurons")
    made = sum(anatomy.denses[n].inputs + anatomy.denses[n].bias for n in coupling.producers)
    return anatomy.denses[coupling.consumer].rows + made


def check_total(asked: int, plan: Plan, multiple: int) -> None:
    reached = sum(block_removed(plan.anatomy, cut) for cut in plan.blocks)
    assert abs(reached - asked) <= neuron_of(plan) * multiple / 2


@pytest.mark.parametrize("round_to", [1, 32])
@pytest.mark.parametrize("name", ["eight-heads", "wide", "opt"])
@pytest.mark.parametrize("method", ["random", "flap"])
def test_the_total_of_all_blocks_is_met(
    method: str, name: str, round_to: int, model_folder: Folder
) -> None:
    """To half a neuron, or half of the pieces in which neurons go, biases counted."""
    options = {"shares": "global"} if method == "random" else {}
    for share in ("7%", "23%", "48%"):
        result = make_plan(
            model_folder(name), recipe(method, share, options=options, round_to=round_to)
        )
        check_total(result.asked, result.plan, round_to)
        anatomy = result.plan.anatomy
        widths = [len(c.inputs.get("mlp.down_proj", c.inputs.get("fc2", range(anatomy.ffn_width))))
                  for c in result.plan.blocks]  # fmt: skip
        assert all(w % round_to == 0 or w == anatomy.ffn_width for w in widths)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    st.data(),
)
def test_the_lowest_of_all(scores: list[list[int]], data: st.DataObject) -> None:
    """Against every cut through the joined order; ties by layer and place."""
    costs = data.draw(st.lists(st.integers(1, 9), min_size=len(scores), max_size=len(scores)))
    most = sum(cost * len(own) for cost, own in zip(costs, scores, strict=True))
    total = data.draw(st.integers(0, most))
    order = sorted(
        (score, layer, place) for layer, own in enumerate(scores) for place, score in enumerate(own)
    )
    sums = [0, *itertools.accumulate(costs[layer] for _, layer, _ in order)]
    found = lowest(
        {i: torch.tensor(own, dtype=torch.float64) for i, own in enumerate(scores)},
        lambda _, count: count,
        lambda counts: sum(costs[i] * n for i, n in counts.items()),
        total,
    )
    gone = sum(found.values())
    assert abs(sums[gone] - total) == min(abs(s - total) for s in sums)
    lost = [layer for _, layer, _ in order[:gone]]
    assert found == {i: lost.count(i) for i in range(len(scores))}


def test_the_nearest_legal_number() -> None:
    legal = [0, 28, 92, 156]
    wishes = {-5: 0, 13: 0, 14: 0, 15: 28, 60: 28, 61: 92, 150.5: 156, 999: 156}
    assert {wish: nearest(legal, wish) for wish in wishes} == wishes


@pytest.mark.parametrize("groups", [1, 3, "keep"])
@pytest.mark.parametrize("options", [{"shares": "uniform"}, {"shares": "global"}])
def test_groups_as_asked(options: dict[str, Any], groups: Any, model_folder: Folder) -> None:
    made = recipe("random", "50%", options={**options, "groups": groups})
    result = make_plan(model_folder("eight-heads"), made)
    left = 4 if groups == "keep" else groups
    assert {groups_of(result.plan, cut) for cut in result.plan.blocks} == {left}
    check_total(result.asked, result.plan, 1)


@pytest.mark.parametrize("method", ["wanda-sp", "random"])
def test_one_width_for_all_opens_with_the_stock_class(
    method: str, model_folder: Folder, tmp_path: Path
) -> None:
    made = recipe(method, "50%", layout="uniform")
    done = prune(model_folder("eight-heads"), tmp_path / "out", made, verify=False)
    assert done.plan.uniform is not None
    config = json.loads((done.out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["num_key_value_heads"] == done.plan.uniform.kv_groups == 2
    assert done.layout_cost is not None


# ---- refusals --------------------------------------------------------------------------------


def plan_refused(folder: Path, *wishes: str) -> str:
    ended = secateur("plan", folder, "--of", "decoder", *wishes)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err) == 1 or ended.err[0].startswith("estimate")
    return ended.err[-1]


def test_refusals(model_folder: Folder) -> None:
    folder = model_folder("llama-gqa-tied")
    assert plan_refused(
        folder, "--method", "random", "--remove", "30%", "--set", "shares=global",
        "--layout", "uniform",
    ) == (
        "error: method random ranks all blocks together (shares global), which gives each its own "
        "widths: use --layout per-layer, or --set shares=uniform"
    )  # fmt: skip
    assert plan_refused(
        folder, "--method", "wanda-sp", "--remove", "30%", "--structure", "inputs"
    ) == (
        "error: method wanda-sp removes whole units, not inputs of single layers: leave out "
        "--structure, or use --method comp"
    )
    assert plan_refused(folder, "--method", "wanda-sp", "--remove", "30%", "--layers", "2") == (
        "error: option of method wanda-sp layers is not known: allowed are groups, inputs"
    )
    assert plan_refused(
        folder, "--method", "magnitude-sp", "--remove", "30%", "--set", "groups=3"
    ) == ("error: groups is 3, but every block has 2 KV groups: allowed are 1 to 2, auto and keep")
    # 47 of 48 neurons of 96 parameters each, in four blocks, of 30,976 parameters.
    assert plan_refused(
        folder, "--method", "random", "--remove", "90%", "--set", "groups=keep"
    ) == (
        "error: 27,878 parameters should leave 4 blocks, which can lose at most 18,048: ask for "
        "less, or leave out groups"
    )


@pytest.mark.parametrize("options", [{}, {"shares": "UL-UM"}])
def test_scores_that_are_not_finite(options: dict[str, str], tmp_path: Path) -> None:
    model = tiny.make_model("opt")
    with torch.no_grad():
        blocks_of(model)[1].fc1.weight.fill_(1e38)  # finite, and what it puts out is not
    model.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError) as refused:
        make_plan(tmp_path, recipe("flap", options=options))
    assert str(refused.value) == (
        "block 1 cannot be cut: scores of its units are not finite; its activations on the "
        "calibration text are not finite: check the weights, or try other text with --calibration"
    )


def test_capacity_counts_pieces(model_folder: Folder) -> None:
    """With neurons in pieces of 64, one piece must stay."""
    method = get_method("random", {"groups": "keep"}, Form(multiple=64))
    anatomy = make_plan(model_folder("wide"), recipe("random")).plan.anatomy
    most = 4 * 96 * (512 - 64)
    shares = method.allocate(anatomy, range(4), {}, {}, most)
    assert [share.inputs for share in shares.values()] == [{"mlp.down_proj": 448}] * 4
    with pytest.raises(RecipeError):
        method.allocate(anatomy, range(4), {}, {}, most + 1)
