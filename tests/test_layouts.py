"""What goes inside blocks and in which widths: whole units, one width for all, multiples."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from commands import secateur
from folders import bytes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.anatomy import Anatomy, describe
from secateur.checkpoint import open_checkpoint
from secateur.errors import OutputError, RecipeError
from secateur.forms import Form, Target, resolve
from secateur.masking import masked_hidden
from secateur.methods import Block, get_method
from secateur.pipeline import make_plan
from secateur.plans import BlockCut, Plan
from secateur.pruning import RECORD, prune
from secateur.recipe import Recipe, load_recipe, make_recipe
from secateur.solvers.budget import Curve, threshold_search
from secateur.statistics import Moments
from secateur.streaming import Stream

Folder = Callable[[str], Path]
#: Models with more groups, or more neurons, than those that all tests share.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "many-groups": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "biases": (
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True,
         "mlp_bias": True},
    ),
    "wide": ("llama", {"num_key_value_heads": 2, "intermediate_size": 512}),
    "wide-opt": ("opt", {"ffn_dim": 512, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "narrow": ("llama", {"num_key_value_heads": 2, "intermediate_size": 24}),
}  # fmt: skip
#: A model of each family whose stock class must open uniform folders.
FAMILIES = {
    "llama-gqa-tied": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
}
SHORT = {"samples": 4, "length": 24}
#: A coarse grid is quick.
EVERYWHERE: dict[str, Any] = {"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8}


@pytest.fixture(scope="module", autouse=True)
def more_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in MODELS.items():
            patch.setitem(tiny.MODELS, name, entry)
        yield


def recipe(remove: str = "30%", options: Mapping[str, Any] | None = None, **fields: Any) -> Recipe:
    return make_recipe(
        **{
            "remove": remove,
            "of": "decoder",
            "method": "comp",
            "options": {**EVERYWHERE, **(options or {})},
            "calibration": SHORT,
            **fields,
        }
    )


# ---- whole units -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A block of a tiny model and what goes into its layers, token by token."""

    anatomy: Anatomy
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]

    def block(self) -> Block:
        moments = {
            self.anatomy.denses[name].reads: Moments(x.T @ x, x.sum(0), len(x))
            for name, x in self.inputs.items()
        }
        generator = torch.Generator().manual_seed(0)
        return Block(1, self.anatomy, dict(self.weights), moments, generator)


@lru_cache
def sample(name: str) -> Sample:
    model = tiny.make_model(name, layers=3)
    anatomy = describe(model)
    block = model.get_submodule(anatomy.family.blocks)[1]
    inputs: dict[str, torch.Tensor] = {}
    for path in anatomy.denses:
        block.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.update({path: args[0].flatten(0, -2).double()})
        )
    tokens = torch.randint(3, tiny.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens)
    weights = {path: block.get_submodule(path).weight.detach() for path in anatomy.denses}
    return Sample(anatomy, weights, inputs)


class Dense:
    """One layer of a sample by dense algebra: B m is its output on all tokens, damping below.

    The squares of B m - B 1 sum up to E|A m - A 1|^2 + s |m - 1|^2, of which scales are the least.
    """

    def __init__(self, one: Sample, path: str, width: int, damping: float) -> None:
        x, w = one.inputs[path].numpy(), one.weights[path].double().numpy()
        products = w[None] * x[:, None] / math.sqrt(len(x))  # (tokens, p, q)
        size = x.shape[1]
        share = damping * (products**2).sum() / size
        self.matrix = np.vstack([products.reshape(-1, size), math.sqrt(share) * np.eye(size)])
        # What a group of inputs puts out together: 1^T G_gg 1.
        together = products.reshape(len(x), len(w), -1, width).sum(3)
        energy = (together**2).sum((0, 1)).repeat(width)
        self.order = np.argsort(energy, kind="stable")

    def kept(self, removed: int) -> list[int]:
        return sorted(self.order[removed:].tolist())

    def scales(self, removed: int) -> np.ndarray:
        columns = self.matrix[:, self.kept(removed)]
        return np.linalg.lstsq(columns, self.matrix.sum(1), rcond=None)[0]

    def error(self, removed: int) -> float:
        wanted = self.matrix.sum(1)
        made = self.matrix[:, self.kept(removed)] @ self.scales(removed)
        return float(((made - wanted) ** 2).sum() / (wanted**2).sum())


def ends(anatomy: Anatomy) -> tuple[str, str]:
    """The layers at whose entry whole units stand: attention output, FFN down."""
    return anatomy.coupling("values").consumer, anatomy.coupling("neurons").consumer


def piece(anatomy: Anatomy, kind: str) -> int:
    """Parameters of one KV group with its query heads, or of one FFN neuron."""
    coupling = anatomy.coupling("values" if kind == "group" else "neurons")
    width = anatomy.heads_per_group * anatomy.head_size if kind == "group" else 1
    size = anatomy.head_size if kind == "group" else 1
    gone = width * anatomy.denses[coupling.consumer].rows
    for names, rows in (
        (coupling.queries, width),
        ((*coupling.keys, *coupling.producers), size),
    ):
        gone += sum(rows * (anatomy.denses[n].inputs + anatomy.denses[n].bias) for n in names)
    return gone


def greedy(
    layers: Mapping[str, Dense],
    legal: Mapping[str, Sequence[int]],
    cost: Mapping[str, int],
    quota: int,
) -> dict[str, int]:
    """Always the next step that loses least; the last one only if that comes nearer."""
    counts = dict.fromkeys(layers, 0)
    gone = 0
    while gone < quota:
        following = {
            name: next(c for c in legal[name] if c > counts[name])
            for name in layers
            if counts[name] < legal[name][-1]
        }
        if not following:
            break
        name = min(following, key=lambda n: layers[n].error(following[n]))
        step = cost[name] * (following[name] - counts[name])
        if gone + step >= quota and quota - gone < gone + step - quota:
            break
        gone += step
        counts[name] = following[name]
    return counts  # fmt: skip


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.8])
@pytest.mark.parametrize("name", ["many-groups", "biases", "llama-mha-untied", "qwen3", "opt"])
def test_a_cut_is_what_scores_and_least_squares_say(name: str, share: float) -> None:
    """Groups and neurons by what they put out, numbers by their errors, scales by dense algebra."""
    one = sample(name)
    anatomy = one.anatomy
    heads, neurons = ends(anatomy)
    width = anatomy.heads_per_group * anatomy.head_size
    quota = round(share * anatomy.block_parameters)
    cut = get_method("comp", {"damping": 0.02}, Form()).cut(one.block(), quota)

    layers = {heads: Dense(one, heads, width, 0.02), neurons: Dense(one, neurons, 1, 0.02)}
    legal = {
        heads: range(0, width * anatomy.kv_heads, width),
        neurons: range(anatomy.ffn_width),
    }
    cost = {heads: piece(anatomy, "group") // width, neurons: piece(anatomy, "neuron")}
    counts = greedy(layers, legal, cost, quota)
    assert "not_tuned" not in cut.notes
    assert cut.inputs.keys() == {path for path, count in counts.items() if count}
    for path, kept in cut.inputs.items():
        assert kept.tolist() == layers[path].kept(counts[path])
        np.testing.assert_allclose(cut.scales[path], layers[path].scales(counts[path]), atol=2e-4)
        error = layers[path].error(counts[path])
        assert cut.notes["error"][path] == pytest.approx(error, rel=1e-4)
    check_units(anatomy, cut)


def test_groups_are_ranked_by_what_they_put_out_together() -> None:
    """A group of loud heads that cancel each other goes before one that is quiet and does not."""
    one = sample("many-groups")
    heads, _ = ends(one.anatomy)
    x, w = one.inputs[heads].clone(), one.weights[heads].clone()
    w[:, 0:8] = w[:, 0:1]
    x[:, 0:4], x[:, 4:8] = 9.0, -9.0  # nothing together
    odd = Sample(one.anatomy, {**one.weights, heads: w}, {**one.inputs, heads: x})
    cut = get_method("comp", {"groups": 3}, Form()).cut(odd.block(), 2000)
    assert cut.groups is not None
    assert cut.groups.tolist() == [1, 2, 3]
    other = get_method("comp", {"groups": 3, "order": "obs"}, Form()).cut(odd.block(), 2000)
    assert other.groups is not None
    assert len(other.groups) == 3


def check_units(anatomy: Anatomy, cut: BlockCut) -> None:
    """Only whole units are gone, with every row that feeds them, and some of each are left."""
    attention, ffn = anatomy.coupling("values"), anatomy.coupling("neurons")
    size, width = anatomy.head_size, anatomy.heads_per_group * anatomy.head_size
    inputs, rows = {}, {}
    if attention.consumer in cut.inputs:
        assert cut.groups is not None
        groups = cut.groups.tolist()
        assert 1 <= len(groups) < anatomy.kv_heads
        of_heads = [i for g in groups for i in range(g * width, (g + 1) * width)]
        of_groups = [i for g in groups for i in range(g * size, (g + 1) * size)]
        inputs[attention.consumer] = of_heads
        rows |= dict.fromkeys(attention.queries, of_heads)
        rows |= dict.fromkeys((*attention.keys, *attention.producers), of_groups)
    else:
        assert cut.groups is None
    if ffn.consumer in cut.inputs:
        left = cut.inputs[ffn.consumer].tolist()
        assert 1 <= len(left) < anatomy.ffn_width
        inputs[ffn.consumer] = left
        rows |= dict.fromkeys(ffn.producers, left)
    assert {name: kept.tolist() for name, kept in cut.inputs.items()} == inputs
    assert {name: kept.tolist() for name, kept in cut.rows.items()} == rows
    assert Plan(anatomy, [cut]).widths(cut) is not None


@pytest.mark.parametrize("share", ["15%", "65%"])
@pytest.mark.parametrize("name", [*FAMILIES, "llama-mha-untied", "biases"])
def test_only_whole_units_go(name: str, share: str, model_folder: Folder) -> None:
    result = make_plan(model_folder(name), recipe(share, structure="coupled"))
    assert result.form == Form("coupled", "per-layer", 1, result.form.reason)
    assert len(result.plan.blocks) == 4
    for cut in result.plan.blocks:
        check_units(result.plan.anatomy, cut)


@pytest.mark.parametrize(
    ("groups", "left"),
    [("keep", {None}), (4, {None}), (1, {1}), (2, {2}), (3, {3}), ("auto", ...)],
)
def test_the_number_of_groups(groups: int | str, left: Any, model_folder: Folder) -> None:
    result = make_plan(model_folder("many-groups"), recipe("40%", {"groups": groups}))
    attention, ffn = (result.plan.anatomy.coupling(kind) for kind in ("values", "neurons"))
    found = {None if c.groups is None else len(c.groups) for c in result.plan.blocks if c.inputs}
    if left is ...:
        assert len(found) > 1  # the common threshold gives each block its own number
    else:
        assert found == left
    assert any(ffn.consumer in cut.inputs for cut in result.plan.blocks)
    for cut in result.plan.blocks:
        assert (attention.consumer in cut.inputs) == (cut.groups is not None)
        check_units(result.plan.anatomy, cut)


# ---- the budget ------------------------------------------------------------------------------


def missed(result: Any) -> int:
    """Parameters that went too many (or, negative, too few)."""
    plan = result.plan
    return int(plan.sizes_before().parameters - plan.sizes().parameters - result.asked)


@pytest.mark.parametrize("share", ["7%", "40%"])
@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        ("llama-gqa-tied", {}, {}),
        ("many-groups", {}, {}),
        ("many-groups", {"shares": "uniform"}, {}),
        ("many-groups", {"layers": "auto", "inputs": "sequential"}, {}),
        ("biases", {"groups": "keep", "cap": 0.95}, {}),
        ("biases", {"exempt_first": 1, "cap": 0.95}, {}),
        ("opt-project", {}, {}),
        ("qwen3", {"allocation": "variance", "order": "obs"}, {}),
        ("wide", {}, {"round_to": 64}),
        ("wide", {}, {"round_to": 96}),
        ("wide", {"groups": "keep"}, {"round_to": 64}),
        ("wide", {"groups": "keep", "shares": "uniform"}, {"round_to": 64}),
        ("wide-opt", {"shares": "uniform"}, {"round_to": 96}),
    ],
)
def test_the_budget_is_met_within_half_a_piece(
    name: str, options: dict[str, Any], fields: dict[str, Any], share: str, model_folder: Folder
) -> None:
    """Over the whole model: what one block misses, the next makes up for."""
    result = make_plan(model_folder(name), recipe(share, options, **fields))
    anatomy = result.plan.anatomy
    largest = piece(anatomy, "neuron") * result.form.multiple
    if options.get("groups") != "keep":
        largest = max(largest, piece(anatomy, "group"))
    assert abs(missed(result)) <= largest / 2


@pytest.mark.parametrize("share", ["7%", "25%", "50%"])
def test_a_given_number_of_groups_may_be_too_much_for_one_block(
    share: str, model_folder: Folder
) -> None:
    """All surplus groups go at once where a block loses anything; that is the largest piece."""
    result = make_plan(model_folder("many-groups"), recipe(share, {"groups": 2}))
    assert abs(missed(result)) <= 2 * piece(result.plan.anatomy, "group")


def test_a_miss_is_carried_over_a_resumed_run(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks count with what they lost, not with what they should have lost."""
    source = model_folder("many-groups")
    asked = recipe("45%")
    whole = prune(source, tmp_path / "whole", asked, verify=False)
    anatomy = whole.plan.anatomy
    assert abs(missed(whole)) <= piece(anatomy, "group") / 2

    from secateur.outputs import hf

    write_block = hf.write_block
    for stop in (1, 3):

        def interrupt(*args: Any, stop: int = stop, **settings: Any) -> str:
            if settings["number"] == stop:
                raise KeyboardInterrupt
            return write_block(*args, **settings)

        monkeypatch.setattr(hf, "write_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "pieces", asked, verify=False)
    monkeypatch.setattr(hf, "write_block", write_block)
    pieces = prune(source, tmp_path / "pieces", asked, verify=False)
    assert missed(pieces) == missed(whole)
    assert bytes_of(pieces.out) == bytes_of(whole.out)


@st.composite
def legal_curves(draw: st.DrawFn) -> tuple[dict[str, Curve], dict[str, int]]:
    curves, costs = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        steps = draw(st.lists(st.integers(1, 40), min_size=0, max_size=12))
        legal = [0, *itertools.accumulate(steps)]
        inner = draw(st.lists(st.sampled_from(legal), max_size=6))
        counts = sorted({0, legal[-1], *inner})
        values = [draw(st.floats(0, 10)) for _ in counts]
        curves[name] = Curve(counts, values, legal)
        costs[name] = draw(st.integers(1, 50))
    return curves, costs


@settings(max_examples=300, deadline=None)
@given(legal_curves(), st.floats(0, 1))
def test_the_search_ends_on_legal_counts_only(
    case: tuple[dict[str, Curve], dict[str, int]], share: float
) -> None:
    curves, costs = case

    def removed(counts: Mapping[str, int]) -> int:
        return sum(costs[name] * count for name, count in counts.items())

    most = removed({name: curve.counts[-1] for name, curve in curves.items()})
    quota = round(share * most)
    counts, _ = threshold_search(curves, removed, quota)
    steps = [0]
    for name, curve in curves.items():
        assert curve.legal is not None
        assert counts[name] in curve.legal
        steps += [costs[name] * (b - a) for a, b in itertools.pairwise(curve.legal)]
    assert abs(removed(counts) - quota) <= max(steps) / 2


# ---- one width for all -----------------------------------------------------------------------


def opened(folder: Path) -> Any:
    """Opened by transformers without any code of ours; everything must be found."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def some_tokens() -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))


def planned_logits(source: Path, plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """The original with the plan as zeros and scales."""
    stream = Stream(open_checkpoint(source))
    hidden = masked_hidden(stream, plan, tokens, torch.float32)
    found: list[torch.Tensor] = []
    stream.head(hidden, tokens, lambda _, window: found.append(window))
    return torch.stack(found)


@pytest.mark.parametrize(("share", "options"), [("25%", {}), ("40%", {}), ("45%", {"layers": 1})])
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_classes_open_uniform_models(
    name: str, share: str, options: dict[str, Any], model_folder: Folder, tmp_path: Path
) -> None:
    source = model_folder(name)
    result = prune(source, tmp_path / "out", recipe(share, options, layout="uniform"), verify=False)
    widths = {result.plan.widths(cut) for cut in result.plan.blocks}
    assert len(widths) == 1
    found = widths.pop()
    assert found is not None
    model = opened(result.out)
    assert type(model).__name__ == FAMILIES[name]
    tokens = some_tokens()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(
        logits, planned_logits(source, result.plan, tokens), rtol=1e-4, atol=1e-5
    )
    config = json.loads((result.out / "config.json").read_text())
    assert config["ffn_dim" if name == "opt" else "intermediate_size"] == found.ffn
    assert config["num_attention_heads"] == found.query_heads
    assert config["num_hidden_layers"] == len(result.plan.blocks)
    if name != "opt":
        assert config["num_key_value_heads"] == found.kv_groups
    assert not list(result.out.glob("*.py"))
    # Any block's width moves with all others: no nearer than half such a step.
    step = len(result.plan.blocks) * piece(result.plan.anatomy, "neuron")
    assert abs(missed(result)) <= step / 2


@pytest.mark.parametrize(("share", "groups"), [("20%", 4), ("62%", 2), ("70%", 1)])
def test_as_few_groups_go_as_the_width_of_the_ffn_allows(
    share: str, groups: int, model_folder: Folder
) -> None:
    """With three of four groups LLaMA has six heads, of which 32 is no multiple."""
    result = make_plan(model_folder("many-groups"), recipe(share, layout="uniform"))
    assert result.form.groups == (1, 2, 4)
    widths = result.plan.uniform
    assert widths is not None
    assert widths.kv_groups == groups
    assert widths.query_heads == 2 * groups


def test_what_the_class_cannot_hold_is_refused(model_folder: Folder) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(model_folder("many-groups"), recipe("60%", {"groups": 3}, layout="uniform"))
    assert str(caught.value) == (
        "groups is 3, but the stock class of llama holds 1, 2, 4 KV groups: choose one of these, "
        "auto or keep"
    )
    mistral = {**MODELS["many-groups"][1]}
    with pytest.MonkeyPatch.context() as patch:  # whose class holds any number
        patch.setitem(tiny.MODELS, "mistral-groups", ("mistral", mistral))
        made = recipe("60%", {"groups": 3}, layout="uniform")
        plan = make_plan(model_folder("mistral-groups"), made).plan
    assert plan.uniform is not None
    assert plan.uniform.kv_groups == 3


def test_a_uniform_model_is_pruned_again(model_folder: Folder, tmp_path: Path) -> None:
    """Its config says fewer heads of the same size; that is where the next run starts from."""
    uniform = recipe("40%", {"groups": 2}, layout="uniform")
    once = prune(model_folder("many-groups"), tmp_path / "once", uniform, verify=False)
    assert once.plan.uniform is not None
    twice = prune(
        once.out, tmp_path / "twice", recipe("20%", {"groups": 1}, layout="uniform"), verify=False
    )
    assert twice.plan.anatomy.kv_heads == 2
    assert twice.plan.anatomy.head_size == 4
    assert twice.plan.anatomy.ffn_width == once.plan.uniform.ffn
    model = opened(twice.out)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    tokens = some_tokens()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(
        logits, planned_logits(once.out, twice.plan, tokens), rtol=1e-4, atol=1e-5
    )
    thrice = make_plan(once.out, recipe("30%"))  # with widths of their own, too
    assert abs(missed(thrice)) <= piece(thrice.plan.anatomy, "group") / 2


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_the_same_bytes_when_repeated(layout: str, model_folder: Folder, tmp_path: Path) -> None:
    made = recipe("40%", {"layers": "auto"}, layout=layout)
    one, two = (
        prune(model_folder("qwen2"), tmp_path / name, made, verify=False) for name in ("one", "two")
    )
    assert bytes_of(one.out) == bytes_of(two.out)


def test_what_one_width_costs_is_recorded_and_printed(model_folder: Folder, tmp_path: Path) -> None:
    source = model_folder("llama-gqa-tied")
    result = prune(source, tmp_path / "out", recipe(layout="uniform"), verify=False)
    cost = result.layout_cost
    assert cost is not None
    assert set(cost) == {"uniform", "per-layer"}
    record = json.loads((result.out / RECORD).read_text())["form"]
    assert record == {
        "structure": "coupled",
        "layout": "uniform",
        "round_to": 1,
        "why": "an FFN of 48 is too narrow for multiples of 32",
        "held_out_loss": cost,
    }
    said = secateur("plan", source, "--method", "comp", *SMALL, "--layout", "uniform").fine()
    free, same = cost["per-layer"], cost["uniform"]
    assert (
        f"one width for all blocks: perplexity {math.exp(same):.2f} on held-out windows, with "
        f"widths of their own {math.exp(free):.2f} ({math.expm1(same - free):+.1%})"
    ) in said.splitlines()

    other = prune(source, tmp_path / "other", recipe(), verify=False)
    assert other.layout_cost is None
    assert "held_out_loss" not in json.loads((other.out / RECORD).read_text())["form"]
    assert "one width" not in secateur("plan", source, *SMALL).fine()


def test_one_width_may_reach_what_widths_of_their_own_cannot(model_folder: Folder) -> None:
    """Three of the four blocks are exempt from the latter: nothing to compare with."""
    source = model_folder("llama-gqa-tied")
    made = make_recipe(
        remove="40%",
        of="decoder",
        method="comp",
        options={"layers": 0, "exempt_first": 2, "exempt_last": 1},
        calibration=SHORT,
        layout="uniform",
    )
    result = make_plan(source, made)
    assert result.layout_cost is not None
    assert set(result.layout_cost) == {"uniform"}
    with pytest.raises(RecipeError, match="leave 1 blocks"):
        make_plan(source, made.model_copy(update={"layout": "per-layer"}))
    wish = ("--remove", "40%", "--of", "decoder", "--layers", "0", "--samples", "4", "--length",
            "24", "--layout", "uniform", "--set", "exempt_first=2", "--set",
            "exempt_last=1")  # fmt: skip
    said = secateur("plan", source, *wish).fine()
    assert re.search(
        r"^one width for all blocks: perplexity [\d.]+ on held-out windows$", said, re.MULTILINE
    )


# ---- multiples -------------------------------------------------------------------------------

SMALL = ("--remove", "30%", "--of", "decoder", "--samples", "4", "--length", "24", "--layers", "0",
         "--set", "exempt_first=0", "--set", "exempt_last=0", "--set", "grid=8")  # fmt: skip


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("multiple", [1, 64, 96])
@pytest.mark.parametrize("name", ["wide", "wide-opt"])
def test_kept_widths_are_multiples(
    name: str, multiple: int, layout: str, model_folder: Folder
) -> None:
    result = make_plan(model_folder(name), recipe("30%", layout=layout, round_to=multiple))
    assert (result.form.multiple, result.form.reason) == (multiple, "as asked")
    kept = {width.ffn for cut in result.plan.blocks if (width := result.plan.widths(cut))}
    assert kept != {512}
    assert all(width % multiple == 0 for width in kept - {512})
    if layout == "uniform":
        assert len(kept) == 1


def test_columns_of_the_ffn_are_rounded_too(model_folder: Folder) -> None:
    result = make_plan(model_folder("wide"), recipe("20%", {"denses": "neurons"}, round_to=64))
    assert result.form.structure == "inputs"
    kept = {len(cut.inputs["mlp.down_proj"]) for cut in result.plan.blocks if cut.inputs}
    assert kept
    assert all(width % 64 == 0 for width in kept)


@pytest.mark.parametrize(
    ("width", "fields", "target", "multiple", "reason"),
    [
        (1536, {}, Target(), 64, "tiles of matrix kernels, and whole blocks of q8_0 and q4_0"),
        (1536, {}, Target("gguf", "q8_0"), 64,
         "tiles of matrix kernels, and whole blocks of q8_0 and q4_0"),
        (1536, {}, Target("gguf", "q4_k_m"), 256, "q4_k_m stores rows in blocks of 256"),
        (11008, {}, Target("gguf", "iq4_xs"), 256, "iq4_xs stores rows in blocks of 256"),
        (1024, {}, Target("gguf", "q6_k"), 128, "an FFN of 1024 has too few multiples of 256"),
        (320, {}, Target(), 32, "an FFN of 320 has too few multiples of 64"),
        (191, {}, Target(), 1, "an FFN of 191 is too narrow for multiples of 32"),
        (1536, {"layout": "uniform"}, Target(), 32,
         "one width for all blocks needs small steps to meet the share"),
        (11008, {"layout": "uniform"}, Target(), 64,
         "tiles of matrix kernels, and whole blocks of q8_0 and q4_0"),
        (1536, {"structure": "inputs"}, Target(), 1, "columns go one at a time"),
        (1536, {"round_to": 96}, Target("gguf", "q4_k_m"), 96, "as asked"),
    ],
)  # fmt: skip
def test_the_multiple_that_is_chosen(
    width: int, fields: dict[str, Any], target: Target, multiple: int, reason: str
) -> None:
    entry = ("llama", {"num_key_value_heads": 2, "intermediate_size": width})
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setitem(tiny.MODELS, "any", entry)
        anatomy = describe(_skeleton(entry))
    form = resolve(
        make_recipe(remove="20%", **fields), anatomy, target, tied=True, stock_groups=(1, 2)
    )
    assert (form.multiple, form.reason) == (multiple, reason)


def _skeleton(entry: tuple[str, dict[str, Any]]) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[entry[0]](
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=64, **entry[1]
    )
    return AutoModelForCausalLM.from_config(config)


PIECES = (
    "allowed are auto, 1, and multiples of 32, which is the smallest piece that kernels and "
    "quantisers take; try --round-to 64"
)


@pytest.mark.parametrize("wish", ["16", "33", "0", "-32", "abc", "64.0", "", "1e2"])
def test_what_no_multiple_can_be(wish: str, model_folder: Folder, tmp_path: Path) -> None:
    source = model_folder("wide")
    text = f"--round-to is {wish}: {PIECES}"
    secateur("plan", source, *SMALL, f"--round-to={wish}").refused_at_once(
        " ".join(text.split())  # as every error is one line
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"remove": "20%", "round_to": wish}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value) == text


@pytest.mark.parametrize("wish", [True, 64.5, None, [64]])
def test_what_no_multiple_can_be_in_a_recipe(wish: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(remove="20%", round_to=wish)
    assert str(caught.value) == f"--round-to is {wish}: {PIECES}"


@pytest.mark.parametrize(
    ("name", "wish", "text"),
    [
        ("wide", 512, "--round-to is 512, but the FFN is only 512 wide: allowed here are 1, 32, "
         "64, 256 and other multiples of 32 below 512"),
        ("wide", 4096, "--round-to is 4096, but the FFN is only 512 wide: allowed here are 1, 32, "
         "64, 256 and other multiples of 32 below 512"),
        ("qwen2", 64, "--round-to is 64, but the FFN is only 48 wide: allowed here are 1, 32 and "
         "other multiples of 32 below 48"),
        ("narrow", 32, "--round-to is 32, but the FFN is only 24 wide: allowed here is 1"),
    ],
)  # fmt: skip
def test_a_multiple_wider_than_the_ffn(
    name: str, wish: int, text: str, model_folder: Folder
) -> None:
    secateur("plan", model_folder(name), *SMALL, "--round-to", wish).refused_at_once(text)


def test_a_miss_of_the_budget_is_explained(model_folder: Folder) -> None:
    def reason(name: str, *wishes: str) -> str:
        said = secateur("plan", model_folder(name), *SMALL, *wishes).fine()
        (line,) = re.findall(r"^the difference is above 0.2 points: (.*)$", said, re.MULTILINE)
        return str(line)

    assert reason("wide", "--round-to", "96") == (
        "KV groups go whole, and FFN neurons 96 at a time"
    )
    assert reason("wide", "--round-to", "96", "--layout", "uniform") == (
        "all 4 widths go in steps of 96 together; try --round-to 1, or another --layers"
    )
    assert reason("llama-gqa-tied", "--set", "groups=1", "--remove", "5%") == ("KV groups go whole")


# ---- wishes that contradict each other -------------------------------------------------------

INDEX = (
    "a GGUF file cannot hold --structure inputs, whose layers read through an index: use "
    "--structure coupled, or give --out a folder name"
)
OPT = (
    "llama.cpp has no architecture for OPT (learned positions, ReLU, LayerNorm): GGUF can be "
    "written of llama, mistral, qwen2, qwen3, smollm3, granite; for this model give --out a folder "
    "name, which transformers opens"
)


@pytest.mark.parametrize(
    ("name", "out", "wishes", "text"),
    [
        ("qwen2", "out", ("--structure", "inputs", "--layout", "uniform"),
         "--structure inputs leaves layers that read through an index, which no stock class has: "
         "use --structure coupled with --layout uniform"),
        ("qwen2", "out", ("--set", "denses=all", "--layout", "uniform"),
         "--structure inputs leaves layers that read through an index, which no stock class has: "
         "use --structure coupled with --layout uniform"),
        ("qwen2", "out.gguf", ("--structure", "inputs"), INDEX),
        ("qwen2", "out.gguf", ("--set", "denses=neurons"), INDEX),
        ("qwen2", "out", ("--structure", "coupled", "--set", "denses=all"),
         "denses names the layers that lose inputs one by one, which --structure coupled does not "
         "do: leave out denses, or use --structure inputs"),
        ("qwen2", "out", ("--structure", "inputs", "--set", "groups=1"),
         "groups counts whole KV groups, of which --structure inputs takes single columns: leave "
         "out groups, or use --structure coupled"),
        ("qwen2", "out", ("--set", "denses=all", "--set", "groups=keep"),
         "groups counts whole KV groups, of which --structure inputs takes single columns: leave "
         "out groups, or use --structure coupled"),
        ("qwen3-untied", "out.gguf", ("--layout", "per-layer"),
         "llama.cpp has no architecture for qwen3 blocks of different widths: use --layout "
         "uniform, or give --out a folder name"),
        ("granite", "out.gguf", ("--layout", "per-layer"),
         "llama.cpp has no architecture for granite blocks of different widths: use --layout "
         "uniform, or give --out a folder name"),
        ("opt", "out.gguf", (), OPT),
        ("opt", "out.gguf", ("--layout", "uniform"), OPT),
        ("many-groups", "out", ("--set", "groups=5"),
         "groups is 5, but every block has 4 KV groups: allowed are 1 to 4, auto and keep"),
        ("many-groups", "out", ("--set", "groups=0"),
         "option of method obs groups is 0: Input should be greater than or equal to 1, or Input "
         "should be 'auto' or 'keep'"),
        ("many-groups", "out", ("--set", "groups=some"),
         "option of method obs groups is 'some': Input should be a valid integer, unable to parse "
         "string as an integer, or Input should be 'auto' or 'keep'"),
        ("opt", "out", ("--layout", "uniform", "--set", "groups=2"),
         "groups is 2, but the stock class of opt holds 4 KV groups: choose one of these, auto or "
         "keep"),
        ("qwen2", "out", ("--structure", "heads"),
         "recipe field structure is 'heads': Input should be 'auto', 'coupled' or 'inputs'"),
        ("qwen2", "out", ("--layout", "same"),
         "recipe field layout is 'same': Input should be 'auto', 'per-layer' or 'uniform'"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_at_once(
    name: str, out: str, wishes: tuple[str, ...], text: str, model_folder: Folder, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tiny.MODELS, "qwen3-untied",
            ("qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}),
        )  # fmt: skip
        patch.setitem(tiny.MODELS, "granite", ("granite", {"num_key_value_heads": 2}))
        source = model_folder(name)
    ended = secateur("prune", source, "--out", tmp_path / out, *SMALL, *wishes)
    ended.refused_at_once(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "tied", "layout"),
    [
        ("llama", True, "per-layer"), ("mistral", False, "per-layer"), ("qwen2", True, "per-layer"),
        ("qwen3", True, "per-layer"), ("qwen3", False, "uniform"), ("granite", True, "uniform"),
        ("smollm3", True, "uniform"),
    ],
)  # fmt: skip
def test_the_layout_that_a_file_can_hold(name: str, tied: bool, layout: str) -> None:
    anatomy = describe(_skeleton((name, {"num_key_value_heads": 2, "pad_token_id": 0})))
    made = make_recipe(remove="20%")
    for target, wanted in ((Target("gguf", "f16"), layout), (Target(), "per-layer")):
        form = resolve(made, anatomy, target, tied=tied, stock_groups=(1, 2))
        assert (form.structure, form.layout) == ("coupled", wanted)
        assert form.groups == ((1, 2) if wanted == "uniform" else None)


def test_gguf_refusals_are_of_the_output() -> None:
    anatomy = describe(_skeleton(("llama", {"num_key_value_heads": 2})))
    made = make_recipe(remove="20%", structure="inputs")
    with pytest.raises(OutputError):
        resolve(made, anatomy, Target("gguf", "f16"), tied=True, stock_groups=(1, 2))


# ---- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"structure": "coupled", "layout": "uniform", "round_to": 64},
        {"structure": "inputs", "layout": "per-layer", "round_to": 1},
        {"structure": "auto", "layout": "auto", "round_to": "auto"},
    ],
)
def test_recipes_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    made = make_recipe(remove="20%", **fields)
    assert {key: getattr(made, key) for key in fields} == fields
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made.model_dump()))
    assert load_recipe(file) == made
    file.write_text(made.model_dump_json())
    assert load_recipe(file) == made
    over = load_recipe(file, structure="auto", layout="uniform", round_to="32")
    assert (over.structure, over.layout, over.round_to) == ("auto", "uniform", 32)


def test_a_recipe_file_and_options_over_it(model_folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "remove: 30%\nof: decoder\nstructure: coupled\nlayout: uniform\nround_to: 64\n"
        "calibration: {samples: 4, length: 24}\n"
        "options: {layers: 0, exempt_first: 0, exempt_last: 0, grid: 8}\n"
    )
    source = model_folder("wide")

    def form(*wishes: str) -> list[str]:
        said = secateur("plan", source, "--recipe", file, *wishes).fine()
        uniform = "one width for all blocks" in said
        (multiple,) = re.findall(r"^FFN widths: multiples of (\d+) ", said, re.MULTILINE)
        return ["uniform" if uniform else "per-layer", multiple]

    assert form() == ["uniform", "64"]
    assert form("--layout", "per-layer") == ["per-layer", "64"]
    assert form("--round-to", "1") == ["uniform", "1"]
    assert form("--layout", "auto", "--round-to", "auto") == ["per-layer", "64"]
    assert form("--layout", "per-layer", "--structure", "inputs", "--round-to", "auto") == [
        "per-layer", "1",
    ]  # fmt: skip
