"""LLM-Pruner against scores from plain autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import secateur
from test_scored import LLAMA, OPT, blocks_of, check_total, kept_units, whole, windows_of

from secateur.errors import RecipeError
from secateur.methods import get_method
from secateur.pipeline import make_plan
from secateur.plans import BlockCut
from secateur.recipe import Recipe, make_recipe
from secateur.solvers.taylor import loss_change, over_units, reduced

Folder = Callable[[str], Path]
SHORT = {"samples": 4, "length": 24}
EIGHT = ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4})
#: Layers that a head and a neuron are made of: path, axis; the last two kinds are by group.
PARTS = {
    LLAMA: (
        [("self_attn.q_proj", 0), ("self_attn.k_proj", 0), ("self_attn.v_proj", 0),
         ("self_attn.o_proj", 1)],
        [("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)],
    ),
    OPT: (
        [("self_attn.q_proj", 0), ("self_attn.k_proj", 0), ("self_attn.v_proj", 0),
         ("self_attn.out_proj", 1)],
        [("fc1", 0), ("fc2", 1)],
    ),
}  # fmt: skip
#: Model, paths of the two outputs, inputs that a KV group makes, and groups.
SHAPES = [("eight-heads", LLAMA, 8, 4), ("llama-gqa-tied", LLAMA, 16, 2), ("opt", OPT, 8, 4)]


@pytest.fixture(scope="module", autouse=True)
def more_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODELS, "eight-heads", EIGHT)
        yield


def recipe(remove: str = "55%", **fields: Any) -> Recipe:
    options = {"exempt_first": 0, "exempt_last": 0, **fields.pop("options", {})}
    return make_recipe(
        **{"remove": remove, "of": "decoder", "method": "llm-pruner", "calibration": SHORT,
           "options": options, **fields}
    )  # fmt: skip


def window_gradients(folder: Path, model: Any) -> list[list[dict[str, np.ndarray]]]:
    """By window and block: dL_s/dW of every weight, L_s as transformers' own loss has it."""
    found = []
    for window in windows_of(folder).split(1):
        model.zero_grad()
        model(input_ids=window, labels=window, use_cache=False).loss.backward()
        found.append(
            [
                {n: p.grad.double().numpy().copy() for n, p in block.named_parameters()}
                for block in blocks_of(model)
            ]
        )
    return found


def unit_scores(
    weights: dict[str, np.ndarray],
    windows: list[dict[str, np.ndarray]],
    parts: list[tuple[str, int]],
    units: int,
    score: str,
    reduction: str,
) -> np.ndarray:
    """One unit, one layer, one row or column at a time."""
    found = np.zeros(units)
    for unit in range(units):
        members = []
        for path, axis in parts:
            w = weights[path] if axis == 0 else weights[path].T
            gs = [g[f"{path}.weight"] if axis == 0 else g[f"{path}.weight"].T for g in windows]
            each = len(w) // units
            total = 0.0
            for row in range(unit * each, (unit + 1) * each):
                g = np.mean([g[row] for g in gs], axis=0)
                fisher = np.mean([g[row] ** 2 for g in gs], axis=0)
                total += {
                    "vector": lambda a=w[row], g=g: abs((a * g).sum()),
                    "param_first": lambda a=w[row], g=g: np.abs(a * g).sum(),
                    "param_second": lambda a=w[row], f=fisher: np.abs(a * a * f).sum(),
                    "param_mix": lambda a=w[row], g=g, f=fisher: np.abs(
                        a * g - a * a * f / 2
                    ).sum(),
                }[score]()
            members.append(total)
        found[unit] = {
            "sum": np.sum, "mean": np.mean, "max": np.max, "prod": np.prod,
            "first": lambda m: m[0], "last": lambda m: m[-1],
        }[reduction](members)  # fmt: skip
    return found


def reference(
    folder: Path, paths: tuple[str, str], groups: int, score: str, reduction: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    model = whole(folder)
    windows, found = window_gradients(folder, model), []
    for number, block in enumerate(blocks_of(model)):
        weights = {
            n.removesuffix(".weight"): p.detach().double().numpy()
            for n, p in block.named_parameters()
        }
        own = [window[number] for window in windows]
        heads, neurons = (
            unit_scores(weights, own, parts, units, score, reduction)
            for parts, units in zip(PARTS[paths], (groups, weights[paths[1]].shape[1]), strict=True)
        )
        found.append((heads, neurons))
    return found


@pytest.mark.parametrize(("name", "paths", "group", "groups"), SHAPES)
def test_obs_by_gradients_alone_removes_what_the_loss_needs_least(
    name: str, paths: tuple[str, str], group: int, groups: int, model_folder: Folder
) -> None:
    """f of a unit is the sum over its weights of W^2 F: the second order of LLM-Pruner."""
    options = {"layers": 0, "gradients": 1.0, "copies": 0, "written": 0}
    result = make_plan(model_folder(name), recipe("40%", method="obs", options=options))
    scores = reference(model_folder(name), paths, groups, "param_second", "sum")
    found = 0
    for cut, pair in zip(result.plan.blocks, scores, strict=True):
        for path, width, own in zip(paths, (group, 1), pair, strict=True):
            gone = sorted(set(range(len(own))) - set(left(cut, path, width, len(own))))
            found += len(gone)
            if gone:
                assert own[gone].max() < np.delete(own, gone).min()
    assert found > 40


def left(cut: BlockCut, path: str, width: int, units: int) -> list[int]:
    return kept_units(cut, path, width) if path in cut.inputs else list(range(units))


@pytest.mark.parametrize("reduction", ["sum", "max", "prod", "first"])
@pytest.mark.parametrize("score", ["vector", "param_first", "param_second", "param_mix"])
@pytest.mark.parametrize(("name", "paths", "group", "groups"), SHAPES)
def test_each_block_loses_its_lowest(
    name: str, paths: tuple[str, str], group: int, groups: int, score: str, reduction: str,
    model_folder: Folder,
) -> None:  # fmt: skip
    made = recipe(options={"score": score, "reduction": reduction})
    result = make_plan(model_folder(name), made)
    scores = reference(model_folder(name), paths, groups, score, reduction)
    for cut, pair in zip(result.plan.blocks, scores, strict=True):
        for path, width, own in zip(paths, (group, 1), pair, strict=True):
            kept = kept_units(cut, path, width)
            gone = sorted(set(range(len(own))) - set(kept))
            assert gone
            assert own[gone].max() < own[kept].min()
    check_total(result.asked, result.plan, 1)


@pytest.mark.parametrize(("name", "paths", "group", "groups"), SHAPES)
def test_one_order_over_all_blocks(
    name: str, paths: tuple[str, str], group: int, groups: int, model_folder: Folder
) -> None:
    result = make_plan(model_folder(name), recipe("30%", options={"shares": "global"}))
    scores = reference(model_folder(name), paths, groups, "param_first", "sum")
    gone, kept = [], []
    for cut, (_, own) in zip(result.plan.blocks, scores, strict=True):
        stays = left(cut, paths[1], 1, len(own))
        gone += [float(own[u]) for u in range(len(own)) if u not in stays]
        kept += [float(own[u]) for u in stays] if len(stays) > 1 else []
    assert max(gone) < min(kept)
    assert len({len(left(cut, paths[1], 1, 64)) for cut in result.plan.blocks}) > 1
    check_total(result.asked, result.plan, 1)


@pytest.mark.parametrize("name", ["llm-pruner", "saap"])
def test_as_many_blocks_are_spared_as_the_depth_allows(name: str) -> None:
    found: Any = get_method(name, {})
    assert list(found.surveyed(range(5))) == [1, 2, 3, 4]
    assert list(found.surveyed(range(12))) == list(range(2, 11))
    assert list(found.surveyed(range(30))) == list(range(4, 28))
    assert list(found.surveyed(range(80))) == list(range(4, 78))


def test_exempt_blocks(model_folder: Folder) -> None:
    options = {"exempt_first": 1, "exempt_last": 2, "groups": "keep"}
    plan = make_plan(model_folder("opt"), recipe("8%", options=options)).plan
    assert [bool(cut.inputs) for cut in plan.blocks] == [False, True, False, False]
    # One width for all blocks leaves nobody out.
    plan = make_plan(model_folder("opt"), recipe("8%", options=options, layout="uniform")).plan
    assert plan.uniform is not None
    assert all(cut.inputs for cut in plan.blocks)


def test_the_mixed_score_takes_the_second_term_from_the_first() -> None:
    """|W g - W^2 F / 2| of each weight; sizes first would lose the sign between the terms."""
    w, g, f = torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
    change = loss_change(w, g, f, "mixed")
    assert change.tolist() == [[4.0, -5.0]]
    assert over_units(change, 0, 1, vector=False).tolist() == [9.0]
    assert over_units(change, 0, 1, vector=True).tolist() == [1.0]
    assert over_units(change, 1, 2, vector=True).tolist() == [9.0]


def test_reductions() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    wanted = {"sum": [4, 7], "mean": [2, 3.5], "max": [3, 5], "prod": [3, 10], "first": [1, 2],
              "last": [3, 5]}  # fmt: skip
    assert {name: reduced(parts, name).tolist() for name in wanted} == wanted  # type: ignore[arg-type]


def test_first_order_alone_takes_windows_together() -> None:
    wanted = {"param_first": None, "vector": None, "param_second": 1, "param_mix": 1}
    for score, windows in wanted.items():
        method: Any = get_method("llm-pruner", {"score": score})
        assert method.windows_per_gradient == windows


def test_refusals(model_folder: Folder) -> None:
    folder = model_folder("llama-gqa-tied")
    wishes = ("plan", folder, "--of", "decoder", "--method", "llm-pruner", "--remove", "30%",
              "--samples", "2", "--length", "12")  # fmt: skip
    ended = secateur(*wishes, "--set", "exempt_first=2", "--set", "exempt_last=2")
    assert ended.code == 2
    assert ended.err[-1] == (
        "error: 9,293 parameters should leave 0 blocks, which can lose at most 0: ask for less, or "
        "set exempt_first and exempt_last"
    )
    ended = secateur(*wishes, "--set", "shares=global", "--layout", "uniform")
    assert ended.code == 2
    assert ended.err[-1] == (
        "error: method llm-pruner ranks all blocks together (shares global), which gives each its "
        "own widths: use --layout per-layer, or --set shares=local"
    )
    for model in ("mamba", "mamba2"):
        wishes = ("plan", model_folder(model), "--remove", "10%", "--samples", "2")
        others = f"adds up gradients over the layers of attention and FFN, and blocks of {model}"
        for options, line in (
            (("--method", "saap"), f"error: method saap {others} have others: use --method obs"),
            (
                ("--set", "gradients=0.5"),
                f"error: --set gradients {others} have others: leave it out",
            ),
        ):
            ended = secateur(*wishes, *options)
            assert ended.code == 2
            assert ended.err[-1] == line
    with pytest.raises(RecipeError, match="param_third"):
        get_method("llm-pruner", {"score": "param_third"})
