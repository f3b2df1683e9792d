"""Methods that make zeros: the same checks as for those that remove, and what is their own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import bytes_of
from forks import forks
from hypothesis import given
from hypothesis import strategies as st
from test_kill import KILLED
from test_outputs import logits_of, modules_cache, random_tokens, reopen

from secateur.anatomy import Anatomy
from secateur.checkpoint import open_checkpoint
from secateur.checkpoint.packed import pack, packed_shape, unpack
from secateur.comparison.cells import make_cells
from secateur.engine import Engine
from secateur.errors import OutputError, RecipeError, SecateurError, SourceError
from secateur.exporting import export, verify
from secateur.forms import Form
from secateur.masking import masked_hidden
from secateur.methods import Block, get_method, method_class, method_names
from secateur.methods.ria import Ria
from secateur.methods.sparse import SAME_SIZE, SparseMethod
from secateur.outputs.packed import NOTE
from secateur.outputs.verify import Verification
from secateur.pipeline import make_plan
from secateur.progress import Progress
from secateur.pruning import prune
from secateur.recipe import Recipe, load_recipe, make_recipe
from secateur.semi_structured import is_two_of_four, semi_structured
from secateur.solvers.patterns import lowest_in_groups
from secateur.solvers.permutation import assign, deal, retained
from secateur.solvers.removal import Removal, remove
from secateur.solvers.sparsity_budget import by_error, by_outliers, error_curve, outlier_ratio
from secateur.sparsity import parse_sparsity
from secateur.streaming import Stream

__all__ = ["modules_cache"]  # a fixture that runs by itself

Folder = Callable[[str], Path]
FAMILIES = ["llama-gqa-tied", "llama-biases", "opt"]
#: Method, sparsity and options, as many as go different ways.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "magnitude": ("magnitude", "50%", {}),
    "magnitude rows": ("magnitude", "2:4", {"compete": "row"}),
    "random": ("random-sparse", "30%", {}),
    "wanda": ("wanda", "50%", {}),
    "wanda 1:4": ("wanda", "1:4", {"scope": "layer"}),
    "wanda owl": ("wanda", "60%", {"allocation": "owl"}),
    "ria": ("ria", "50%", {}),
    "ria 2:4": ("ria", "2:4", {}),
    "ria 4:8": ("ria", "4:8", {"permute": "deal", "scope": "block"}),
    "ria 1:2": ("ria", "1:2", {"permute": "none"}),
    "sparsegpt": ("sparsegpt", "50%", {"block": 16, "scope": "block"}),
    "sparsegpt 2:4": ("sparsegpt", "2:4", {}),
    "apt": ("apt", "60%", {}),
    "apt error": ("apt", "50%", {"allocation": "error"}),
    "apt SM": ("apt", "50%", {"solution": "SM", "polish": 0, "pull": 0.1}),
    "apt MS": ("apt", "2:4", {"solution": "MS"}),
    "apt all": ("apt", "4:8", {"block": "all", "scope": "layer"}),
}
TO_KILL = ["apt", "ria 2:4", "wanda owl"]


def recipe(case: str, **fields: Any) -> Recipe:
    method, sparsity, options = CASES[case]
    return make_recipe(
        **{
            "sparsity": sparsity, "method": method, "options": options,
            "calibration": {"samples": 3, "length": 20}, **fields,
        }
    )  # fmt: skip


def test_every_method_is_here() -> None:
    zeros = {n for n in method_names() if method_class(n).makes_zeros}
    assert {method for method, _, _ in CASES.values()} == zeros


@pytest.mark.parametrize(
    ("sparsity", "allocation", "spread"),
    [("50%", "error", 0.15), ("80%", "error", 0.1), ("4%", "owl", 0.02), ("50%", "uniform", 0.0)],
)
def test_layers_go_no_further_from_the_mean_than_half_the_way(
    sparsity: str, allocation: str, spread: float
) -> None:
    method = get_method("apt", {"allocation": allocation}, Form(sparsity=parse_sparsity(sparsity)))
    assert isinstance(method, SparseMethod)
    assert method.spread == pytest.approx(spread)


def linear_weights(model: Any, anatomy: Anatomy) -> list[dict[str, torch.Tensor]]:
    blocks = model.get_submodule(anatomy.family.blocks)
    return [{n: b.get_parameter(f"{n}.weight") for n in anatomy.denses} for b in blocks]


def done_evenly(asked: Recipe) -> bool:
    usual = "error" if asked.method == "apt" else "uniform"
    return asked.options.get("allocation", usual) == "uniform"


@pytest.mark.parametrize(
    ("name", "sparsity", "options", "wanted"),
    [
        ("apt", "50%", {}, "error"),
        ("apt", "50%", {"allocation": "uniform"}, "uniform"),
        ("apt", "2:4", {}, "uniform"),  # nothing to share out
        ("apt", "5%", {"allocation": "owl"}, "owl"),
        ("wanda", "50%", {}, "uniform"),
        ("sparsegpt", "50%", {"allocation": "error"}, "error"),
    ],
)
def test_how_sparsity_is_shared_out(
    name: str, sparsity: str, options: dict[str, Any], wanted: str
) -> None:
    method = get_method(name, options, Form(sparsity=parse_sparsity(sparsity)))
    assert isinstance(method, SparseMethod)
    assert method.allocation == wanted
    assert (method.survey_by(None, 100) is None) == (wanted == "uniform")  # type: ignore[arg-type]
    assert method.survey_needs == ("channels" if wanted == "owl" else method.needs)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_the_folder_computes_what_the_plan_says(
    case: str, name: str, model_folder: Folder, tmp_path: Path
) -> None:
    source, asked = model_folder(name), recipe(case)
    done = prune(source, tmp_path / "out", asked, verify=False)
    plan, anatomy = done.plan, done.plan.anatomy
    assert plan.sizes() == plan.sizes_before()
    assert make_plan(source, asked).plan.zeros == plan.zeros
    model = reopen(done.out)
    assert type(model).__module__.startswith("transformers.")  # a stock class
    config = json.loads((done.out / "config.json").read_text())
    assert "auto_map" not in config

    # The zeros are as many as were asked for, where they were asked for.
    pattern = parse_sparsity(asked.sparsity or "")
    zeros = weights = 0
    for block in linear_weights(model, anatomy):
        for weight in block.values():
            gone = weight == 0
            zeros, weights = zeros + int(gone.sum()), weights + gone.numel()
            if pattern.grouped:
                kept = (~gone).unflatten(1, (-1, pattern.group)).sum(2)
                assert bool((kept == pattern.kept).all())
            elif done_evenly(asked):
                assert abs(int(gone.sum()) - pattern.share * gone.numel()) <= 1
    assert zeros == plan.zeros
    assert abs(zeros / weights - pattern.share) < 2e-3

    stream, tokens = Stream(open_checkpoint(source)), random_tokens(2, 12)
    found: list[torch.Tensor] = []
    hidden = masked_hidden(stream, plan, tokens, torch.float32)
    stream.head(hidden, tokens, lambda _, window: found.append(window))
    torch.testing.assert_close(logits_of(model, tokens), torch.stack(found), rtol=1e-4, atol=1e-4)
    whole = torch.stack(found).clone()
    found.clear()
    stream.head(stream.forward(tokens), tokens, lambda _, window: found.append(window))
    assert (whole - torch.stack(found)).abs().max() > 1e-2  # and something was lost


def test_it_is_verified_and_says_that_it_is_no_smaller(
    model_folder: Folder, tmp_path: Path
) -> None:
    done = prune(model_folder("llama-gqa-tied"), tmp_path / "out", recipe("apt"))
    assert done.verification is not None
    card = (done.out / "README.md").read_text()
    page = (done.out / "report.html").read_text()
    asked = f"Asked were {done.asked:,} zeros (--sparsity 60%), made were {done.plan.zeros:,}"
    for text in (card, page):
        assert f"{asked}: {SAME_SIZE}." in text
    assert "- sparse" in card
    record = json.loads((done.out / "secateur.json").read_text())
    assert record["reached"] == {"parameters_removed": 0, "zeros": done.plan.zeros}


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
@pytest.mark.parametrize("scope", ["block", "sublayer", "layer"])
def test_statistics_see_what_was_cut_before(scope: str, name: str, model_folder: Folder) -> None:
    """Against the whole model in memory, its weights replaced one stage after the other."""
    from transformers import AutoModelForCausalLM

    source = model_folder(name)
    checkpoint = open_checkpoint(source)
    run_options = {"block": 16, "scope": scope}
    asked = make_recipe(
        method="sparsegpt", sparsity="50%", options=run_options,
        calibration={"samples": 3, "length": 20},
    )  # fmt: skip
    from secateur.pipeline import Run
    from secateur.progress import Progress

    run = Run(
        source, asked, device="cpu", max_memory=None, trust_remote_code=False, progress=Progress()
    )
    plan, _, _ = run.find()
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    blocks = model.get_submodule(plan.anatomy.family.blocks)
    denses = plan.anatomy.denses
    stages: list[list[str]] = []
    for path in denses:
        last = stages[-1][0] if stages else ""
        alike = {
            "block": True,
            "sublayer": last.rpartition(".")[0] == path.rpartition(".")[0],
            "layer": last != "" and denses[last].reads == denses[path].reads,
        }[scope]
        if stages and alike:
            stages[-1].append(path)
        else:
            stages.append([path])
    assert len(stages) == {"block": 1, "sublayer": 2, "layer": 4}[scope]
    for block, cut in zip(blocks, plan.blocks, strict=True):
        for stage in stages:
            seen: dict[str, list[torch.Tensor]] = {path: [] for path in stage}
            hooks = [
                block.get_submodule(p).register_forward_pre_hook(
                    lambda _, args, into=seen[p]: into.append(
                        args[0].reshape(-1, args[0].shape[-1])
                    )
                )
                for p in stage
            ]
            with torch.no_grad():
                model(input_ids=run.windows.tokens)
            for hook in hooks:
                hook.remove()
            for path in stage:
                x = torch.cat(seen[path]).double()
                weight = block.get_parameter(f"{path}.weight")
                how = Removal("S", "S", 16, 0.01, shrinking=True)
                count = round(weight.numel() / 2)
                wanted = remove(
                    weight.detach(), x.T @ x / len(x), parse_sparsity("50%"), count, how
                )
                close = (cut.weights[path] - wanted.weight).abs()
                assert float(close.median()) < 1e-4  # a tie may fall the other way
                assert float((close > 1e-3).double().mean()) < 0.02
                with torch.no_grad():
                    weight.copy_(cut.weights[path])
    assert checkpoint.config.num_hidden_layers == len(plan.blocks)


@pytest.fixture(scope="module")
def forked(model_folder: Folder) -> Any:
    """Prune in a fork, to its end or to the moment at which it is killed."""
    with forks(model_folder("llama-gqa-tied"), recipe) as ask:
        yield ask


@pytest.mark.parametrize("case", TO_KILL)
def test_killed_and_gone_on_with(case: str, forked: Any, tmp_path: Path) -> None:
    status, moments = forked(case, tmp_path / "whole")
    assert status == 0
    wanted = bytes_of(tmp_path / "whole")
    for at in [i for i, name in enumerate(moments) if name.startswith("after line")]:
        out = tmp_path / str(at) / "out"
        assert forked(case, out, at)[0] == KILLED
        assert forked(case, out)[0] == 0
        assert bytes_of(out) == wanted


# ---- shared out ------------------------------------------------------------------------------


def test_error_curves_are_sums_of_single_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 10, generator=generator)
    second, weight = (x.T @ x).double() / 100, torch.randn(7, 10, generator=generator)
    curve = error_curve(weight, second)
    h = second + 0.01 * second.diagonal().mean() * torch.eye(10).double()
    scores = (weight.double().square() / torch.linalg.inv(h).diagonal()).flatten().sort()[0]
    whole = float((weight.double() @ h).mul(weight.double()).sum())
    assert curve[0] == 0
    assert curve[50] == pytest.approx(float(scores[:35].sum()) / whole)


def test_zeros_go_where_they_cost_least() -> None:
    """At equal price: brute force over two layers of two blocks."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(100, 8, generator=generator)
    second = (x.T @ x).double() / 100
    sizes = {"a": 80, "b": 160}
    surveys = {
        b: {
            n: error_curve(torch.randn(s // 8, 8, generator=generator).pow(1 + 2 * b), second)
            for n, s in sizes.items()
        }
        for b in (0, 1)
    }
    counts = by_error(surveys, sizes, 0.5, 0.2)
    assert sum(sum(c.values()) for c in counts.values()) == 240
    shares = {(b, n): counts[b][n] / sizes[n] for b in counts for n in sizes}
    assert all(0.3 - 0.02 <= share <= 0.7 + 0.02 for share in shares.values())

    def total(at: dict[tuple[int, str], float]) -> float:
        return sum(surveys[b][n][min(99, round(100 * s))] for (b, n), s in at.items())

    assert total(shares) < total(dict.fromkeys(shares, 0.5))
    for first, other in itertools.permutations(
        shares, 2
    ):  # no exchange of a few points between two layers is better
        moved = {
            **shares,
            first: shares[first] + 0.04,
            other: shares[other] - 0.04 * sizes[first[1]] / sizes[other[1]],
        }
        if all(0.3 <= s <= 0.7 for s in moved.values()):
            assert total(moved) >= total(shares) - 2e-3


def test_errors_count_by_the_influence_of_their_block(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, tokens = Stream(open_checkpoint(model_folder("llama-gqa-tied"))), random_tokens(4, 16)
    method = get_method("apt", {}, Form(sparsity=parse_sparsity("50%")))
    assert isinstance(method, SparseMethod)
    engine = Engine(stream, method, to_remove=0, seed=0, dtype=torch.float32, progress=Progress())
    survey, seen = method.survey, []

    def noted(block: Block) -> Any:
        seen.append(block.influence)
        found, half = survey(block), survey(replace(block, influence=block.influence / 2))
        assert all(half[n] == pytest.approx([e / 2 for e in found[n]]) for n in found)
        with pytest.raises(ArithmeticError, match="what it puts out is not finite"):
            survey(replace(block, influence=float("nan")))
        return found

    monkeypatch.setattr(method, "survey", noted)
    engine.shares(engine.choose_layers(tokens), tokens)
    hidden = stream.embed(tokens)
    for layer, influence in enumerate(seen):
        with stream.block(layer) as module:
            behind = stream.forward_block(layer, module, hidden)
        cosine = torch.nn.functional.cosine_similarity(hidden, behind, dim=-1)
        assert influence == pytest.approx(1 - float(cosine.mean()), abs=1e-6)
        hidden = behind
    assert len(seen) == stream.anatomy.layers


def test_blocks_with_more_outliers_get_fewer_zeros() -> None:
    sizes = {"a": 1000, "b": 3000}
    surveys = {0: {"a": 0.02, "b": 0.02}, 1: {"a": 0.0, "b": 0.0}, 2: {"a": 0.01, "b": 0.01}}
    counts = by_outliers(surveys, sizes, 0.6, 0.08)
    shares = [counts[b]["b"] / 3000 for b in range(3)]
    assert shares == pytest.approx([0.52, 0.68, 0.60], abs=1e-3)
    assert sum(sum(c.values()) for c in counts.values()) == round(0.6 * 3 * 4000)


def test_outliers_are_scores_far_above_the_mean() -> None:
    weight = torch.ones(2, 50)
    weight[0, 0] = 400
    assert outlier_ratio(weight, torch.ones(50).double(), 5) == pytest.approx(0.01)


# ---- after a removal -------------------------------------------------------------------------


def test_zeros_after_units_went(model_folder: Folder, tmp_path: Path) -> None:
    source = model_folder("llama-gqa-tied")
    asked = make_recipe(
        remove="20%", of="decoder", method="obs", then="apt", sparsity="2:4",
        options={"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8, "copies": 0},
        round_to="auto", calibration={"samples": 4, "length": 20},
    )  # fmt: skip
    done = prune(source, tmp_path / "out", asked)
    plan = done.plan
    assert done.verification is not None
    assert plan.gone > 0
    model = reopen(done.out)
    for block in linear_weights(model, plan.anatomy):
        for weight in block.values():
            kept = (weight != 0).unflatten(1, (-1, 4)).sum(2)
            assert bool((kept <= 2).all())
            assert float((weight == 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert plan.zeros == sum(
        int((w == 0).sum()) for b in linear_weights(model, plan.anatomy) for w in b.values()
    )
    card = (done.out / "README.md").read_text()
    assert f"What is left has {plan.zeros:,} zeros (--sparsity 2:4): {SAME_SIZE}." in card


def test_zeros_behind_a_removal_by_gradients(model_folder: Folder) -> None:
    fields: dict[str, Any] = {
        "remove": "20%", "of": "decoder", "method": "llm-pruner",
        "options": {"groups": "keep", "exempt_first": 0, "exempt_last": 0},
        "calibration": {"samples": 3, "length": 20},
    }  # fmt: skip
    source = model_folder("llama-gqa-tied")
    alone = make_plan(source, make_recipe(**fields)).plan
    both = make_plan(source, make_recipe(**fields, then="magnitude", sparsity="50%")).plan
    assert both.gone == alone.gone
    for one, other in zip(alone.blocks, both.blocks, strict=True):
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
    assert both.zeros == pytest.approx(0.5 * (alone.sizes().decoder - 4 * 64), rel=0.01)


def test_behind_a_removal_the_units_are_those_of_the_removal(model_folder: Folder) -> None:
    source = model_folder("opt")
    fields: dict[str, Any] = {
        "remove": "30%", "of": "decoder", "method": "comp",
        "options": {"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8,
                    "inputs": "identical"},
        "calibration": {"samples": 4, "length": 20},
    }  # fmt: skip
    alone = make_plan(source, make_recipe(**fields)).plan
    both = make_plan(source, make_recipe(**fields, then="wanda", sparsity="50%")).plan
    first, chained = alone.blocks[0], both.blocks[0]  # later ones see another prefix
    assert first.inputs.keys() == chained.inputs.keys()
    for name, kept in first.inputs.items():
        assert torch.equal(kept, chained.inputs[name])
    assert not chained.scales


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"method": "apt", "remove": "20%"},
            "--method apt makes zeros and removes no parameters: give it --sparsity 50% or 2:4, or "
            "choose one of ",
        ),
        (
            {"method": "comp", "sparsity": "50%"},
            "--method comp removes parameters and makes no zeros: with --sparsity choose one of ",
        ),
        (
            {"method": "obs", "remove": "20%", "then": "flap", "sparsity": "50%"},
            "--then flap removes parameters and makes no zeros: with --sparsity choose one of ",
        ),
        (
            {"remove": "20%", "then": "apt"},
            "--then apt needs the zeros to make: add --sparsity 2:4",
        ),
        (
            {"remove": "20%", "sparsity": "50%"},
            "give exactly one of --remove, --params, --size and --sparsity, not --remove and "
            "--sparsity; --then METHOD makes zeros after a removal",
        ),
        (
            {"sparsity": "50%", "then_options": {"rounds": 1}},
            "then_options are settings of --then, which is not given",
        ),
    ],
)
def test_recipes_that_contradict_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(**fields)
    assert str(caught.value).startswith(said)


def test_the_best_method_and_random_by_their_target() -> None:
    assert make_recipe(sparsity="50%").method == "apt"
    assert make_recipe(sparsity="50%", method="random").method == "random-sparse"
    assert make_recipe(remove="20%", method="random").method == "random"
    chained = make_recipe(remove="20%", then="random", sparsity="2:4")
    assert (chained.method, chained.then) == ("obs", "random-sparse")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"options": {"leave": ["mlp.gate"]}},
            "leave names mlp.gate, which is no linear layer of a llama block: there are "
            "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, "
            "mlp.gate_proj, mlp.up_proj, mlp.down_proj",
        ),
        (
            {"sparsity": "2:5"},
            "sparsity 2:5 wants inputs in groups of 5, but self_attn.q_proj has 32: leave it out "
            "with --set leave='[self_attn.q_proj]', or choose a group that divides it",
        ),
        (
            {"sparsity": "2:4", "options": {"allocation": "error"}},
            "allocation is error, but 2:4 gives every layer the same sparsity: use --allocation "
            "uniform, or a share such as --sparsity 50%",
        ),
        (
            {"sparsity": "95%", "options": {"allocation": "owl", "spread": 0.08}},
            "spread is 0.08, which takes layers of sparsity 95% below 0% or to 100%: lower it with "
            "--set spread",
        ),
        (
            {"method": "magnitude", "options": {"allocation": "owl"}},
            "allocation is owl, but method magnitude reads no text to tell layers apart by: use "
            "--allocation uniform, or --method wanda",
        ),
        (
            {"layout": "uniform"},
            "--layout says what shapes blocks get, but --sparsity 50% makes zeros and keeps all "
            "shapes: leave out --layout, or remove units first with --remove and let --then make "
            "zeros",
        ),
        (
            {
                "remove": "20%",
                "method": "obs",
                "then": "apt",
                "then_options": {"allocation": "owl"},
            },
            "allocation is owl, but behind a removal zeros are shared out evenly: use --allocation "
            "uniform",
        ),
        (
            {"remove": "20%", "method": "comp", "then": "apt", "structure": "inputs"},
            "--then makes zeros in whole units that stay, but --structure inputs removes columns "
            "of single layers: use --structure coupled",
        ),
        (
            {"remove": "20%", "method": "slicegpt", "then": "apt"},
            "--then apt makes zeros in whole units that stay, but method slicegpt cuts the hidden "
            "width of the whole model: leave out --then, or use another --method, such as obs",
        ),
    ],
)
def test_what_this_model_cannot_have(
    fields: dict[str, Any], said: str, model_folder: Folder
) -> None:
    with pytest.raises(SecateurError) as caught:
        make_plan(model_folder("llama-gqa-tied"), make_recipe(**{"sparsity": "50%", **fields}))
    assert str(caught.value) == said


def test_a_layer_that_stays_dense(model_folder: Folder) -> None:
    asked = recipe("apt", options={"leave": ["self_attn.v_proj"]})
    plan = make_plan(model_folder("llama-gqa-tied"), asked).plan
    assert all("self_attn.v_proj" not in cut.notes["zeros"] for cut in plan.blocks)


def test_recipe_files(tmp_path: Path) -> None:
    """A removal on the command line replaces the file's, not the zeros behind it."""
    file = tmp_path / "both.yaml"
    file.write_text("remove: 20%\nof: decoder\nthen: apt\nsparsity: '2:4'\n")
    assert load_recipe(file, remove="30%").sparsity == "2:4"
    assert load_recipe(file, params="100M").sparsity == "2:4"
    assert load_recipe(file, sparsity="50%").remove == "20%"
    file.write_text("remove: 20%\n")
    assert load_recipe(file, sparsity="50%", method="apt").remove is None


def test_cells_of_both_kinds() -> None:
    cells = make_cells(
        methods=["comp", "apt"], remove=["20%"], sparsity=["50%", "2:4"], of="decoder"
    )
    assert [(c.label, c.asked) for c in cells] == [
        ("comp", "20% of the decoder"), ("apt", "50% zeros"), ("apt", "2:4 zeros")
    ]  # fmt: skip
    assert [c.name for c in cells][1:] == ["apt-50-zeros-seed0", "apt-2-4-zeros-seed0"]
    with pytest.raises(RecipeError) as caught:
        make_cells(methods=["comp", "apt"], remove=["20%"])
    assert str(caught.value) == (
        "--methods apt needs a target of its kind: give --sparsity 50%,2:4"
    )
    assert make_cells(methods=["random"], sparsity=["50%"])[0].recipe.method == "random-sparse"


def test_options_are_the_methods_own() -> None:
    with pytest.raises(RecipeError, match="option of method wanda rounds is not known"):
        get_method("wanda", {"rounds": 2})


# ---- the order of inputs ---------------------------------------------------------------------


def test_a_better_order_keeps_more() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 24, generator=generator) * (torch.arange(24) + 1)  # strong ones together
    start = torch.arange(24)
    dealt = deal(scores, 4)
    assigned = assign(scores, 2, 4, dealt)
    for order in (dealt, assigned):
        assert torch.equal(order.sort()[0], start)
    kept = [retained(scores, 2, 4, order) for order in (start, dealt, assigned)]
    assert kept == sorted(kept)
    assert kept[0] < kept[2]
    mask = lowest_in_groups(scores[:, assigned], 2, 4)
    assert float((scores[:, assigned] * ~mask).sum()) == pytest.approx(kept[2])


def test_a_slot_is_assigned_as_well_as_can_be() -> None:
    """Three groups: all orders of one slot's inputs, tried one by one."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(5, 12, generator=generator)
    table = torch.arange(12).view(3, 4)
    best = table
    for slot in range(4):
        tries = []
        for order in itertools.permutations(range(3)):
            moved = best.clone()
            moved[:, slot] = best[list(order), slot]
            tries.append(moved)
        best = max(tries, key=lambda t: retained(scores, 2, 4, t.reshape(-1)))
    found = assign(scores, 2, 4, torch.arange(12))
    assert retained(scores, 2, 4, found) == pytest.approx(retained(scores, 2, 4, best.reshape(-1)))


def test_permuted_layers_compute_what_they_did(model_folder: Folder) -> None:
    """With nothing to lose but the order: masks of N:M aside, the block's output is the same."""
    source = model_folder("llama-biases")
    stream, tokens = Stream(open_checkpoint(source)), random_tokens(2, 12)
    method = get_method("ria", {}, Form(sparsity=parse_sparsity("2:4")))
    assert isinstance(method, Ria)
    anatomy = stream.anatomy
    with stream.block(0) as module:
        hidden = stream.embed(tokens)
        before = stream.forward_block(0, module, hidden)
        generator = torch.Generator().manual_seed(0)
        width = anatomy.ffn_width
        neurons = method._order(torch.rand(9, width, generator=generator))
        columns, rows = method._inside_heads(torch.rand(9, 32, generator=generator), anatomy)
        for name, order in {"mlp.gate_proj": neurons, "mlp.up_proj": neurons,
                            "self_attn.v_proj": rows}.items():  # fmt: skip
            layer = module.get_submodule(name)
            layer.weight = torch.nn.Parameter(layer.weight[order])
            layer.bias = torch.nn.Parameter(layer.bias[order])
        for name, order in {"mlp.down_proj": neurons, "self_attn.o_proj": columns}.items():
            layer = module.get_submodule(name)
            layer.weight = torch.nn.Parameter(layer.weight[:, order])
        assert not torch.equal(neurons, torch.arange(width))
        torch.testing.assert_close(stream.forward_block(0, module, hidden), before)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_channels_whose_order_more_than_rows_hangs_on_stay_where_they_are(
    name: str, model_folder: Folder, tmp_path: Path
) -> None:
    """Convolution, decay and gate of a mixer would have to follow; so ria leaves their order."""
    source = model_folder(name)
    given = {"leave": ["mixer.dt_proj"]} if name == "mamba" else {}
    asked = recipe("ria 2:4", options=given)
    done = prune(source, tmp_path / "out", asked, verify=False)
    found = verify(done.out, against=source)
    assert isinstance(found, Verification)
    assert found.max_difference <= 1e-3 * max(1.0, found.max_logit)
    stream = Stream(open_checkpoint(source))
    weights = stream.read_block(0)
    kept = Stream(open_checkpoint(done.out)).read_block(0)["mixer.out_proj.weight"]
    same = kept == weights["mixer.out_proj.weight"]
    assert bool((same | (kept == 0)).all())


# ---- what becomes of it ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["apt", "ria 2:4"])
def test_a_sparse_folder_is_verified_and_exported(
    case: str, model_folder: Folder, tmp_path: Path
) -> None:
    """Against its source as well; and the file says that zeros gain nothing in it."""
    source = model_folder("llama-biases" if case.startswith("ria") else "llama-gqa-tied")
    done = prune(source, tmp_path / "out", recipe(case), verify=False)
    found = verify(done.out, against=source)
    assert isinstance(found, Verification)
    assert found.max_difference <= 1e-3 * max(1.0, found.max_logit)
    if case.startswith("ria"):
        return
    exported = export(done.out, tmp_path / "out.gguf", weights="f32", verify=False)
    whole = export(source, tmp_path / "whole.gguf", weights="f32", verify=False)
    assert exported.notes[len(whole.notes) :] == [
        f"its {done.plan.zeros:,} zeros are stored like all other weights: llama.cpp knows no "
        "sparse type, so the file is as large and as fast as without them"
    ]
    again = Stream(open_checkpoint(exported.path))
    zeros = sum(
        int((tensor == 0).sum())
        for layer in range(again.anatomy.layers)
        for name, tensor in again.read_block(layer).items()
        if name.removesuffix(".weight") in again.anatomy.denses
    )
    assert zeros == done.plan.zeros


@pytest.mark.parametrize("case", ["apt", "sparsegpt 2:4"])
def test_packed_files_shrink_and_come_back(case: str, model_folder: Folder, tmp_path: Path) -> None:
    done = prune(model_folder("llama-gqa-tied"), tmp_path / "out", recipe(case), verify=False)
    packed = export(done.out, tmp_path / "packed", to="packed")
    share = parse_sparsity(recipe(case).sparsity or "").share
    plan = done.plan
    weights = sum(d.rows * d.inputs for d in plan.anatomy.denses.values()) * plan.anatomy.layers
    saved = weights * (4 * share - 1 / 8)  # a bit for each, four bytes for those that are not zero
    assert packed.bytes < done.bytes_written - saved + 20_000  # headers and shapes
    assert packed.notes[-1] == NOTE
    # Secateur reads it as if it were plain; transformers says that it cannot.
    first, second = Stream(open_checkpoint(done.out)), Stream(open_checkpoint(packed.path))
    for layer in range(first.anatomy.layers):
        one, other = first.read_block(layer), second.read_block(layer)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="secateur-packed"):
        reopen(packed.path)
    plain = export(packed.path, tmp_path / "plain", to="plain")
    assert bytes_of(plain.path) == bytes_of(done.out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        export(done.out, plain.path, to="packed")


@given(
    rows=st.integers(1, 9), width=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_packing_loses_nothing(rows: int, width: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, width, generator=generator).half()
    tensor[torch.rand(rows, width, generator=generator) < share] = 0
    parts = pack("w", tensor)
    packed_shape(
        "w", tuple(parts["w.bitmask"].shape), tuple(parts["w.shape"].tolist()),
        tuple(parts["w.compressed"].shape),
    )  # fmt: skip
    short = {name.removeprefix("w."): part for name, part in parts.items()}
    assert torch.equal(unpack("w", short, (rows, width)), tensor)
    bits = int.from_bytes(parts["w.bitmask"][0].numpy().tobytes(), "little")
    assert [bool(bits >> j & 1) for j in range(width)] == (tensor[0] != 0).tolist()


@pytest.mark.parametrize(
    ("mask", "shape", "values"),
    [
        ((4, 2), (4, 17), (9,)),
        ((4, 2), (4, 16), (65,)),
        ((4, 2), (10**9, 16), (9,)),
        ((4, 2), (4, 16, 1), (9,)),
        ((0, 2), (0, 16), (0,)),
        ((4, 2), (-4, 16), (9,)),
    ],
)
def test_forged_parts_are_refused(
    mask: tuple[int, ...], shape: tuple[int, ...], values: tuple[int, ...]
) -> None:
    with pytest.raises(SourceError) as caught:
        packed_shape("w", mask, shape, values)
    assert str(caught.value) == (
        f"tensor w is damaged: shape {list(shape)}, mask {list(mask)} and values {list(values)} do "
        "not belong together; pack the model again"
    )
    parts = {"bitmask": torch.full((1, 1), 7, dtype=torch.uint8), "compressed": torch.ones(2)}
    with pytest.raises(SourceError) as caught:
        unpack("w", parts, (1, 8))
    assert str(caught.value) == (
        "tensor w is damaged: its mask keeps 3 values, its file has 2; pack the model again"
    )


def test_a_gguf_file_cannot_be_packed(model_folder: Folder, tmp_path: Path) -> None:
    whole = export(model_folder("llama-gqa-tied"), tmp_path / "a.gguf", weights="f32", verify=False)
    with pytest.raises(OutputError) as caught:
        export(whole.path, tmp_path / "packed", to="packed")
    assert str(caught.value) == (
        f"source {whole.path} is no folder of safetensors, which alone can be packed"
    )
    assert not (tmp_path / "packed").exists()


def test_two_of_four_in_torchs_layout() -> None:
    """The kernels need a GPU; which layers would go there can be seen here."""
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)
    )
    with torch.no_grad():
        for layer in (model[0], model[1], model[3]):
            scores = torch.rand(layer.weight.shape, generator=generator)
            layer.weight.masked_fill_(lowest_in_groups(scores, 2, 4), 0)
        model[3].weight[0, :4] = 1  # one group of four is full
    assert [is_two_of_four(layer.weight) for layer in model] == [True, True, False, False]
    with pytest.raises(RecipeError) as caught:
        semi_structured(model)
    assert str(caught.value) == (
        "0 is float32 on cpu: torch's 2:4 kernels run in float16 or bfloat16 on an NVIDIA GPU from "
        "Ampere on; use model.half().cuda()"
    )

    # torch's own conversion, which runs here, holds these weights without loss.
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    weight = model[0].weight.detach().half()
    values, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (32, 32)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)


def test_no_trial_is_made_of_layouts_that_all_stay(model_folder: Folder) -> None:
    done = make_plan(model_folder("llama-gqa-tied"), recipe("magnitude"))
    assert done.layout_cost is None
    assert set(done.seconds) == {"cutting blocks"}
